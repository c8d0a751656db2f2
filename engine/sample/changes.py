"""What is asked of a given picture: a mask, boxes, objects to be repainted, moved or removed, a margin to be painted.

Masks and boxes to keep say to the pixel what is drawn anew. Everything else goes by whole cells, the squares that are
hidden and drawn as one token: those that a box touches. Around these the picture passes, over one cell, into what is
drawn.

Shape letters: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from engine.data.scenes import Scene, read_box
from engine.sample.editing import Edit, cell_of, require_fitting_picture
from engine.sample.holes import Box, hole_of_boxes, hole_of_cells, known_cells
from models.config import StructMARConfig
from util.images import Picture
from util.read import short_repr
from util.types import Layout

WAYS = ("mask", "edit_boxes", "keep_boxes", "outpaint", "move", "remove")


@dataclass(frozen=True)
class Move:
    """An object and where it goes. name: its label, with ":n" where several objects have it, the first is 1. Raises
    ValueError for what is no box."""

    name: str
    box: Box

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", tuple(read_box(list(self.box), f"move {short_repr(self.name)}")))


@dataclass(frozen=True)
class Changes:
    """What is drawn anew, said in one way; moves and removals count as one. Said in none, it is the objects that the
    layout marks with "edit", or all of them where it marks none.

    mask: bool [H, W], True is drawn. edit_boxes, keep_boxes: drawn inside, or outside. remove: names as in `Move`.
    outpaint: cells left, above, right and below of the picture, which is shrunk into the rest.
    keep_pixels: whether what is not drawn anew is shown as it was, or as its tokens say it.
    Raises ValueError for two ways.
    """

    mask: np.ndarray | None = None
    edit_boxes: Sequence[Box] = ()
    keep_boxes: Sequence[Box] = ()
    outpaint: tuple[int, int, int, int] | None = None
    move: Sequence[Move] = ()
    remove: Sequence[str] = ()
    keep_pixels: bool = True

    def __post_init__(self) -> None:
        if len(self.ways) > 1 and set(self.ways) != {"move", "remove"}:
            raise ValueError(f"say in one way what is drawn anew, got {' and '.join(self.ways)}")
        if self.outpaint is not None and min(self.outpaint) < 0:
            raise ValueError(f"outpaint must be cells from 0 on, got {list(self.outpaint)}")

    @property
    def ways(self) -> list[str]:
        """The names of what is given."""
        return [name for name in WAYS if vars(self)[name] is not None and len(vars(self)[name])]

    def of(self, config: StructMARConfig, scene: Scene, picture: Picture, where: str) -> tuple[Scene, Edit]:
        """What a picture becomes: the scene that is drawn, and the picture with its hole. config: of the model that
        draws. scene: the picture's caption and boxes as they are now; of a margin: as they will be.

        Raises ValueError that begins with `where` for what does not fit the picture, its objects or the model.
        """
        if scene.edited and self.ways and not (self.move or self.remove):
            raise ValueError(f"{where}: the layout marks what to edit, and so does {self.ways[0]}: use one of them")
        if self.outpaint is not None:
            return scene, self._margin(config, scene, picture, where)
        require_fitting_picture(config, picture, where)
        size, cell = picture.shape[:2], cell_of(config)
        try:
            if self.mask is not None:
                return scene, Edit(picture, self.mask, keep_pixels=self.keep_pixels)
            if self.keep_boxes:
                return scene, Edit(picture, ~hole_of_boxes(self.keep_boxes, size), keep_pixels=self.keep_pixels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        scene, boxes = (scene, self.edit_boxes) if self.edit_boxes else self._of_objects(scene, where)
        return scene, self._edit(picture, hole_of_cells(boxes, size, cell), cell, where)

    def _of_objects(self, scene: Scene, where: str) -> tuple[Scene, list[Box]]:
        """The scene that is drawn, and the boxes of what changes, before and after."""
        own: list[Box] = [tuple(box) for box in scene.layout.boxes_xyxy.tolist()]
        if not own:
            raise ValueError(f"{where}: there is no object to draw anew, the layout has no boxes")
        goals: dict[int, Box | None] = {}
        for name, box in [(move.name, move.box) for move in self.move] + [(name, None) for name in self.remove]:
            index = object_of(scene, name, where)
            if index in goals:
                raise ValueError(f"{where}: {name!r} is moved or removed twice")
            goals[index] = box
        changed = {*goals, *scene.edited} or set(range(len(own)))
        boxes = [own[index] for index in sorted(changed)] + [box for box in goals.values() if box is not None]
        return with_goals(scene, goals), boxes

    def _edit(self, picture: Picture, hole: np.ndarray, cell: int, where: str) -> Edit:
        """hole: whole cells."""
        if not bool(known_cells(hole, cell).any()):
            raise ValueError(
                f"{where}: what is drawn anew, and one cell of {cell} px on all sides, leaves nothing of the image"
            )
        try:
            return Edit(picture, hole, feather=cell, keep_pixels=self.keep_pixels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _margin(self, config: StructMARConfig, scene: Scene, picture: Picture, where: str) -> Edit:
        """The picture in the middle of a margin of whole cells."""
        assert self.outpaint is not None, "a margin is asked for"
        cell, (height, width) = cell_of(config), scene.size or (config.img_size, config.img_size)
        require_fitting_picture(config, np.zeros((height, width, 3), dtype=np.uint8), f"{where}: what is painted")
        left, top, right, bottom = (cells * cell for cells in self.outpaint)
        inner = width - left - right, height - top - bottom
        if min(inner) < cell:
            raise ValueError(
                f"{where}: outpaint {' '.join(map(str, self.outpaint))} leaves nothing of {width // cell}x"
                f"{height // cell} cells"
            )
        own = picture.shape[1], picture.shape[0]
        if abs(inner[0] * own[1] - inner[1] * own[0]) >= cell * own[0]:
            raise ValueError(
                f"{where}: outpaint leaves {inner[0]}x{inner[1]} px for an image of {own[0]}x{own[1]} px: choose a "
                f"margin, or a size, that leaves its proportions"
            )
        canvas, hole = np.full((height, width, 3), 255, dtype=np.uint8), np.ones((height, width), dtype=bool)
        inside = slice(top, height - bottom), slice(left, width - right)
        canvas[inside] = np.asarray(Image.fromarray(picture).resize(inner, Image.Resampling.BICUBIC))
        hole[inside] = False
        return self._edit(canvas, hole, cell, where)


def object_of(scene: Scene, name: str, where: str) -> int:
    """The index of the object with this name: a label, with ":n" for the n-th of several. Raises ValueError naming the
    scene's objects where there is none, or more than one."""
    label, colon, number = name.rpartition(":")
    if not colon or not number.isdecimal():
        label, number = name, ""
    found = [index for index, own in enumerate(scene.names) if own == label]
    if not found:
        raise ValueError(f"{where}: no object {label!r}, there are {', '.join(map(repr, scene.names)) or 'none'}")
    if not number and len(found) > 1:
        raise ValueError(f"{where}: {len(found)} objects are {label!r}: say {label}:1 to {label}:{len(found)}")
    if number and not 1 <= int(number) <= len(found):
        raise ValueError(f"{where}: no object {name!r}, {len(found)} of the objects are {label!r}")
    return found[int(number) - 1 if number else 0]


def with_goals(scene: Scene, goals: Mapping[int, Box | None]) -> Scene:
    """The scene with objects, by index, in other boxes, or without them."""
    layout = scene.layout
    kept = [index for index in range(len(layout)) if goals.get(index, ()) is not None]
    boxes = layout.boxes_xyxy.clone()  # [n, 4]
    for index, box in goals.items():
        if box is not None:
            boxes[index] = torch.tensor(box, dtype=torch.float32)
    phrases = tuple(layout.phrases[index] for index in kept) if layout.phrases else ()
    scales = tuple(layout.scales[index] for index in kept) if layout.scales else ()
    rest = Layout(boxes[kept], layout.categories[kept], phrases, scales)
    edited = tuple(place for place, index in enumerate(kept) if index in scene.edited)
    return replace(scene, layout=rest, names=[scene.names[index] for index in kept], edited=edited)
