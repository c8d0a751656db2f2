"""Losses and norms, summed on the device and read once per interval, so that a step waits for nothing.

The meter also watches for values that are not finite. The first step at which one shows up is kept on the device, per
part, and raised when the meter is read: at log lines and before every save, so that no checkpoint holds broken weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = ("latents", "text", "loss", "gradient norm")
NEVER = -1


class Meter:
    def __init__(self, device: torch.device, rank: int) -> None:
        self.rank = rank
        self._first_bad = torch.full((len(PARTS),), NEVER, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._num_losses = 0
        self._num_norms = 0

    def watch(self, part: str, value: Tensor, step: int) -> None:
        """Notes `step` if `value` (any shape) is not finite everywhere and nothing was noted before."""
        row = self._first_bad[PARTS.index(part)]  # a view
        is_bad = ~torch.isfinite(value.detach()).all() & (row == NEVER)
        row.copy_(torch.where(is_bad, step, row))

    def add_loss(self, loss: Tensor, step: int) -> None:
        self.watch("loss", loss, step)
        self._sums[0] += loss
        self._num_losses += 1

    def add_norm(self, norm: Tensor, step: int) -> None:
        self.watch("gradient norm", norm, step)
        self._sums[1] += norm
        self._num_norms += 1

    def check(self) -> None:
        """Raises FloatingPointError naming part, step and rank if anything was not finite. Waits for the device."""
        found = [(step, part) for part, step in zip(PARTS, self._first_bad.tolist(), strict=True) if step != NEVER]
        if found:
            step = min(step for step, _ in found)
            part = next(part for at, part in found if at == step)
            raise FloatingPointError(
                f"the {part} is not finite at step {step} on rank {self.rank}; nothing was saved since"
            )

    def state(self) -> dict[str, Any]:
        """The open interval's sums, plain values for a checkpoint; `restore` takes them back."""
        return {"sums": self._sums.tolist(), "num_losses": self._num_losses, "num_norms": self._num_norms}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums.copy_(torch.tensor(state["sums"], dtype=self._sums.dtype))
        self._num_losses, self._num_norms = state["num_losses"], state["num_norms"]

    def read(self) -> tuple[float, float]:
        """(mean loss, mean gradient norm) since the last read, after `check`. Waits for the device."""
        self.check()
        loss, norm = self._sums.tolist()
        means = loss / max(1, self._num_losses), norm / max(1, self._num_norms)
        self._sums.zero_()
        self._num_losses = self._num_norms = 0
        return means
