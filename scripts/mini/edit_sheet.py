"""Edits side by side: the picture with its boxes, the cells that are drawn anew, the picture afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from engine.data.scenes import KnownLabels, Scene, empty_layout, read_layout_file
from engine.sample.changes import Changes, Move
from engine.sample.editing import Edit, cell_of, starts_of_edits
from engine.sample.grid import caption_bands
from engine.sample.holes import known_cells
from engine.sample.pipeline import StructMARPipeline
from util.distributed import init_distributed
from util.images import WHITE, Picture, draw_boxes, make_grid, save_png
from util.types import Category

VEIL = 0.25  # how much is left of a cell that is drawn anew
GAP = 8
FONT_SIZE = 15


@dataclass(frozen=True)
class Shown:
    """One row. before, after: the scenes of the pictures; edit: what was drawn anew, of cells of `cell` px."""

    before: Scene
    original: Picture
    edit: Edit
    cell: int
    after: Scene
    picture: Picture
    caption: str


def hidden_pixels(edit: Edit, cell: int) -> np.ndarray:
    """bool [H, W]: the pixels of the cells, of `cell` px, that are drawn anew."""
    shape = edit.hole.shape[0] // cell, edit.hole.shape[1] // cell
    return np.asarray(~known_cells(edit.hole, cell).numpy().reshape(shape)).repeat(cell, 0).repeat(cell, 1)


def veiled(edit: Edit, cell: int) -> Picture:
    """The picture with white over what is drawn anew, and a grid of cells in it."""
    hidden = hidden_pixels(edit, cell)
    light = VEIL * edit.picture + (1 - VEIL) * np.array(WHITE)
    return np.where(hidden[..., None], light, edit.picture).round().astype(np.uint8)


def sheet(rows: Sequence[Shown], side: int = 192) -> Picture:
    """Three pictures a row, each enlarged to about `side` px, what was asked for below."""
    cells = []
    for row in rows:
        first = draw_boxes(row.original, row.before.layout.boxes_xyxy, row.before.names, side)
        last = draw_boxes(row.picture, row.after.layout.boxes_xyxy, row.after.names, side)
        hidden = cv2.resize(veiled(row.edit, row.cell), first.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        gap = np.full((first.shape[0], GAP, 3), WHITE, dtype=np.uint8)
        cells.append(np.concatenate([first, gap, hidden, gap, last], axis=1))
    bands = caption_bands([row.caption for row in rows], cells[0].shape[1], FONT_SIZE)
    return make_grid([np.concatenate(pair) for pair in zip(cells, bands, strict=True)], 1, pad=GAP)


@dataclass(frozen=True)
class Example:
    """entry: of the layout file. says: what it is called in the sheet."""

    entry: int
    says: str
    changes: Changes
    prompt: str | None = None  # None: as before
    replaced: tuple[int, str] | None = None  # an object, and the label that takes its place

    def wanted(self, scene: Scene, categories: Sequence[Category]) -> Scene:
        """The scene that is asked for, of the picture's."""
        scene = scene if self.prompt is None else replace(scene, prompt=self.prompt)
        if self.changes.outpaint is not None:
            return replace(scene, layout=empty_layout(), names=[])
        if self.replaced is None:
            return scene
        index, label = self.replaced
        labels = {category.name: place for place, category in enumerate(categories)}
        chosen = scene.layout.categories.clone()
        chosen[index] = labels[label]
        names = [label if place == index else name for place, name in enumerate(scene.names)]
        return replace(scene, layout=replace(scene.layout, categories=chosen), names=names, edited=(index,))


EXAMPLES = (
    Example(0, "moved: --move kite 0.05 0.05 0.35 0.4", Changes(move=[Move("kite", (0.05, 0.05, 0.35, 0.4))])),
    Example(1, "removed: --remove clock", Changes(remove=["clock"]), "a blue vase and an orange on a wooden table"),
    Example(
        3,
        'repainted: "edit": true on an orange in place of the donut',
        Changes(),
        "a green apple, a banana and an orange on a checked cloth",
        (2, "orange"),
    ),
    Example(
        2, "outpainted: --outpaint 2 2 2 2", Changes(outpaint=(2, 2, 2, 2)), "a stop sign in front of a brick wall"
    ),
)


def run(args: argparse.Namespace) -> None:
    """Draws, edits, and writes the sheet. Raises ValueError or FileNotFoundError."""
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = init_distributed(args.device).device
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device,
        max_text_tokens=args.max_text_tokens,
    )  # fmt: skip
    assert pipeline.identity is not None, "weights of a file say what they were made for"
    config, categories = pipeline.model.config, pipeline.identity.categories
    scenes = read_layout_file(args.layout, KnownLabels.of(config, categories))
    before = pipeline.draw(scenes, pipeline.own_sampling, [args.seed] * len(scenes))
    wanted = [example.wanted(scenes[example.entry], categories) for example in EXAMPLES]
    changed = [
        example.changes.of(config, scene, before[example.entry], example.says)
        for example, scene in zip(EXAMPLES, wanted, strict=True)
    ]
    starts = starts_of_edits(pipeline.model, pipeline.codec, [edit for _, edit in changed])
    after = pipeline.draw(
        [scene for scene, _ in changed], pipeline.own_sampling, [args.seed] * len(starts), starts=starts
    )
    rows = [
        Shown(scenes[example.entry], before[example.entry], edit, cell_of(config), scene, picture, example.says)
        for example, (scene, edit), picture in zip(EXAMPLES, changed, after, strict=True)
    ]
    save_png(sheet(rows, args.side), args.output)
    print(f"wrote {args.output}")
