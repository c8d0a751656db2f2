"""AdamW as MAR sets it up: parameter groups, learning rate by epoch, gradient clipping.

Weights decay, except biases and norms (anything one-dimensional) and the diffusion head, as in MAR. The learning rate
rises linearly over the warmup, then stays or follows half a cosine down to `min_lr`. Unlike MAR's, its position is the
end of the step being taken, so the first step of a warmup is not lost to a rate of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HEAD_PREFIX = "diffloss."


@dataclass(frozen=True)
class LrSchedule:
    """lr: peak. warmup_epochs, epochs: length in epochs, fractions allowed. kind: 'constant' or 'cosine'."""

    lr: float
    min_lr: float
    warmup_epochs: float
    epochs: float
    kind: str

    def at(self, epoch: float) -> float:
        """Learning rate at a position counted in epochs."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.kind == "constant":
            return self.lr
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def absolute_lr(lr: float | None, blr: float, images_per_step: int) -> float:
    """MAR's linear scaling rule, unless an absolute rate is given."""
    return blr * images_per_step / 256 if lr is None else lr


def parameter_groups(trainable: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Two groups, without and with decay, in the order of `trainable`. Empty groups are left out."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in trainable.items():
        is_plain = parameter.dim() == 1 or name.endswith(".bias") or name.startswith(HEAD_PREFIX)
        (plain if is_plain else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(trainable: Mapping[str, nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """trainable: parameters by name (DTensors under --fsdp). Fused: one kernel for all, on CPU and CUDA."""
    if not trainable:
        raise ValueError("nothing to train: the list of trainable parameters is empty")
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable.values())
    return torch.optim.AdamW(parameter_groups(trainable, weight_decay), lr=lr, betas=(0.9, 0.95), fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients to at most `max_norm` (0: leaves them) and returns the norm before, without a sync."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
