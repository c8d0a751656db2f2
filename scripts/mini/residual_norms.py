"""What scripts/mini/norm_growth.py measures, and its figure.

Shape letters: B images, L tokens (or codes that are hidden one by one), K buffer slots, D width, H heads, n = K + L,
d head width.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from engine.checkpoint.kept import kept_checkpoints
from engine.data.coco import CocoLayoutDataset, DataConfig, collate
from engine.data.inputs import CocoInputs, DropRates, StepInputs
from engine.sample.pipeline import StructMARPipeline
from models.blocks import Block
from models.masking import TokenMask, mask_from_orders, sample_orders
from models.structmar import StructMAR
from util.extras import import_extra
from util.images import save_png
from util.output import write_text_atomic
from util.plots import COLOURS, LEGEND_HEIGHT, PANEL_SIZE, new_figure, picture_of, style_axes
from util.rng import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = "structmar-mini-norms-1"
Runs = Mapping[str, Sequence["Reading"]]


@dataclass(frozen=True)
class Reading:
    """Of a checkpoint's pass, a number for each block: norms, the root mean square of the residual stream behind it
    (over images, positions and channels); logits, its largest attention logit."""

    step: int
    norms: tuple[float, ...]
    logits: tuple[float, ...]


def run(args: argparse.Namespace) -> None:
    """Writes norms.json and norms.png. Raises ValueError or FileNotFoundError."""
    import_extra("matplotlib", "plots")
    torch.set_num_threads(args.num_threads)
    runs = {name: read_run(folder, args) for name, folder in named_folders(args.runs).items()}
    told = {"format": FORMAT, "num_images": args.num_images, "hidden_share": args.hidden_share, "seed": args.seed}
    content = {**told, "runs": {name: [asdict(each) for each in readings] for name, readings in runs.items()}}
    write_text_atomic(args.output_dir / "norms.json", json.dumps(content, indent=1) + "\n")
    save_png(picture_of(growth_figure(runs)), args.output_dir / "norms.png")
    print(args.output_dir / "norms.png")


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR -> folders by name. Raises ValueError for another form, a name twice, or more than there are colours."""
    folders: dict[str, Path] = {}
    for each in given:
        name, _, folder = each.partition("=")
        if not name or not folder:
            raise ValueError(f"--runs takes NAME=DIR, got {each!r}")
        if name in folders:
            raise ValueError(f"--runs names {name} twice: {folders[name]} and {folder}")
        folders[name] = Path(folder)
    if len(folders) > len(COLOURS):
        raise ValueError(f"--runs takes at most {len(COLOURS)} runs, got {len(folders)}: {', '.join(folders)}")
    return folders


def read_run(folder: Path, args: argparse.Namespace) -> list[Reading]:
    """Of each kept checkpoint, by step. Raises FileNotFoundError if there is none."""
    kept = kept_checkpoints(folder)
    if not kept:
        raise FileNotFoundError(f"{folder} has no checkpoints of single steps: train with --keep_every")
    readings = []
    for step, path in sorted(kept.items()):
        parts = StructMARPipeline.from_checkpoint(
            path, args.vae_path, args.clip_path, use_ema=False, max_text_tokens=args.max_text_tokens
        )
        inputs = held_out_inputs(parts, args.coco_root, args.coco_split, args.num_images)
        mask = fixed_mask(args.num_images, math.prod(parts.model.config.unit_grid()), args.hidden_share, args.seed)
        readings.append(read_blocks(parts.model, inputs, mask, step))
    return readings


def held_out_inputs(parts: StructMARPipeline, coco_root: Path, split: str, num_images: int) -> StepInputs:
    """The first scenes as training sees them, but for drops and flips. Raises ValueError if there are fewer."""
    config = parts.model.config
    data = DataConfig(str(coco_root), split, config.img_size, hflip_prob=0.0, max_objects=config.max_objects)
    dataset = CocoLayoutDataset.from_config(data)
    if len(dataset) < num_images:
        raise ValueError(f"--num_images {num_images}, but {coco_root} {split} has {len(dataset)} images")
    batch = collate(config.max_objects)([dataset[item] for item in range(num_images)])
    rates = DropRates(0.0, 0.0, 0.0)
    make = CocoInputs(parts.codec, parts.caption_encoder, rates, data.seed, parts.model.fake_latent.device)
    return make(batch, 0, generator(data.seed, "norms", "drop"))


