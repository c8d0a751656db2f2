"""What the mini world's trainers share: images in memory, keyed batches, a schedule, and state that survives a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from util.checkpoint import load_plain, save_atomic
from util.rng import generator


def image_paths(folder: Path) -> list[Path]:
    """The images of a folder, sorted by name. Raises FileNotFoundError if there is none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: make them with python -m scripts.mini.make_dataset")
    return paths


def load_images(paths: list[Path]) -> Tensor:
    """-> uint8 [n, 3, H, W]. Raises ValueError naming the first image of another size than the first one's."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"{path} has shape {arrays[-1].shape}, {paths[0]} has {arrays[0].shape}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1], channels last in memory."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def batch_indices(step: int, length: int, batch_size: int, seed: int, purpose: str) -> Tensor:
    """The indices [batch_size] of a step, a function of its arguments alone: epochs are permutations, tails dropped."""
    if batch_size > length:
        raise ValueError(f"batch size {batch_size} exceeds the {length} images")
    per_epoch = length // batch_size
    order = torch.randperm(length, generator=generator(seed, purpose, "order", step // per_epoch))
    start = step % per_epoch * batch_size
    return order[start : start + batch_size]


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.02) -> float:
    """Linear warmup, then a cosine from `peak` to `final * peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def state_file(output: Path) -> Path:
    """Where the state of an unfinished training lies: beside the folder that it writes in the end."""
    return output.with_name(output.name + ".state.pth")


def save_state(path: Path, settings: Mapping[str, Any], step: int, **parts: dict[str, Any]) -> None:
    """Writes everything the next step depends on: settings, number of steps done, and state dicts by name."""
    save_atomic({"settings": dict(settings), "step": step, **parts}, path)


def load_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The saved state, or None if there is none. Raises ValueError naming a setting that differs, with both values."""
    if not path.is_file():
        return None
    state = load_plain(path)
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            stored = state["settings"].get(key)
            raise ValueError(f"{path} was written with {key}={stored}, not {value}: repeat that, or delete the file")
    return state


def continue_training(path: Path, settings: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> int:
    """The step to begin with: behind that of the state at `path`, which is put back, or 0 where there is none. Raises
    ValueError as `load_state` does."""
    state = load_state(path, settings)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing from {path} at step {state['step']}", flush=True)
    step: int = state["step"]
    return step


def take_step(model: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
    """One optimizer step, with gradients of a norm of at most 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
