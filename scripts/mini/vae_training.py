"""The training of scripts/mini/train_vae.py, which says what it does."""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.frozen.vae import LOGVAR_RANGE, LatentCodec, VaeConfig, build_autoencoder, ldm_checkpoint
from scripts.mini.autoencoder_training import (
    evaluate,
    pixel_losses,
    psnr,
    state_file,
    train_autoencoder,
    weighted,
)
from scripts.mini.training import image_paths, load_images, to_float
from util.checkpoint import save_atomic
from util.rng import derive_seed, generator


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
    parts = pixel_losses(output, images) | {"kl": kl_divergence(mean, logvar)}
    weights = {"l1": 1.0, "mse": args.mse_weight, "edge": args.edge_weight, "kl": args.kl_weight}
    return weighted(parts, weights), parts


def train(args: argparse.Namespace, images: Tensor, config: VaeConfig) -> AutoencoderKL:
    """images: uint8 [n, 3, H, W] -> the averaged autoencoder. Continues from the state beside the output, if any."""
    torch.manual_seed(derive_seed(args.seed, "vae", "init"))  # layer initialisers know no other generator
    autoencoder = build_autoencoder(config)
    if args.init is not None:
        codec = LatentCodec.load(args.init)
        if codec.config != config:
            raise ValueError(f"{args.init} has {codec.config}, asked for {config}")
        autoencoder.load_state_dict(codec.autoencoder.state_dict())

    def loss_of(network: AutoencoderKL, batch: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return vae_loss(network, batch, args, rng)

    return train_autoencoder(args, "vae", autoencoder, images, loss_of)


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
    print(f"held-out: MSE {mse:.5f} on [-1, 1], PSNR {psnr(mse):.2f} dB; pairs in {figure}")
    print(f"{args.output}: {size:.2f} MiB, {sum(p.numel() for p in averaged.parameters()):,} parameters, id {codec.id}")