def fixed_mask(num_images: int, num_tokens: int, hidden_share: float, seed: int) -> TokenMask:
    """A share of every image's tokens, at least one, at places that only the seed decides."""
    orders = sample_orders(num_images, num_tokens, [generator(seed, "norms", "mask")])  # [B, L]
    return mask_from_orders(orders, max(1, round(hidden_share * num_tokens)))


@torch.no_grad()
def read_blocks(model: StructMAR, inputs: StepInputs, mask: TokenMask, step: int = 0) -> Reading:
    """One pass of the backbone, its blocks in the order in which they run. The model must be in eval mode."""
    assert not model.training, "dropout would change what is measured"
    norms: list[float] = []
    logits: list[float] = []

    def note(block: nn.Module, given: tuple[Tensor, ...], x: Tensor) -> None:
        norms.append(x.float().square().mean().sqrt().item())
        logits.append(largest_logit(cast(Block, block), given[0], given[1]))

    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        grid = model.grid_of(inputs.latents)
        given = (inputs.labels, inputs.text, inputs.layout, grid, inputs.sizes)
        conditions = model.embed_conditions(len(inputs), *given)
        model.predict(model.patchify(inputs.latents), mask.kept_ids(), model.prepare(conditions))
    finally:
        for hook in hooks:
            hook.remove()
    return Reading(step, tuple(norms), tuple(logits))


def largest_logit(block: Block, x: Tensor, angles: Tensor | None) -> float:
    """Over images, heads and pairs of positions. x: [B, n, D], what the block is given; angles: [B or 1, n, d/2]."""
    rotation = None if angles is None else block.attn.rotation(angles)
    q, k, _ = block.attn.project(x if block.is_post else block.norm1(x), rotation)  # each [B, H, n, d]
    return (q @ k.transpose(-1, -2)).max().item() / math.sqrt(q.shape[-1])


def growth_figure(runs: Runs) -> Figure:
    """Norms and logits over depth at each run's last checkpoint, and over steps: norms of the last block, logits of the
    block that has the largest."""
    panels: list[tuple[str, Callable[[Sequence[Reading]], tuple[Sequence[int], Sequence[float]]]]] = [
        ("residual stream behind block 1, 2, ..., RMS at the end", lambda of: _over_depth(of[-1].norms)),
        ("residual stream behind the last block, RMS over steps", lambda of: _over_steps(of, lambda x: x.norms[-1])),
        ("largest attention logit in block 1, 2, ..., at the end", lambda of: _over_depth(of[-1].logits)),
        ("largest attention logit of all blocks, over steps", lambda of: _over_steps(of, lambda x: max(x.logits))),
    ]
    figure = new_figure(2 * PANEL_SIZE[0], 2 * PANEL_SIZE[1] + LEGEND_HEIGHT)
    colours = dict(zip(runs, COLOURS, strict=False))
    for axes, (title, points) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        style_axes(axes, title)
        _scale_by_factors(axes)
        for name, readings in runs.items():
            axes.plot(*points(readings), color=colours[name], linewidth=2, marker="o", markersize=4)
    handles = [axes.plot([], [], color=colour, linewidth=3, label=name)[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=11)
    return figure


def _scale_by_factors(axes: Axes) -> None:
    """A logarithmic y with plain numbers at 1, 2 and 5 times the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(import_extra("matplotlib.ticker", "plots").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _over_depth(values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    return range(1, len(values) + 1), values


def _over_steps(
    readings: Sequence[Reading], value: Callable[[Reading], float]
) -> tuple[Sequence[int], Sequence[float]]:
    return [each.step for each in readings], [value(each) for each in readings]
