"""The training of scripts/mini/train_vae.py, which says what it does."""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from models.frozen.vae import LOGVAR_RANGE, LatentCodec, VaeConfig, build_autoencoder, ldm_checkpoint
from scripts.mini.training import (
    batch_indices,
    image_paths,
    learning_rate,
    load_images,
    load_state,
    save_state,
    to_float,
)
from util.checkpoint import save_atomic
from util.rng import derive_seed, generator


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of vertical and of horizontal neighbours."""
    return images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    pairs = zip(edges(output), edges(target), strict=True)
    return torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over the latents' elements."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def vae_loss(
    autoencoder: AutoencoderKL, images: Tensor, args: argparse.Namespace, rng: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """images: [B, 3, H, W] in [-1, 1] -> (loss, its parts)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        hidden = autoencoder.quant_conv(autoencoder.encoder(images))
    mean, logvar = hidden.float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    noise, extra = torch.randn(2, *mean.shape, generator=rng)
    strength = args.latent_noise * torch.rand(len(mean), 1, 1, 1, generator=rng) * mean.detach().std()
    latents = mean + (0.5 * logvar).exp() * noise + strength * extra
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        output = autoencoder.decoder(autoencoder.post_quant_conv(latents))
    error = output.float() - images
    parts = {
        "l1": error.abs().mean(),
        "mse": error.square().mean(),
        "edge": edge_loss(output.float(), images),
        "kl": kl_divergence(mean, logvar),
    }
    weights = {"l1": 1.0, "mse": args.mse_weight, "edge": args.edge_weight, "kl": args.kl_weight}
    return sum((weights[name] * part for name, part in parts.items()), torch.zeros(())), parts


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    flipped = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def train(args: argparse.Namespace, images: Tensor, config: VaeConfig) -> AutoencoderKL:
    """images: uint8 [n, 3, H, W] -> the averaged autoencoder. Continues from the state beside the output, if any."""
    torch.manual_seed(derive_seed(args.seed, "vae", "init"))  # layer initialisers know no other generator
    autoencoder = build_autoencoder(config)
    if args.init is not None:
        codec = LatentCodec.load(args.init)
        if codec.config != config:
            raise ValueError(f"{args.init} has {codec.config}, asked for {config}")
        autoencoder.load_state_dict(codec.autoencoder.state_dict())
    autoencoder = autoencoder.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(autoencoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    state_path, settings = state_file(args.output), resumable_settings(args)
    start = 0
    if state := load_state(state_path, settings):
        start = state["step"]
        autoencoder.load_state_dict(state["model"])
        averaged.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"continuing from {state_path} at step {start}", flush=True)
    began = time.time()
    for step in range(start, args.steps):
        rng = generator(args.seed, "vae", "step", step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        indices = batch_indices(step, len(images), args.batch_size, args.seed, "vae")
        loss, parts = vae_loss(autoencoder, to_float(random_flip(images[indices], rng)), args, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        rate = min(args.ema_rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(autoencoder.parameters()), 1 - rate)
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}: {parts}")
            numbers = " ".join(f"{name} {value.item():.5f}" for name, value in parts.items())
            speed = (time.time() - began) / (done - start)
            print(f"step {done}/{args.steps} loss {loss.item():.5f} {numbers} {speed:.3f} s/step", flush=True)
        if done % args.save_freq == 0 and done < args.steps:
            parts_of_state = {"model": autoencoder.state_dict(), "ema": averaged.state_dict()}
            save_state(state_path, settings, done, optimizer=optimizer.state_dict(), **parts_of_state)
    return averaged


def state_file(output: Path) -> Path:
    return output.with_suffix(".state.pth")


def resumable_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with the one that was cut off."""
    free = {"data", "output", "init", "save_freq", "log_freq", "overwrite", "debug"}
    return {key: value for key, value in vars(args).items() if key not in free}


@torch.no_grad()
def latent_statistics(autoencoder: AutoencoderKL, images: Tensor) -> tuple[float, str]:
    """images: uint8 [n, 3, H, W] -> (std of the sampled latents, a line about channels and posterior noise)."""
    autoencoder.eval()
    moments = [autoencoder.quant_conv(autoencoder.encoder(to_float(part))) for part in images.split(64)]
    mean, logvar = torch.cat(moments).chunk(2, dim=1)
    posterior = (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp()
    noise = torch.randn(mean.shape, generator=generator(0, "vae", "statistics"))
    std = (mean + posterior * noise).std().item()
    channels = mean.std(dim=(0, 2, 3))
    by_channel = f"std of the means by channel {channels.min():.3f} to {channels.max():.3f}"
    noise_to_signal = (posterior.square().mean() / mean.var()).sqrt().item()
    return std, f"{by_channel}; posterior noise / signal {noise_to_signal:.3f}; overall mean {mean.mean():.3f}"


def evaluate(codec: LatentCodec, images: Tensor, figure: Path) -> float:
    """images: uint8 [n, 3, H, W] -> mean squared error of decode(mode(encode)) on [-1, 1]; writes pairs to `figure`."""
    outputs = [codec.decode(codec.mode(codec.encode(to_float(part)))) for part in images.split(64)]
    output = torch.cat(outputs)
    rows = []
    for start in range(0, min(48, len(images)) // 12 * 12 or len(images), 12):
        for tensor in (images[start : start + 12], ((output[start : start + 12] + 1) * 127.5).round().to(torch.uint8)):
            rows.append(np.concatenate(list(tensor.permute(0, 2, 3, 1).numpy()), axis=1))
    width = rows[0].shape[1]
    picture = Image.fromarray(np.concatenate([row for row in rows if row.shape[1] == width], axis=0))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(figure)
    return (output - to_float(images)).square().mean().item()


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if args.output.is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    images = load_images(image_paths(args.data / "train2017")[: args.max_images])
    held_out = load_images(image_paths(args.data / "val2017")[:512])
    config = VaeConfig(tuple(args.widths), 1, args.latent_channels, False, False, args.groups)
    averaged = train(args, images, config)
    std, line = latent_statistics(averaged, images[:2048])
    latent_scale = round(1 / std, 4)
    save_atomic(ldm_checkpoint(averaged, latent_scale, torch.float16), args.output)
    state_file(args.output).unlink(missing_ok=True)
    codec = LatentCodec.load(args.output)
    figure = args.output.with_suffix(".png")
    mse = evaluate(codec, held_out, figure)
    size = args.output.stat().st_size / 2**20
    print(f"latent std {std:.4f} -> latent_scale {latent_scale}; {line}")
    print(f"held-out: MSE {mse:.5f} on [-1, 1], PSNR {10 * math.log10(4 / mse):.2f} dB; pairs in {figure}")
    print(f"{args.output}: {size:.2f} MiB, {sum(p.numel() for p in averaged.parameters()):,} parameters, id {codec.id}")
