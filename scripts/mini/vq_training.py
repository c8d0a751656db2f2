"""The training of scripts/mini/train_vq.py, which says what it does.

Shape letters: B batch, H x W pixels, h x w codes, K codes, e channels of a code, n features.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.frozen.codec import load_codec
from models.frozen.codes import CodeCodec
from models.frozen.vae import LatentCodec, ldm_name
from models.frozen.vq import VqAutoencoder, VqConfig, build_vq, llamagen_checkpoint, nearest_codes
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

KMEANS_FEATURES = 16384
KMEANS_ROUNDS = 12


class VqInTraining(nn.Module):
    """The autoencoder, and how often each code was used since codes were last restarted."""

    uses: Tensor

    def __init__(self, autoencoder: VqAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.features: Tensor | None = None  # [n, e] of the latest batch
        self.register_buffer("uses", torch.zeros(autoencoder.codebook_size, dtype=torch.int64))  # [K]

    @property
    def rows(self) -> nn.Parameter:
        return self.autoencoder.quantize.embedding.weight

    def quantised(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [n, e] -> (codes [n], the unit rows nearest to them [n, e]); counts the uses."""
        rows = functional.normalize(self.rows, dim=1)  # [K, e]
        codes = nearest_codes(features.detach(), rows.detach())  # [n]
        self.uses += torch.bincount(codes, minlength=len(rows))
        self.features = features.detach()
        return codes, rows[codes]


def unit_features(autoencoder: VqAutoencoder, images: Tensor) -> Tensor:
    """images: [B, 3, H, W] in [-1, 1] -> unit vectors [B, h, w, e]."""
    return functional.normalize(autoencoder.features_of(images).float().permute(0, 2, 3, 1), dim=3)


