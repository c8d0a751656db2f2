"""Processes and devices: one process, or as many as torchrun started (nccl on CUDA, gloo on CPU)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class DistInfo:
    """Which process this is. rank in 0..world_size-1, local_rank within its machine, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed(device: str, timeout: timedelta = timedelta(minutes=30)) -> DistInfo:
    """Joins the process group that torchrun's environment describes, if it describes one. device: "cpu" or "cuda".

    Raises ValueError if the device does not exist or the environment is incomplete.
    """
    present = [name for name in _ENVIRONMENT if name in os.environ]
    is_launched = "RANK" in present or "LOCAL_RANK" in present
    if is_launched and len(present) < len(_ENVIRONMENT):
        missing = [name for name in _ENVIRONMENT if name not in present]
        raise ValueError(f"incomplete torchrun environment: {', '.join(present)} set, {', '.join(missing)} not")
    rank, world_size, local_rank = (int(os.environ[name]) for name in _ENVIRONMENT[:3]) if is_launched else (0, 1, 0)
    chosen = _choose_device(device, local_rank if is_launched else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if is_launched:
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return DistInfo(rank, world_size, local_rank, chosen)


def is_main() -> bool:
    return not _is_grouped() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if not _is_grouped():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@overload
def reduce_mean(values: Tensor) -> Tensor: ...
@overload
def reduce_mean(values: Mapping[str, float]) -> dict[str, float]: ...
def reduce_mean(values: Tensor | Mapping[str, float]) -> Tensor | dict[str, float]:
    """The mean over ranks, of a floating tensor (a new one) or of named numbers (the same names on every rank)."""
    if isinstance(values, Tensor):
        total = values.detach().clone()
        if _is_grouped():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total
    names = sorted(values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_group_device())
    means = dict(zip(names, reduce_mean(packed).tolist(), strict=True))
    return {name: means[name] for name in values}


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one (all ranks must ask)."""
    if not _is_grouped():
        return flag
    votes = torch.tensor(int(flag), device=_group_device())
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def gather_objects(value: Any) -> list[Any]:
    """The plain values of all processes, by rank, on every one of them; `[value]` when there is one process."""
    if not _is_grouped():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if _is_grouped():
        dist.destroy_process_group()


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group_device() -> torch.device:
    if _is_grouped() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    """local_rank: None outside torchrun, where "cuda" means the first GPU and "cuda:1" is allowed."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: choose cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device {name}: choose cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no usable CUDA device; run with --device cpu")
    if local_rank is not None and device.index is not None:
        raise ValueError(f"--device {name}: under torchrun each process takes its own GPU; use --device cuda")
    index = local_rank if local_rank is not None else device.index or 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: GPU {index} was asked for, this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)
