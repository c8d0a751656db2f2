"""What to generate: scenes (a caption and its boxes), read from a layout file or taken from a dataset.

A layout file holds one entry, or a list of entries:
    {"prompt": "a dog on a bench", "objects": [{"label": "dog", "bbox": [x0, y0, x1, y1]}]}
Boxes are xyxy, normalised to [0, 1], origin at the top left. Labels are category names of the checkpoint. An object may
have a "phrase", which says what the box holds in words (a label that is no category counts as one), a "scale", how
strongly the box counts, and "edit": true, where a given picture is drawn anew. An entry may have "height" and "width" in
pixels, where the picture is not the checkpoint's own square.
Every mistake is one ValueError that names the file, the entry, the object and the values.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from util.box_readings import XYXY, other_order
from engine.data.coco import make_layout
from engine.data.layout_formats import FileFormat, read_entries
from engine.data.phrases import needed_phrases
from models.config import MAX_SCALE, StructMARConfig
from util.boxes import plan_center_crop
from util.buckets import Size
from util.coco import CocoIndex
from util.read import require_text, short_repr
from util.types import UNKNOWN, Category, Layout

ENTRY_KEYS = ("prompt", "objects", "height", "width")
MAX_SIDE = 4096  # pixels
OBJECT_KEYS = ("label", "bbox", "phrase", "scale", "edit")
REQUIRED_KEYS = ("label", "bbox")
MAX_WORD = 60  # of a misspelt word that is compared with the known ones: the comparison is quadratic


@dataclass(frozen=True)
class Scene:
    """One image to generate. `names` are the labels drawn on the boxes, one for each box of `layout`. size: (height,
    width) in pixels; None: the model's own. edited: the boxes of a given picture that are drawn anew."""

    prompt: str
    layout: Layout
    names: list[str]
    size: Size | None = None
    edited: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.layout):
            raise ValueError(
                f"a scene needs one name per box, got {len(self.names)} names for {len(self.layout)} boxes"
            )

    def _says_more(self, index: int) -> bool:
        """Whether a box has a phrase other than a label that is one for want of a category."""
        phrase, is_unknown = self.layout.phrases[index], int(self.layout.categories[index]) == UNKNOWN
        return bool(phrase) and not (is_unknown and phrase == self.names[index])

    def to_dict(self) -> dict[str, Any]:
        """The scene as an entry of a layout file: `read_layout_file` gives it back."""
        boxes = [
            [float(str(value)) for value in box] for box in self.layout.boxes_xyxy.numpy()
        ]  # shortest exact decimals
        objects: list[dict[str, Any]] = [
            {"label": name, "bbox": box} for name, box in zip(self.names, boxes, strict=True)
        ]
        for index, item in enumerate(objects):
            if self.layout.phrases and self._says_more(index):
                item["phrase"] = self.layout.phrases[index]
            if self.layout.scales and self.layout.scales[index] is not None:
                item["scale"] = self.layout.scales[index]
            if index in self.edited:
                item["edit"] = True
        size = {} if self.size is None else {"height": self.size[0], "width": self.size[1]}
        return {"prompt": self.prompt, "objects": objects, **size}


    def with_scales(self, scales: Sequence[float], where: str) -> Scene:
        """The same with other strengths of its boxes. Raises ValueError, which names `where` the scene and the scales
        come from, unless there is one for each."""
        if len(scales) != len(self.layout):
            listed = " ".join(f"{scale:g}" for scale in scales)
            raise ValueError(f"{where}: {len(self.layout)} boxes need as many strengths, got {len(scales)} ({listed})")
        return replace(self, layout=replace(self.layout, scales=tuple(scales)))


def empty_layout() -> Layout:
    """No boxes: the image is generated from its caption (or class) alone."""
    return Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def text_scene(prompt: str) -> Scene:
    return Scene(prompt, empty_layout(), [])


@dataclass(frozen=True)
class KnownLabels:
    """What a model can place. has_phrases: whether it knows boxes by words, too."""

    categories: Sequence[Category]
    max_objects: int
    has_phrases: bool = False

    @staticmethod
    def of(config: StructMARConfig, categories: Sequence[Category]) -> KnownLabels:
        return KnownLabels(categories, config.max_objects, config.phrases)

    @property
    def indices(self) -> dict[str, int]:
        return {category.name: index for index, category in enumerate(self.categories)}


