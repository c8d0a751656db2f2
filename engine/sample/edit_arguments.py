"""The arguments of a pipeline call that say what of a given picture is drawn anew, checked and made into edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from engine.data.scenes import Scene, read_box
from engine.sample.changes import Changes, Move
from engine.sample.editing import Edit
from engine.sample.holes import hole_of_mask
from engine.sample.inputs import CallOptions, listed
from models.config import StructMARConfig
from util.images import Picture
from util.read import short_repr


class EditOptions(TypedDict, total=False):
    """What of `image` is drawn anew. Of a list of prompts, `outpaint` and `keep_pixels` are for all, the others one for
    all pictures (`mask`), or a list with one for each prompt."""

    mask: Any
    edit: Any
    edit_boxes: Any
    keep_boxes: Any
    move: Any
    remove: Any
    outpaint: tuple[int, int, int, int] | None
    keep_pixels: bool


class CallArguments(CallOptions, EditOptions):
    """What a call may name beside its own parameters."""


def edit_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of a call that are of an edit, and the others."""
    own = {name: value for name, value in options.items() if name in EditOptions.__annotations__}
    return own, {name: value for name, value in options.items() if name not in own}


def read_edits(
    config: StructMARConfig, scenes: Sequence[Scene], image: Any, options: Mapping[str, Any], is_single: bool
) -> tuple[list[Scene], list[Edit] | None]:
    """The scenes that are drawn, one per prompt, and what their pictures keep; None without an image.

    is_single: the call has one prompt, not a list. Raises ValueError naming the argument and what is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None and name != "keep_pixels"}
    keep_pixels = options.get("keep_pixels", True)
    if not isinstance(keep_pixels, bool):
        raise ValueError(f"keep_pixels must be True or False, got {keep_pixels!r}")
    if image is None:
        if given or not keep_pixels:
            raise ValueError(f"{next(iter(given), 'keep_pixels')} needs image, the picture to draw anew")
        return list(scenes), None
    count = len(scenes)
    pictures = [_picture(each) for each in _each("image", image, count, is_array=True)]
    masks = _each("mask", given.get("mask"), count, is_array=True)
    parts = {name: [given.get(name)] if is_single else _each(name, given.get(name), count) for name in _PER_PROMPT}
    drawn, edits = [], []
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        own = {name: values[number] for name, values in parts.items()}
        where = "the image" if is_single else f"prompt {number}: the image"
        changes = Changes(
            mask=None if masks[number] is None else _hole(masks[number]),
            edit_boxes=_boxes("edit_boxes", own["edit_boxes"]),
            keep_boxes=_boxes("keep_boxes", own["keep_boxes"]),
            outpaint=_margin(given.get("outpaint")),
            move=_moves(own["move"]),
            remove=_names(own["remove"]),
            keep_pixels=keep_pixels,
        )
        scene = replace(scene, edited=_edited(own["edit"], len(scene.layout)))
        changed = changes.of(config, scene, picture, where)
        drawn.append(changed[0])
        edits.append(changed[1])
    return drawn, edits


_PER_PROMPT = ("edit", "edit_boxes", "keep_boxes", "move", "remove")


def _each(name: str, value: Any, count: int, is_array: bool = False) -> list[Any]:
    """One for each prompt; is_array: what is no list or tuple is for all."""
    if value is None or (is_array and not isinstance(value, list | tuple)):
        return [value] * count
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{name} must be one for each of the {count} prompts, got {short_repr(value)}")
    return list(value)


def _picture(image: Any) -> Picture:
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return picture


def _hole(mask: Any) -> np.ndarray:
    hole = np.asarray(mask.convert("RGB") if isinstance(mask, Image.Image) else mask)
    if hole.dtype == np.uint8 and hole.ndim == 3:
        hole = hole_of_mask(hole)
    if hole.dtype != np.bool_ or hole.ndim != 2:
        raise ValueError(f"mask must be a picture, or bool [H, W], got {hole.dtype} {list(hole.shape)}")
    return hole


def _boxes(name: str, value: Any) -> list[list[float]]:
    boxes = [] if value is None else listed(value)
    if not isinstance(boxes, list):
        raise ValueError(f"{name} must be a list of boxes [x0, y0, x1, y1], got {short_repr(value)}")
    return [read_box(listed(box), f"{name}, box {number}") for number, box in enumerate(boxes)]


def _moves(value: Any) -> list[Move]:
    if value is None:
        return []
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"move must be like {{'dog:1': [x0, y0, x1, y1]}}, got {short_repr(value)}")
    return [Move(name, read_box(listed(box), f"move {short_repr(name)}")) for name, box in value.items()]


def _names(value: Any) -> list[str]:
    names = [] if value is None else listed(value)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"remove must be a list like ['dog:1'], got {short_repr(value)}")
    return names


def _margin(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    cells = listed(value)
    if not isinstance(cells, list) or len(cells) != 4 or not all(type(each) is int for each in cells):
        raise ValueError(
            f"outpaint must be four whole numbers of cells, left top right bottom, got {short_repr(value)}"
        )
    return cells[0], cells[1], cells[2], cells[3]


def _edited(value: Any, num_boxes: int) -> tuple[int, ...]:
    flags = [] if value is None else listed(value)
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"edit must be True or False for each box, got {short_repr(value)}")
    if value is not None and len(flags) != num_boxes:
        raise ValueError(f"{num_boxes} boxes need as many values of edit, got {len(flags)}")
    return tuple(index for index, flag in enumerate(flags) if flag)
