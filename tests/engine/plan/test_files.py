"""A planner's file gives back what was written, and says what is wrong with another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.plan.files import FORMAT, PlannerIdentity, load_planner, require_same_planner, save_planner
from models.planner import Planner, PlannerConfig
from util.checkpoint import save_safetensors_atomic
from util.types import Category

CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
IDENTITY = PlannerIdentity(PlannerConfig(2, 8, 4, num_bins=8, width=8, depth=1, num_heads=1), CATEGORIES, "abc")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return Planner(IDENTITY.config).state_dict()


@pytest.fixture
def path(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_planner(tmp_path / "planner.safetensors", IDENTITY, weights, 5)
    return tmp_path / "planner.safetensors"


def test_a_file_gives_back_what_it_was_made_of_in_half_precision(path: Path, weights: dict[str, torch.Tensor]) -> None:
    model, identity = load_planner(path)
    assert identity == IDENTITY and not model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].half().float()), name
    assert path.stat().st_size < 3 * sum(tensor.numel() for tensor in weights.values()) + 8000
    assert load_planner(path.parent)[1] == IDENTITY  # its folder


def test_loading_draws_nothing_from_the_global_generator(path: Path) -> None:
    state = torch.get_rng_state()
    load_planner(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_files_are_no_planner(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_safetensors_atomic(weights, tmp_path / "model.safetensors", {"format": "structmar-1"})
    with pytest.raises(ValueError, match="model.safetensors has the format 'structmar-1', a planner"):
        load_planner(tmp_path / "model.safetensors")
    (tmp_path / "run.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="run.pth is no planner"):
        load_planner(tmp_path / "run.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_planner(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("record", ["", "{", "[]", '{"config": {}, "categories": 3, "text_encoder": ""}'])
def test_damaged_metadata_are_named(record: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_safetensors_atomic(weights, tmp_path / "p.safetensors", {"format": FORMAT, "planner": record})
    with pytest.raises(ValueError, match="planner .*p.safetensors"):
        load_planner(tmp_path / "p.safetensors")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "p.safetensors"
    for changed, message in (
        ({name: tensor for name, tensor in weights.items() if name != "norm.bias"}, "lacks norm.bias"),
        (weights | {"extra": torch.zeros(1)}, "has the unknown extra"),
        (weights | {"norm.bias": torch.zeros(3)}, r"norm.bias has the shape \(3,\), its config implies \(8,\)"),
        (weights | {"norm.bias": torch.full((8,), torch.nan)}, "norm.bias is not finite"),
    ):
        save_planner(path, IDENTITY, changed, 0)
        with pytest.raises(ValueError, match=message):
            load_planner(path)


def test_the_first_difference_of_two_planners_is_named() -> None:
    require_same_planner(IDENTITY, replace(IDENTITY, config=replace(IDENTITY.config, dropout=0.5)), "a file")
    others = {
        "depth 1, this run has 2": replace(IDENTITY, config=replace(IDENTITY.config, depth=2)),
        "categories 3 cat, 7 dog": replace(IDENTITY, categories=(Category(3, "cat"), Category(8, "dog"))),
        "text encoder abc": replace(IDENTITY, text_encoder_id="xyz"),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"a file was made with {message}"):
            require_same_planner(IDENTITY, other, "a file")
    with pytest.raises(ValueError, match="3 categories, but num_categories 2"):
        replace(IDENTITY, categories=(*CATEGORIES, Category(9, "owl")))
