"""Two processes, replicated or sharded by groups of experts, take the step of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.mars.losses import MarsObjective
from tests.helpers.language_models import tiny_mars
from tests.helpers.mars_pairs import pairs, some_codes
from tests.helpers.processes import in_two_processes

CAPTIONS = ((4, 5, 6), (7, 8, 9))  # as many words in each, so that the mean of means is the mean


def step(rank: int | None, is_sharded: bool) -> dict[str, Any]:
    """What trains after one step on both pairs, or on the one of a process."""
    torch.manual_seed(0)
    objective = MarsObjective(tiny_mars().train())
    codes = some_codes(2)
    some = pairs(CAPTIONS, codes) if rank is None else pairs(CAPTIONS[rank : rank + 1], codes[rank : rank + 1])
    wrapped: torch.nn.Module = objective
    if is_sharded:
        mesh = init_device_mesh("cpu", (2,))
        for group in objective.model.fsdp_units():
            fully_shard(group, mesh=mesh)
        fully_shard(objective, mesh=mesh)
    elif rank is not None:
        wrapped = DistributedDataParallel(objective)
    trained = {name: each for name, each in objective.named_parameters() if each.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    wrapped(some, caption_weight=1, choice_weight=1).total.backward()
    optimizer.step()
    return {name: each.full_tensor() if isinstance(each, DTensor) else each.detach() for name, each in trained.items()}


@pytest.mark.parametrize("is_sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_take_the_step_of_one(is_sharded: bool) -> None:
    wanted = step(None, is_sharded=False)
    for found in in_two_processes(lambda rank: step(rank, is_sharded)):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=0, atol=1e-5)
