"""Whole runs of MaskGIL's released sampler, on the same numbers: the same codes in the same iterations."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.heads.base import HeadStep
from models.heads.discrete_sampler import CodeTrace, code_log_probs
from models.masking import TokenMask
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.controls import NoControls
from models.sampling.guidance import embed_branches
from models.sampling.orders import commit_steps
from models.sampling.sampler import KnownTokens, SamplingRun, unmask
from models.structmar import StructMAR
from tests.helpers.plain_maskgil import MASK, NUM_CLASSES, NUM_CODES, PlainMaskGIL

RUNS = ["main8", "fid8", "cosine5", "prefix6"]
GRID = (16, 16)


@cache
def fixture(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "trajectory.safetensors")


def settings(folder: Path, name: str) -> tuple[dict[str, Any], SamplingConfig]:
    entry = json.loads((folder / "trajectory.json").read_text())[name]
    given = entry["settings"]
    config = default_sampling(
        "discrete", num_iter=len(entry["counts"]), cfg_text=1.0 + given["w"], cfg_layout=1.0 + given["w"],
        cfg_schedule="step_linear", temperature=1 / given["sm_temp"], choice_temperature=given["r_temp"],
        schedule=given["sched_mode"] if isinstance(given["sched_mode"], str) else "arccos",
    )  # fmt: skip
    return entry, config


@torch.no_grad()
def released_run(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Codes, commit steps and log-probabilities [2, 256], and what was known before each iteration."""
    entry, config = settings(folder, name)
    found = {key.removeprefix(f"{name}."): value for key, value in fixture(folder).items() if key.startswith(name)}
    model = cast(StructMAR, PlainMaskGIL(with_mask_class=not entry["mask_class_cut"]))
    branches, config = embed_branches(model, config, 2, None, None, torch.tensor([3, 7]), GRID)
    run = SamplingRun(model, branches, config, [torch.Generator()] * 2, NoControls(), record=True)
    known = None
    if "known" in found:
        given = found["known"].float()[..., None]  # [2, 256, 1]
        known = KnownTokens(given, given[..., 0] != MASK)
    state = run.start(known)
    counts = list(accumulate(entry["counts"], sub, initial=state.num_masked))
    assert known is not None or counts == config.masked_counts(256)  # the prefix has counts of its own
    order = run.own_order(counts)

    def tape(iteration: int, _step: HeadStep, num_tokens: int) -> Tensor:
        assert num_tokens == 256
        return torch.stack([found["uniform"][iteration], found["gumbel"][iteration].double()], dim=-1)  # [2, 256, 2]

    seen: list[Tensor] = []
    tokens, orders, trace = unmask(run, state, order, tape, on_iteration=lambda _, each: seen.append(each.clone()))
    steps = commit_steps(orders, order.counts)
    for iteration, each in enumerate(seen):  # the tokens so far are the released ones
        committed = steps <= iteration
        assert torch.equal(committed, ~found["still_masked"][iteration].bool())
        assert torch.equal(each[committed].clamp(max=NUM_CODES - 1)[:, 0].long(), found["codes"][committed].long())
    return tokens[..., 0], steps, cast(CodeTrace, trace).log_probs, seen


@pytest.mark.parametrize("name", RUNS)
def test_released_runs(shared: Path, name: str) -> None:
    folder = shared / "reference" / "maskgil"
    codes, steps, log_probs, _ = released_run(folder, name)
    expected = {key: fixture(folder)[f"{name}.{key}"] for key in ("codes", "commit_step", "log_probs")}
    assert torch.equal(codes.clamp(max=NUM_CODES - 1).long(), expected["codes"].long())
    assert torch.equal(steps, expected["commit_step"].long())
    drawn = steps >= 0
    torch.testing.assert_close(log_probs[drawn], expected["log_probs"][drawn], rtol=0, atol=2e-5)
    assert (codes > NUM_CODES - 1).any() == (name == "main8")  # only with the mask's class as a code


def test_the_plain_model_is_the_released_one(shared: Path) -> None:
    released = load_file(shared / "reference" / "maskgil" / "gpt_tiny.safetensors")
    model = PlainMaskGIL(with_mask_class=True)
    labels = torch.where(released["model.drop"].bool(), NUM_CLASSES, released["model.labels"])
    base = model.embed_conditions(2, labels, None, None, GRID).base
    logits = model.head.logits(model.run(released["model.input"].flatten(1), base))[:, :, 0]
    torch.testing.assert_close(logits, released["model.logits"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["fid8", "cosine5"])
def test_first_probabilities(shared: Path, name: str) -> None:
    """Of all tokens before anything is known: guided, tempered."""
    folder = shared / "reference" / "maskgil"
    _, config = settings(folder, name)
    model = PlainMaskGIL()
    branches, config = embed_branches(cast(StructMAR, model), config, 2, None, None, torch.tensor([3, 7]), GRID)
    context = model.prepare(branches.conditions, torch.float32)
    nothing = TokenMask(torch.ones(len(context.conditions.base), 256, dtype=torch.bool), 256)
    tokens = torch.zeros(*nothing.masked.shape, 1)
    z = model.predict(tokens, nothing.kept_ids(), context, nothing.masked_ids())
    logits = branches.combine(model.head.logits(z).unflatten(0, (-1, 2)), 1.0, 1.0)[..., 0, :]
    options = cast(Any, config.head_options(0))
    expected = fixture(folder)[f"{name}.probs_first"]
    torch.testing.assert_close(code_log_probs(logits, options).exp(), expected, rtol=0, atol=1e-6)