def read_layout_file(
    path: str | Path, known: KnownLabels, prompt: str | None = None, said: FileFormat | None = None
) -> list[Scene]:
    """The scenes of a layout file; `prompt`, where given, replaces every entry's own. Other projects' files are read
    too (layout_formats.py); said: which of them this is, where its keys are not to tell.

    Raises FileNotFoundError for a missing file, ValueError for whatever is wrong inside it.
    """
    names = [category.name for category in known.categories]
    found = read_entries(path, said, names, is_prompt_given=prompt is not None)
    return [read_entry(each.content, each.where, known, prompt) for each in found]


def scenes_from_dataset(
    index: CocoIndex, img_size: int, num_scenes: int, size: Size | None = None
) -> list[Scene]:
    """The first `num_scenes` images of a split that keep a box in the centre crop, each with its first caption. The crop
    is a square of `img_size`, or the scenes have another `size`, (height, width).

    Only the split's jsons are needed, not its images. Raises ValueError if it has fewer such images.
    """
    scenes: list[Scene] = []
    for image in index.images:
        crop = plan_center_crop(image.width, image.height, img_size if size is None else size)
        layout = make_layout(image, crop, False, index.filters, needed_phrases(image))
        if len(scenes) < num_scenes and len(layout) > 0:
            phrases = layout.phrases or ("",) * len(layout)
            named = zip(layout.categories.tolist(), phrases, strict=True)
            names = [phrase if category == UNKNOWN else index.categories[category].name for category, phrase in named]
            scenes.append(Scene(image.captions[0], layout, names, size))
    if len(scenes) < num_scenes:
        raise ValueError(f"{num_scenes} scenes were asked for, but {index.split} has {len(scenes)} images with boxes")
    return scenes


