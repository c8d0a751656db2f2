"""Two processes (gloo) give a discrete head the gradients of one: under DDP and, its head with the root, under FSDP."""

from __future__ import annotations

import pytest
import torch

from engine.data.inputs import StepInputs
from engine.train.parallel import gathered, shard, wrap
from engine.train.supervised import backward_pass
from models.masking import TokenMask
from models.structmar import StructMAR, TrainingNoise
from models.weights import select_trainable
from tests.helpers.family import LLAMA, family_model, some_latents
from tests.helpers.processes import assert_close, in_two_processes

CPU = torch.device("cpu")


def model_of(trunk: str) -> StructMAR:
    """Every image counts as much: the loss is on all codes."""
    model = family_model(trunk, patch_size=2, loss_on="all", **LLAMA).train()
    select_trainable(model, "full")
    return model


def rows_of(noise: TrainingNoise, rows: slice) -> TrainingNoise:
    counts = noise.mask.counts
    if counts is None:
        return TrainingNoise(TokenMask(noise.mask.masked[rows], noise.mask.num_masked), noise.head)
    return TrainingNoise(TokenMask(noise.mask.masked[rows], max(counts[rows]), counts[rows]), noise.head)


@pytest.mark.parametrize("trunk", ["mae", "single"])
def test_gradients_of_two_processes(trunk: str) -> None:
    model = model_of(trunk)
    latents = some_latents(model, 4)
    noise = model.sample_training_noise(4, torch.Generator().manual_seed(5), 0.7)
    backward_pass(model, StepInputs(latents), noise, "fp32", 1, True)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)

    def step(rank: int) -> dict[str, dict[str, torch.Tensor]]:
        rows, found = slice(2 * rank, 2 * rank + 2), {}
        for is_sharded in (False, True):
            replica = model_of(trunk)
            if is_sharded:
                shard(replica, replica.fsdp_units(), CPU, 2)
            wrapped = wrap(replica, CPU, 2)
            backward_pass(wrapped, StepInputs(latents[rows]), rows_of(noise, rows), "fp32", 1, True)
            own = {name: p.grad for name, p in replica.named_parameters() if p.grad is not None}
            found["fsdp" if is_sharded else "ddp"] = gathered(own)
        return found

    for found in in_two_processes(step):
        assert_close(found["ddp"], expected)
        assert_close(found["fsdp"], expected)
