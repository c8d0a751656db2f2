"""A language model's folder is opened as it is, or refused with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.frozen.causal_lm import folder_id, open_causal_lm, require_same_base
from models.frozen.lm import LmEncoder
from tests.helpers.lm_files import write_lm


@pytest.fixture(scope="module")
def lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm(tmp_path_factory.mktemp("lm") / "lm", tie_word_embeddings=False)


@pytest.fixture
def directory(tmp_path: Path, lm_dir: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(lm_dir, tmp_path / "lm"))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("shard", ["5MB", "20KB"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_it_is_the_one_that_was_saved(tmp_path: Path, kind: str, shard: str, is_tied: bool) -> None:
    write_lm(tmp_path / "lm", kind, max_shard_size=shard, tie_word_embeddings=is_tied)
    assert (len(list((tmp_path / "lm").glob("*.safetensors"))) > 1) == (shard == "20KB")
    state = torch.get_rng_state()
    opened = open_causal_lm(tmp_path / "lm", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", attn_implementation="sdpa").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(opened.lm(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert opened.lm.config._attn_implementation == "sdpa" and not opened.lm.training
    assert opened.id == folder_id(tmp_path / "lm") == LmEncoder.load(tmp_path / "lm").id and len(opened.id) == 64
    assert (opened.first_token, opened.model_type) == (0, kind)
    assert open_causal_lm(tmp_path / "lm", torch.bfloat16).lm.dtype == torch.bfloat16


def with_config(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **values}))

    return change


def with_tensors(**values: float | None) -> Callable[[Path], None]:
    """Changes the file's tensors, dots written __: None takes one away, a number is added."""

    def change(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        for name, value in values.items():
            old = state.pop(name.replace("__", "."), torch.zeros(1))
            if value is not None:
                state[name.replace("__", ".")] = old + value
        save_file(state, directory / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (with_config(auto_map={"AutoModelForCausalLM": "m.X"}), ValueError, "auto_map .*m.X"),
        (with_tensors(model__norm__weight=None), ValueError, "does not fit its config.json: missing norm.weight"),
        (with_tensors(lm_head__weight=None), ValueError, "does not fit its config.json: missing lm_head.weight"),
        (with_tensors(more=1), ValueError, "does not fit its config.json: left over more"),
        (with_tensors(lm_head__bias=1), ValueError, "does not fit its config.json: left over lm_head.bias"),
        (with_tensors(lm_head__weight=float("nan")), ValueError, "lm_head.weight is not finite"),
        (with_config(tie_word_embeddings=True), ValueError, "lm_head.weight is not the embedding"),
        (with_config(intermediate_size=25), ValueError, r"has shape \(32, 24\), config.json implies \(25, 24\)"),
        (lambda path: (path / "config.json").write_text("{"), ValueError, "config.json"),
        (lambda path: (path / "config.json").write_text("[]"), ValueError, "config.json must hold a json object"),
        (lambda path: (path / "config.json").unlink(), FileNotFoundError, "lm has no config.json"),
        (lambda path: (path / "tokenizer.json").unlink(), FileNotFoundError, "lm has no tokenizer.json"),
        (lambda path: (path / "model.safetensors").unlink(), FileNotFoundError, "lm has no model.safetensors"),
    ],
)
def test_another_folder_is_refused(
    directory: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    change(directory)
    with pytest.raises(error, match=message):
        open_causal_lm(directory, torch.float32)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no language model's folder at"):
        open_causal_lm(tmp_path / "none", torch.float32)


def test_another_base_is_refused() -> None:
    require_same_base("a.pth", "abc", "abc", "lm")
    with pytest.raises(ValueError, match="a.pth was trained on the language model abc, the one in lm is def"):
        require_same_base("a.pth", "abc", "def", "lm")
