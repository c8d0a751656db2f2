"""Processes and devices: one process, or as many as torchrun started (nccl on CUDA, gloo on CPU).

Questions that processes ask one another (`any_rank`, `gather_objects`, means of numbers) go over gloo in both cases:
they wait for no GPU, and a process that does not answer within the timeout is noticed. When a program fails, its
processes tell one another by the store through which they met, so that one fault is one line (`say_once`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from util.failures import RanksFailed, one_line

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE = timedelta(seconds=3)  # between the first process that fails and others that fail alike
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo", "NCCL", "Broken pipe")


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


@dataclass
class _Group:
    """What this process knows of the others. questions: the gloo group; None where the default group is gloo."""

    store: Store | None = None
    questions: Any = None


_GROUP = _Group()


def init_distributed(device: str, timeout_s: float = 1800.0) -> DistInfo:
    """Joins the process group that torchrun's environment describes, if it describes one. device: "cpu", "cuda",
    "cuda:N", or "auto" for cuda where there is one.

    timeout_s: how long a process waits for the others before it gives up.
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
        _join(rank, world_size, chosen, timedelta(seconds=timeout_s))
    return DistInfo(rank, world_size, local_rank, chosen)


def _join(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    _GROUP.store = PrefixStore(f"structmar/{attempt}", store)
    options: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "store": PrefixStore(f"group/{attempt}", store),
    }
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=2 * timeout, device_id=device, **options)  # gloo gives up first
        _GROUP.questions = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout, **options)


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
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if _is_grouped():
        dist.all_reduce(packed, group=_GROUP.questions)
        packed /= dist.get_world_size()
    means = dict(zip(names, packed.tolist(), strict=True))
    return {name: means[name] for name in values}


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one (all ranks must ask)."""
    if not _is_grouped():
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_GROUP.questions)
    return bool(votes.item())


def gather_objects(value: Any) -> list[Any]:
    """The plain values of all processes, by rank, on every one of them; `[value]` when there is one process."""
    if not _is_grouped():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_GROUP.questions)
    return values


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if _is_grouped():
        dist.destroy_process_group()
    _GROUP.store = _GROUP.questions = None


# --- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def failing_together() -> Iterator[None]:
    """An exception inside, on any process, is raised on all as `RanksFailed` (all must enter; with one process it stays
    what it is). For work that does not wait for other processes itself."""
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        if not _is_grouped():
            raise
        error = found
    if not any_rank(error is not None):
        return
    told = gather_objects(None if error is None else one_line(error))
    if len(set(told)) == 1:
        raise RanksFailed(told[0]) from error
    raise RanksFailed("; ".join(f"rank {rank}: {line}" for rank, line in enumerate(told) if line)) from error


def say_once(line: str, error: Exception, say: Callable[[str], object]) -> None:
    """Tells why this process fails, unless another one has said it: processes that fail alike say it once, one that
    fails alone says its rank, and those that only lost contact with it are quiet. Returns when it is said.

    Where processes are lost and none has said why, the line names those that do not answer.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gone = (dist.DistError, RuntimeError)  # the store, with the process that kept it: rank 0 without torchrun
    try:
        store = _GROUP.store or _meet(rank, size)
        store.set_timeout(_GRACE)
        first, _, first_line = store.compare_set("first failure", "", f"{rank} {line}").decode().partition(" ")
    except gone:
        say(_who_fails(line, error, rank, [0], False))
        return
    with suppress(*gone):
        store.set(f"failed {rank}", line)
    if int(first) != rank:
        with suppress(*gone):
            _has(store, "said")
        if line != first_line and not _is_lost_contact(error):
            say(_who_fails(line, error, rank, [], False))
        return
    silent, is_alike = [], False
    with suppress(*gone):
        others = [other for other in range(size) if other != rank]
        _has(store, *(f"failed {other}" for other in others))
        silent = [other for other in others if not store.check([f"failed {other}"])]
        is_alike = not silent and all(store.get(f"failed {other}").decode() == line for other in range(size))
    say(_who_fails(line, error, rank, silent, is_alike))
    with suppress(*gone):
        store.set("said", "")


def _who_fails(line: str, error: Exception, rank: int, silent: Sequence[int], is_alike: bool) -> str:
    if _is_lost_contact(error) and silent:
        names = ", ".join(map(str, silent))
        return f"{line.partition('error:')[0]}error: no answer from rank {names}: ended or hanging (rank {rank} waited)"
    return line if is_alike or rank == 0 else f"[rank {rank}] {line}"


def _is_lost_contact(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    )


def _has(store: Store, *keys: str) -> bool:
    """Whether the keys are all there, or come within a moment."""
    end = time.monotonic() + _GRACE.total_seconds()
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _meet(rank: int, size: int) -> Store:
    """The store, for processes that fail before they have joined the group."""
    store, _, _ = next(rendezvous("env://", rank, size, timeout=_GRACE))
    return PrefixStore(f"structmar/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    """local_rank: None outside torchrun, where "cuda" means the first GPU and "cuda:1" is allowed."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
