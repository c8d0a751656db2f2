"""The public MAR code (a checkout of LTH14/mar) on our weights, our orders and our noise, unedited.

It is imported as it stands; while it runs, `Tensor.cuda` is the identity (the code asks for CUDA everywhere), and what
it draws comes from the given noise: `torch.randn` and `randn_like` (it draws for both halves of a guided batch and uses
the first), `torch.randint`, its order and its mask ratio. A slice of a schedule is run through its progress bar:
between two iterations the mask is set to what the skipped ones would have left.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from models.heads.diffloss import DiffusionNoise
from models.masking import TokenMask, mask_from_orders
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR

OWN_NAMES = ("models", "diffusion")  # its packages; the first is also ours
MARKER = Path("models/mar.py")


def load_baseline(path: Path) -> ModuleType:
    """Its module `models.mar`, imported past our package of the same name, which stays as it is.

    Raises FileNotFoundError if `path` is no checkout of LTH14/mar, ValueError if its code cannot be imported.
    """
    if not (path / MARKER).is_file():
        raise FileNotFoundError(f"--baseline {path} is no checkout of LTH14/mar: it has no {MARKER}")
    root = str(Path(__file__).parents[2])
    others = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != root]
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OWN_NAMES}
    for name in ours:
        del sys.modules[name]
    try:
        with mock.patch.object(sys, "path", [str(path), *others]):
            return importlib.import_module("models.mar")
    except Exception as error:  # foreign code may raise anything
        message = f"--baseline {path}: {MARKER} cannot be imported ({type(error).__name__}: {error})"
        raise ValueError(message) from error
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in OWN_NAMES]:
            del sys.modules[name]
        sys.modules.update(ours)


def build_baseline(
    module: ModuleType, model: StructMAR, num_sampling_steps: int = 100, share: bool = True
) -> nn.Module:
    """Its MAR with the weights of `model` (a bare MAR; strict), which are shared, or else copied. Without dropout."""
    config = model.config
    with torch.device("meta"):
        baseline = module.MAR(
            img_size=config.img_size,
            vae_stride=config.vae_stride,
            patch_size=config.patch_size,
            encoder_embed_dim=config.encoder_embed_dim,
            encoder_depth=config.encoder_depth,
            encoder_num_heads=config.encoder_num_heads,
            decoder_embed_dim=config.decoder_embed_dim,
            decoder_depth=config.decoder_depth,
            decoder_num_heads=config.decoder_num_heads,
            mlp_ratio=config.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            vae_embed_dim=config.vae_embed_dim,
            label_drop_prob=0.0,
            class_num=config.class_num,
            attn_dropout=0.0,
            proj_dropout=0.0,
            buffer_size=config.buffer_size,
            diffloss_d=config.diffloss_d,
            diffloss_w=config.diffloss_w,
            num_sampling_steps=str(num_sampling_steps),
            diffusion_batch_mul=config.diffusion_batch_mul,
        )
    state = {name: tensor if share else tensor.clone() for name, tensor in model.state_dict().items()}
    baseline.load_state_dict(state, strict=True, assign=True)
    return baseline.eval()


@contextmanager
def on_this_device() -> Iterator[None]:
    """`Tensor.cuda` is the identity in the block."""
    with mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self):
        yield


@torch.no_grad()
def sample_baseline(
    module: ModuleType,
    baseline: Any,
    labels: Tensor,
    orders: Tensor,
    noise_of: Callable[[int], Tensor],
    sampling: SamplingConfig,
    masked_counts: Sequence[int],
    iterations: Sequence[int],
) -> Tensor:
    """Its `sample_tokens`: [B, C, h, w]. noise_of(iteration): [S + 1, B * p, C]; masked_counts: of all iterations."""
    is_slice = len(iterations) < sampling.num_iter
    given = iter([noise for iteration in iterations for noise in noise_of(iteration)])

    def randn_like(x: Tensor) -> Tensor:
        drawn = next(given)  # [B * p, C]
        return drawn.repeat(len(x) // len(drawn), 1)

    with ExitStack() as patches:
        patches.enter_context(on_this_device())
        patches.enter_context(mock.patch.object(baseline, "sample_orders", return_value=orders))
        patches.enter_context(mock.patch.object(torch, "randn", side_effect=given))
        patches.enter_context(mock.patch.object(torch, "randn_like", randn_like))
        if is_slice:
            masks = _Slice(module.mask_by_order, orders, masked_counts, iterations)
            patches.enter_context(mock.patch.object(torch, "ones", masks.ones))
            patches.enter_context(mock.patch.object(module, "mask_by_order", masks.mask_by_order))
            patches.enter_context(mock.patch.object(module, "tqdm", masks.progress))
        return baseline.sample_tokens(
            len(orders),
            num_iter=sampling.num_iter,
            cfg=sampling.cfg_text,
            cfg_schedule=sampling.cfg_schedule,
            labels=labels,
            temperature=sampling.temperature,
            progress=is_slice,
        )


class _Slice:
    """Stands in for its progress bar and keeps hold of its mask, which it sets right before each chosen iteration."""

    def __init__(
        self, mask_by_order: Callable[..., Tensor], orders: Tensor, counts: Sequence[int], iterations: Sequence[int]
    ) -> None:
        self.original, self.new_ones = mask_by_order, torch.ones
        self.before = {i: mask_from_orders(orders, counts[i]).masked for i in iterations}  # [B, L]
        self.mask: Tensor | None = None

    def ones(self, *sizes: Any) -> Tensor:
        """The first ones it makes are its first mask."""
        made = self.new_ones(*sizes)
        self.mask = made if self.mask is None else self.mask
        return made

    def mask_by_order(self, *args: Any) -> Tensor:
        self.mask = self.original(*args)
        return self.mask

    def progress(self, _indices: Iterable[int]) -> Iterator[int]:
        for iteration, wanted in self.before.items():
            assert self.mask is not None and self.mask.shape == wanted.shape
            self.mask.copy_(wanted)
            yield iteration


def baseline_loss(
    baseline: Any, latents: Tensor, labels: Tensor, orders: Tensor, mask: TokenMask, noise: DiffusionNoise
) -> Tensor:
    """Its training loss, a scalar with a graph. noise: a row for every token, M copies: [M * B * L]."""
    ratio = mock.Mock(rvs=lambda _: [mask.num_masked / mask.masked.shape[1]])
    with ExitStack() as patches:
        patches.enter_context(on_this_device())
        patches.enter_context(mock.patch.object(baseline, "sample_orders", return_value=orders))
        patches.enter_context(mock.patch.object(baseline, "mask_ratio_generator", ratio))
        patches.enter_context(mock.patch.object(torch, "randint", return_value=noise.timesteps))
        patches.enter_context(mock.patch.object(torch, "randn_like", return_value=noise.noise))
        return baseline(latents, labels)
