"""One process, DDP or fully sharded: the same loop drives all three.

DDP replicates the model and averages gradients. `fully_shard` (--fsdp) splits weights, gradients, optimizer state and
EMA over the processes, block by block. Both average over processes, so a step of P processes with B images each is the
step of one process with P * B images. Nothing below the loop knows which of the three it runs under.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.structmar import StructMAR


def compile_parts(model: StructMAR, cuda_graphs: bool = False) -> None:
    """Compiles each block and the head in place, for training and for sampling. Whole-model compilation would be redone
    for every number of visible tokens.

    cuda_graphs: the sampler's head is captured, once per number of tokens. Raises ValueError on another device.
    """
    if cuda_graphs and model.fake_latent.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a model on a CUDA device, not on {model.fake_latent.device}")
    model.compile_mode = "reduce-overhead" if cuda_graphs else "default"
    for unit in model.fsdp_units():
        unit.compile()


def shard(
    model: nn.Module, units: Sequence[nn.Module | list[nn.Module]], device: torch.device, world_size: int
) -> None:
    """Shards `model` in place over all processes: `units` one by one, the rest with the root. A unit may be several
    modules that are sharded together.

    Weights are loaded and what trains is selected before; the parameters become DTensors, so optimizer and EMA are
    built after.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """DDP when there is more than one process and the model is not sharded. Every trainable parameter must take part in
    every step: there is no search for unused ones."""
    if world_size == 1 or isinstance(model, FSDPModule):
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(wrapped: nn.Module, enabled: bool) -> Iterator[None]:
    """Gradients are exchanged in this backward pass only if `enabled`: the last of a step's passes. wrapped: DDP, a
    sharded model, or a module around one."""
    sharded = next((module for module in wrapped.modules() if isinstance(module, FSDPModule)), None)
    if sharded is not None:
        sharded.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
    else:
        yield


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """The sharded model's full weights, for calls other than `forward` (sampling). All processes must enter."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # else, before the first `forward`, every block would become a root
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors of sharded ones (on the CPU), others as they are. Collective: every process must call it."""
    return {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in tensors.items()}
