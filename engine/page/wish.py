"""What somebody at the page asks for: read from JSON, checked before anything is drawn.

    {"scene": an entry of a layout file, "seed": 0, "num_images": 1, "precision": "fp32",
     "options": {"num_iter": 16, ...},                       # fields of SamplingConfig; those missing: the page's own
     "edit": {"picture": base64, "boxes": [[x0, y0, x1, y1], ...]}}   # or null: what is drawn anew of which picture

Every mistake is one ValueError that names the field and the values.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.data.scenes import KnownLabels, Scene, read_box, read_entry
from engine.page.limits import MAX_EDIT_BOXES, MAX_IMAGES, MAX_PAGE_SEED, MAX_PHRASE, MAX_PIXELS, MAX_TEXT
from engine.sample.changes import Changes
from engine.sample.editing import Edit
from engine.sample.holes import Box
from models.config import PRECISIONS, StructMARConfig
from models.sampling.config import SamplingConfig, require_options_of
from util.images import Picture
from util.picture_files import content_size, decode_image
from util.plain import from_plain
from util.read import require_text, short_repr

FIELDS = ("scene", "seed", "num_images", "precision", "options", "edit")
QUESTION_FIELDS = ("prompt", "seed")
EDIT_FIELDS = ("picture", "boxes")


@dataclass(frozen=True)
class Wish:
    """Pictures of one scene with the seeds `seed`, `seed` + 1, ... edited: the boxes that are drawn anew in `edit`."""

    scene: Scene
    seed: int
    num_images: int
    config: SamplingConfig
    precision: str
    edit: Edit | None = None
    edited: tuple[Box, ...] = ()


def read_wish(body: Any, own: SamplingConfig, known: KnownLabels, config: StructMARConfig) -> Wish:
    """own: the options that count where the wish names none. known: what the model can place; config: of the model."""
    _require_fields(body, "a request", FIELDS, required=("scene",))
    scene = read_page_scene(body["scene"], known)
    seed, num_images = body.get("seed", 0), body.get("num_images", 1)
    require_whole("seed", seed, 0, MAX_PAGE_SEED)
    require_whole("num_images", num_images, 1, MAX_IMAGES)
    precision = body.get("precision", "fp32")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {short_repr(precision)}")
    options = read_options(body.get("options", {}), own)
    if body.get("edit") is None:
        return Wish(scene, seed, num_images, options, precision)
    picture, boxes = read_page_edit(body["edit"])
    _, edit = Changes(edit_boxes=boxes).of(config, scene, picture, "edit")
    return Wish(scene, seed, num_images, options, precision, edit, boxes)


def read_question(body: Any) -> tuple[str, int]:
    """A caption that a layout is to be proposed for, and the seed of that."""
    _require_fields(body, "a question", QUESTION_FIELDS, required=("prompt",))
    prompt, seed = require_text(body["prompt"], "the prompt"), body.get("seed", 0)
    require_short_text(prompt, "the prompt", MAX_TEXT)
    require_whole("seed", seed, 0, MAX_PAGE_SEED)
    return prompt, seed


def read_page_scene(entry: Any, known: KnownLabels) -> Scene:
    """An entry of a layout file, of no more text than a page needs."""
    scene = read_entry(entry, "layout", known)
    require_short_text(scene.prompt, "the prompt", MAX_TEXT)
    for name in (*scene.names, *scene.layout.phrases):
        require_short_text(name, "what a box holds", MAX_PHRASE)
    return scene


def read_options(given: Any, own: SamplingConfig) -> SamplingConfig:
    """`own` with the fields that are given. Raises ValueError for those of another head, too."""
    if not isinstance(given, Mapping):
        raise ValueError(f"options must be names and values, got {short_repr(given)}")
    for name, value in given.items():
        if isinstance(value, str):
            require_short_text(value, name, MAX_TEXT)
    head = given.get("head", own.head)
    if head != own.head:
        raise ValueError(f"these are options of the {short_repr(head)} head, the model has the {own.head} head")
    plain = asdict(own)
    require_options_of(own.head, [name for name, value in given.items() if name in plain and value != plain[name]])
    return from_plain(SamplingConfig, plain | dict(given), "options")


def read_page_edit(value: Any) -> tuple[Picture, tuple[Box, ...]]:
    """A picture, and the boxes of it that are drawn anew."""
    _require_fields(value, "edit", EDIT_FIELDS, required=EDIT_FIELDS)
    boxes = value["boxes"]
    if not isinstance(boxes, list) or not 1 <= len(boxes) <= MAX_EDIT_BOXES:
        raise ValueError(f"edit: boxes must be a list of 1 to {MAX_EDIT_BOXES} boxes, got {short_repr(boxes)}")
    read = tuple(tuple(float(str(np.float32(end))) for end in read_box(box, "edit")) for box in boxes)  # short decimals
    return decode_picture(decode_base64(value["picture"], "edit: picture"), "edit: picture"), read


def decode_base64(text: Any, where: str) -> bytes:
    """Raises ValueError that begins with `where`."""
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{where} must be base64, got {short_repr(text)}") from error


def decode_picture(content: bytes, name: str) -> Picture:
    """uint8 [H, W, 3]. Raises ValueError naming it for what is no picture, or has more than `MAX_PIXELS`: its header
    says so before it is decoded."""
    width, height = content_size(content, name)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width}x{height} pixels, at most {MAX_PIXELS / 1e6:.0f} million are opened")
    return np.asarray(decode_image(content, name))


def require_short_text(text: str, what: str, limit: int) -> None:
    """Raises ValueError, beginning with `what`, for more characters, and for what is no text."""
    require_text(text, what)
    if len(text) > limit:
        raise ValueError(f"{what} has {len(text)} characters, at most {limit} are taken")


def require_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises ValueError unless it is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in {low} ... {high}, got {short_repr(value)}")


def _require_fields(value: Any, where: str, allowed: tuple[str, ...], required: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with the keys {list(allowed)}, got {short_repr(value)}")
    for name in value:
        if name not in allowed:
            raise ValueError(f"{where}: unknown key {short_repr(name)}, known are {list(allowed)}")
    for name in required:
        if name not in value:
            raise ValueError(f"{where}: {name} is missing")
