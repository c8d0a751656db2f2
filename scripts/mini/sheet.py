"""Scenes in cells, with their boxes and captions: what scripts/mini/contact_sheet.py draws."""

from __future__ import annotations

import argparse

import cv2
import numpy as np
from numpy.typing import NDArray

from scripts.mini.drawing import CLASSES
from scripts.mini.scenes import Scene, render_scene, render_single

_CAPTION_HEIGHT = 34


def draw_cell(scene: Scene, cell: int, show_boxes: bool) -> NDArray[np.uint8]:
    """A scene enlarged to `cell` pixels, with its last caption below: [cell + 34, cell, 3] uint8 RGB."""
    scale = cell / scene.image.shape[0]
    picture = cv2.resize(scene.image, (cell, cell), interpolation=cv2.INTER_NEAREST)
    for item in scene.objects if show_boxes else ():
        x, y, width, height = (value * scale for value in item.bbox)
        corners = (round(x), round(y)), (round(x + width) - 1, round(y + height) - 1)
        cv2.rectangle(picture, corners[0], corners[1], (255, 0, 255), 1)
        cv2.putText(
            picture, item.name, (corners[0][0] + 2, corners[0][1] + 10), cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1
        )
    strip = np.full((_CAPTION_HEIGHT, cell, 3), 255, dtype=np.uint8)
    letters = max(cell // 6, 1)
    words = scene.captions[-1]
    for row in range(2):
        text = words[row * letters : (row + 1) * letters]
        cv2.putText(strip, text, (2, 13 + 15 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([picture, strip])


def run(args: argparse.Namespace) -> None:
    """Draws and writes the sheet."""
    scenes = []
    for index in range(args.num_scenes):
        rng = np.random.default_rng((args.seed, index))
        scenes.append(
            render_single(rng, CLASSES[index % len(CLASSES)].id, args.size)
            if args.single
            else render_scene(rng, args.size)
        )
    cells = [draw_cell(scene, args.cell, args.boxes) for scene in scenes]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % args.columns)
    sheet = np.concatenate(
        [np.concatenate(cells[i : i + args.columns], axis=1) for i in range(0, len(cells), args.columns)]
    )
    if not cv2.imwrite(str(args.output), sheet[..., ::-1]):
        raise OSError(f"could not write {args.output}")
    print(f"wrote {args.output}")