def read_entry(entry: Any, where: str, known: KnownLabels, prompt: str | None = None) -> Scene:
    """One entry of a layout file, wherever it comes from: errors begin with `where`. `prompt` replaces its own."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object with the keys {list(ENTRY_KEYS)}, got {short_repr(entry)}")
    _refuse_unknown_keys(entry, ENTRY_KEYS, where)
    prompt = entry.get("prompt") if prompt is None else prompt
    if prompt is None:
        raise ValueError(f"{where}: 'prompt' is missing; write it in the file or pass --prompt")
    require_text(prompt, f"{where}: 'prompt'")
    if prompt and not prompt.strip():
        raise ValueError(f"{where}: 'prompt' is blank, got {short_repr(prompt)}; an empty one (\"\") stands for no text")
    if "objects" not in entry:
        raise ValueError(f"{where}: 'objects' is missing; it lists {{'label': ..., 'bbox': [x0, y0, x1, y1]}}")
    objects = entry["objects"]
    if not isinstance(objects, list):
        raise ValueError(f"{where}: 'objects' must be a list, got {short_repr(objects)}")
    if len(objects) > known.max_objects:
        raise ValueError(f"{where}: {len(objects)} objects, but the checkpoint places at most {known.max_objects}")
    indices = known.indices
    parsed = [_read_object(item, f"{where}, object {i}", indices, known.has_phrases) for i, item in enumerate(objects)]
    size = _read_size(entry, where)
    if not parsed:
        return replace(text_scene(prompt), size=size)
    phrases, scales = tuple(item.phrase for item in parsed), tuple(item.scale for item in parsed)
    layout = Layout(
        torch.tensor([item.box for item in parsed], dtype=torch.float32),
        torch.tensor([indices.get(item.label, UNKNOWN) for item in parsed]),
        phrases if any(phrases) else (),
        scales if any(scale is not None for scale in scales) else (),
    )
    edited = tuple(index for index, item in enumerate(parsed) if item.is_edited)
    return Scene(prompt, layout, [item.label for item in parsed], size, edited)


def _read_size(entry: dict[str, Any], where: str) -> Size | None:
    """(height, width), or None where the entry says neither."""
    if "height" not in entry and "width" not in entry:
        return None
    for key in ("height", "width"):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIDE:
            raise ValueError(f"{where}: '{key}' must be a whole number of pixels from 1 to {MAX_SIDE}, got "
                             f"{short_repr(value)}")  # fmt: skip
    return entry["height"], entry["width"]


@dataclass(frozen=True)
class _Object:
    """One box as an entry states it. phrase: "" for none."""

    label: str
    box: list[float]
    phrase: str
    scale: float | None
    is_edited: bool


def _read_object(item: Any, where: str, indices: dict[str, int], has_phrases: bool) -> _Object:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: must be an object with the keys {list(REQUIRED_KEYS)}, got {short_repr(item)}")
    _refuse_unknown_keys(item, OBJECT_KEYS, where)
    for key in REQUIRED_KEYS:
        if key not in item:
            raise ValueError(f"{where}: '{key}' is missing, got {short_repr(item)}")
    label = item["label"]
    if not isinstance(label, str):
        raise ValueError(f"{where}: 'label' must be a string, got {short_repr(label)}")
    phrase = item.get("phrase", "")
    if not isinstance(phrase, str):
        raise ValueError(f"{where}: 'phrase' must be a string, got {short_repr(phrase)}")
    require_text(phrase, f"{where}: 'phrase'")
    if phrase and not has_phrases:
        raise ValueError(f"{where}: 'phrase' {short_repr(phrase)}, but these weights were trained without phrases")
    if label not in indices and not has_phrases:
        raise ValueError(f"{where}: unknown label {short_repr(label)}; {_suggest(label, list(indices))}")
    if label not in indices and not (phrase or label).strip():
        raise ValueError(f"{where}: 'label' is blank, got {short_repr(label)}")
    where = f"{where} ('{label}')"
    is_edited = item.get("edit", False)
    if not isinstance(is_edited, bool):
        raise ValueError(f"{where}: 'edit' must be true or false, got {short_repr(is_edited)}")
    own_phrase = phrase or (label if label not in indices else "")
    return _Object(label, read_box(item["bbox"], where), own_phrase, _read_scale(item, where), is_edited)


def _read_scale(item: dict[str, Any], where: str) -> float | None:
    """None where the object has no strength of its own."""
    if "scale" not in item:
        return None
    value = item["scale"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SCALE:
        raise ValueError(f"{where}: 'scale' must be a number in [0, {MAX_SCALE:g}], got {short_repr(value)}")
    return float(value)


def read_box(box: Any, where: str) -> list[float]:
    """x0, y0, x1, y1 in [0, 1] as float32 has them. Raises ValueError that begins with `where`."""
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{where}: 'bbox' must be four numbers [x0, y0, x1, y1], got {short_repr(box)}")
    for name, value in zip(("x0", "y0", "x1", "y1"), box, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: 'bbox' {name} must be a number, got {short_repr(value)} in {short_repr(box)}")
        if not 0 <= value <= 1:  # also refuses NaN
            raise ValueError(
                f"{where}: 'bbox' {name} = {short_repr(value)} is not in [0, 1] in {short_repr(box)}; "
                "boxes are fractions of the image's width and height"
            )
    x0, y0, x1, y1 = torch.tensor(box, dtype=torch.float32).tolist()
    other = other_order((x0, y0, x1, y1), XYXY)
    if x0 >= x1:
        raise ValueError(
            f"{where}: 'bbox' needs x0 < x1, got x0 = {box[0]}, x1 = {box[2]} in {short_repr(box)}; {other}"
        )
    if y0 >= y1:
        raise ValueError(
            f"{where}: 'bbox' needs y0 < y1, got y0 = {box[1]}, y1 = {box[3]} in {short_repr(box)}; {other}"
        )
    return [x0, y0, x1, y1]


def _refuse_unknown_keys(entry: dict[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {short_repr(key)}; {_suggest(key, list(allowed))}")


def _suggest(word: str, known: list[str]) -> str:
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:MAX_WORD].lower(), list(lowered), n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{lowered[name]}'" for name in close) + "?"
    listed = ", ".join(known[:100])
    return f"known: {listed}" + ("" if len(known) <= 100 else f", ... ({len(known)} in all)")