def vq_loss(network: VqInTraining, images: Tensor, args: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """images: [B, 3, H, W] in [-1, 1] -> (loss, its parts)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        features = unit_features(network.autoencoder, images)  # [B, h, w, e]
    _, rows = network.quantised(features.flatten(0, 2))  # [n, e]
    rows = rows.view(features.shape)  # [B, h, w, e]
    passed = features + (rows - features).detach()  # [B, h, w, e]: the rows; their gradient is the features'
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        output = network.autoencoder.pixels_of_rows(passed.permute(0, 3, 1, 2))  # [B, 3, H, W]
    parts = pixel_losses(output, images) | {
        "vq": (rows - features.detach()).square().mean(),
        "commit": (features - rows.detach()).square().mean(),
    }
    weights = {"l1": 1.0, "mse": args.mse_weight, "edge": args.edge_weight, "vq": 1.0, "commit": args.commit_weight}
    return weighted(parts, weights), parts


@torch.no_grad()
def restart_unused(network: VqInTraining, averaged: VqInTraining, rng: torch.Generator) -> None:
    """Codes that nothing used take the place of features of the latest batch, in the average as well. Counts begin
    anew."""
    assert network.features is not None, "a step comes before a restart"
    unused = (network.uses == 0).nonzero()[:, 0]  # [.]
    chosen = torch.randint(len(network.features), (len(unused),), generator=rng)  # [.]
    for each in (network, averaged):
        each.rows.data[unused] = network.features[chosen]
        each.uses.zero_()


@torch.no_grad()
def spherical_kmeans(features: Tensor, num_clusters: int, rng: torch.Generator) -> Tensor:
    """Unit features [n, e] -> unit centres [K, e]; an empty cluster takes the place of a feature drawn at random.

    Raises ValueError for fewer features than clusters.
    """
    if len(features) < num_clusters:
        raise ValueError(f"{num_clusters} codes need as many features to start from, the images give {len(features)}")
    centres = features[torch.randperm(len(features), generator=rng)[:num_clusters]]  # [K, e]
    for _ in range(KMEANS_ROUNDS):
        nearest = nearest_codes(features, centres)  # [n]
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)  # [K, e]
        empty = torch.bincount(nearest, minlength=num_clusters) == 0  # [K]
        sums[empty] = features[torch.randint(len(features), (int(empty.sum()),), generator=rng)]
        centres = functional.normalize(sums, dim=1)  # [K, e]
    return centres


def warm_start(autoencoder: VqAutoencoder, codec: LatentCodec) -> int:
    """Copies what a KL VAE has under the same name and in the same shape, levels counted from the image; how many
    parameters that were."""
    own_levels, levels = (len(each.config.block_out_channels) for each in (autoencoder, codec.autoencoder))
    there = {ldm_name(name, levels): tensor for name, tensor in codec.autoencoder.state_dict().items()}
    copied = 0
    for name, tensor in autoencoder.state_dict().items():
        found = there.get(ldm_name(name, own_levels))
        if found is not None and found.shape == tensor.shape:
            tensor.copy_(found)
            copied += tensor.numel()
    return copied


def start(args: argparse.Namespace, images: Tensor) -> VqInTraining:
    """images: uint8 [n, 3, H, W] -> the network before its first step."""
    torch.manual_seed(derive_seed(args.seed, "vq", "init"))  # layer initialisers know no other generator
    config = VqConfig(tuple(args.widths), 1, args.latent_channels, args.codes, args.code_dim, False, False, False,
                      args.groups)  # fmt: skip
    autoencoder = build_vq(config)
    copied = warm_start(autoencoder, LatentCodec.load(args.init))
    rng = generator(args.seed, "vq", "kmeans")
    chosen = torch.randperm(len(images), generator=rng)[:256]
    with torch.no_grad():
        features = torch.cat([unit_features(autoencoder, to_float(part)).flatten(0, 2)
                              for part in images[chosen].split(64)])  # fmt: skip
    kept = features[torch.randperm(len(features), generator=rng)[:KMEANS_FEATURES]]
    autoencoder.quantize.embedding.weight.data = spherical_kmeans(kept, args.codes, rng)
    total = sum(parameter.numel() for parameter in autoencoder.parameters())
    print(f"{copied:,} of {total:,} parameters start as in {args.init}", flush=True)
    return VqInTraining(autoencoder)


def train(args: argparse.Namespace, images: Tensor) -> VqAutoencoder:
    """images: uint8 [n, 3, H, W] -> the averaged autoencoder. Continues from the state beside the output, if any."""

    def loss_of(network: VqInTraining, batch: Tensor, _rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return vq_loss(network, batch, args)

    def after_step(network: VqInTraining, averaged: VqInTraining, done: int, rng: torch.Generator) -> None:
        if done % args.restart_freq == 0 and done < args.steps * args.restart_until:
            restart_unused(network, averaged, rng)

    averaged = train_autoencoder(args, "vq", start(args, images), images, loss_of, after_step)
    return averaged.autoencoder


def code_usage(codec: CodeCodec, images: Tensor) -> tuple[float, float]:
    """images: uint8 [n, 3, H, W] -> (share of the codes that occur, perplexity: the exponential of their entropy)."""
    codes = torch.cat([codec.encode(to_float(part)) for part in images.split(64)]).long()
    counts = torch.bincount(codes.flatten(), minlength=codec.codebook_size).double()
    shares = counts[counts > 0] / counts.sum()
    return (counts > 0).double().mean().item(), (-(shares * shares.log()).sum()).exp().item()


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if args.output.is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    images = load_images(image_paths(args.data / "train2017")[: args.max_images])
    held_out = load_images(image_paths(args.data / "val2017")[:512])
    autoencoder = train(args, images)
    rows = autoencoder.quantize.embedding.weight
    rows.data = functional.normalize(rows.data, dim=1)
    save_atomic(llamagen_checkpoint(autoencoder, torch.float32), args.output)
    state_file(args.output).unlink(missing_ok=True)
    codec = load_codec(args.output)
    assert isinstance(codec, CodeCodec)
    figure = args.output.with_suffix(".png")
    mse, (used, perplexity) = evaluate(codec, held_out, figure), code_usage(codec, held_out)
    size = args.output.stat().st_size / 2**20
    print(f"held-out: MSE {mse:.5f} on [-1, 1], PSNR {psnr(mse):.2f} dB; pairs in {figure}")
    print(f"codes used {100 * used:.1f} % of {codec.codebook_size}, perplexity {perplexity:.0f}")
    parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    print(f"{args.output}: {size:.2f} MiB, {parameters:,} parameters, id {codec.id}")
