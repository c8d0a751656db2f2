"""What the trainers of the mini world's image tokenizers share: losses on pixels, the loop, what is measured.

Shape letters: B batch, H x W pixels.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.frozen.base import ImageCodec
from scripts.mini.training import batch_indices, learning_rate, load_state, save_state, to_float
from util.rng import generator

Network = TypeVar("Network", bound=nn.Module)
LossOf = Callable[[Network, Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""(network in training, images [B, 3, H, W] in [-1, 1], this step's generator) -> (loss, its parts)."""


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of vertical and of horizontal neighbours."""
    return images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    pairs = zip(edges(output), edges(target), strict=True)
    return torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()


def pixel_losses(output: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Means over the elements of what separates two batches of images."""
    error = output.float() - images
    return {"l1": error.abs().mean(), "mse": error.square().mean(), "edge": edge_loss(output.float(), images)}


def weighted(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return sum((weights[name] * part for name, part in parts.items()), torch.zeros(()))


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    flipped = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def train_autoencoder(
    args: argparse.Namespace,
    purpose: str,
    network: Network,
    images: Tensor,
    loss_of: LossOf[Network],
    after_step: Callable[[Network, Network, int, torch.Generator], None] | None = None,
) -> Network:
    """images: uint8 [n, 3, H, W] -> the averaged network. Continues from the state beside the output, if any.

    purpose: separates the random numbers of one trainer from another's. after_step: called with the network, its
    average, the steps done and the step's generator.
    """
    network = network.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    state_path, settings = state_file(args.output), resumable_settings(args)
    start = 0
    if state := load_state(state_path, settings):
        start = state["step"]
        network.load_state_dict(state["model"])
        averaged.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"continuing from {state_path} at step {start}", flush=True)
    began = time.time()
    for step in range(start, args.steps):
        rng = generator(args.seed, purpose, "step", step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        indices = batch_indices(step, len(images), args.batch_size, args.seed, purpose)
        loss, parts = loss_of(network, to_float(random_flip(images[indices], rng)), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate = min(args.ema_rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - rate)
        done = step + 1
        if after_step is not None:
            after_step(network, averaged, done, rng)
        if done % args.log_freq == 0 or done == args.steps:
            _log(args, loss, parts, done, (time.time() - began) / (done - start))
        if done % args.save_freq == 0 and done < args.steps:
            parts_of_state = {"model": network.state_dict(), "ema": averaged.state_dict()}
            save_state(state_path, settings, done, optimizer=optimizer.state_dict(), **parts_of_state)
    return averaged


def _log(args: argparse.Namespace, loss: Tensor, parts: dict[str, Tensor], done: int, seconds: float) -> None:
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"loss is {loss.item()} at step {done - 1}: {parts}")
    numbers = " ".join(f"{name} {value.item():.5f}" for name, value in parts.items())
    print(f"step {done}/{args.steps} loss {loss.item():.5f} {numbers} {seconds:.3f} s/step", flush=True)


def state_file(output: Path) -> Path:
    return output.with_suffix(".state.pth")


def resumable_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with the one that was cut off."""
    free = {"data", "output", "init", "save_freq", "log_freq", "overwrite", "debug"}
    return {key: value for key, value in vars(args).items() if key not in free}


def reconstructed(codec: ImageCodec, images: Tensor) -> Tensor:
    """images: uint8 [n, 3, H, W] -> decode(mode(encode)), [n, 3, H, W] in [-1, 1]."""
    return torch.cat([codec.decode(codec.mode(codec.encode(to_float(part)))) for part in images.split(64)])


def evaluate(codec: ImageCodec, images: Tensor, figure: Path) -> float:
    """images: uint8 [n, 3, H, W] -> mean squared error of reconstructions on [-1, 1]; writes pairs to `figure`."""
    output = reconstructed(codec, images)
    rows = []
    for start in range(0, min(48, len(images)) // 12 * 12 or len(images), 12):
        for tensor in (images[start : start + 12], ((output[start : start + 12] + 1) * 127.5).round().to(torch.uint8)):
            rows.append(np.concatenate(list(tensor.permute(0, 2, 3, 1).numpy()), axis=1))
    width = rows[0].shape[1]
    picture = Image.fromarray(np.concatenate([row for row in rows if row.shape[1] == width], axis=0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(figure)
    return (output - to_float(images)).square().mean().item()


def psnr(mse: float) -> float:
    """In decibels, of a mean squared error on [-1, 1]."""
    return 10 * math.log10(4 / mse)
