"""Entries of other projects' layout files, made into ours: a prompt and objects with a label and an xyxy box in [0, 1].

    format           prompt          labels and boxes
    bbox             the .txt file   {"label", "bbox"}, one a line, beside a picture
    gligen           prompt          phrases, locations
    diffusers        prompt          gligen_phrases, gligen_boxes
    creatilayout     global_caption  region_caption_list, region_bboxes_list; detail_region_caption_list are phrases
    instancediffusion  caption       annos: category_name, caption (a phrase beside it), bbox; width, height
    layoutgpt        prompt          object_list: [label, box] each; with query_id
    nsr1k            prompt          object_list, or obj1 and obj2; with image_id

An entry's width and height say what its pixels are shares of, not how large a picture is wanted.
Left out: masks, points and scribbles, image prompts, and every key that does not say where what is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from util.box_readings import XYWH, XYWH_PX, XYXY, BoxReading, read_box
from util.buckets import Size
from util.read import short_repr
from util.sidecar_files import BOX_KEYS, category_name

Entry = dict[str, Any]
Convert = Callable[[Entry, str, Collection[str]], Entry]


@dataclass(frozen=True)
class LayoutFormat:
    """name: of --layout_format. title: in messages. marks: keys that tell it from the others. reading: of its boxes.

    convert: an entry, where it stands (errors begin with it) and the names of categories -> an entry of ours.
    keys: all that it reads.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    reading: BoxReading
    convert: Convert
    keys: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return f"{self.title}'s (boxes {self.reading.words})"


def listed(entry: Entry, key: str, where: str) -> list[Any]:
    """Raises ValueError unless the entry has a list under the key."""
    if key not in entry:
        raise ValueError(f"{where}: '{key}' is missing, there are {short_repr(sorted(entry))}")
    if not isinstance(entry[key], list):
        raise ValueError(f"{where}: '{key}' must be a list, got {short_repr(entry[key])}")
    return list(entry[key])


def with_prompt(entry: Entry, key: str, objects: list[Entry]) -> Entry:
    """An entry of ours; without a prompt where this one has none."""
    return ({"prompt": entry[key]} if key in entry else {}) | {"objects": objects}


def from_lists(labels_key: str, boxes_key: str, prompt_key: str, title: str, phrases_key: str = "") -> Convert:
    """A `convert` for formats with a list of labels and one of boxes."""

    def convert(entry: Entry, where: str, names: Collection[str]) -> Entry:
        labels, boxes = listed(entry, labels_key, where), listed(entry, boxes_key, where)
        phrases = listed(entry, phrases_key, where) if phrases_key in entry else [""] * len(labels)
        for key, values in ((boxes_key, boxes), (phrases_key, phrases)):
            if len(values) != len(labels):
                raise ValueError(
                    f"{where}: '{labels_key}' has {len(labels)} entries and '{key}' {len(values)}: each needs its own"
                )
        objects = []
        for index, (label, value, phrase) in enumerate(zip(labels, boxes, phrases, strict=True)):
            box = read_box(value, _object(where, index, label), boxes_key, XYXY, (title, ""))
            objects.append({"label": category_name(label, names), "bbox": box})
            if phrase != "":
                objects[-1]["phrase"] = phrase
        return with_prompt(entry, prompt_key, objects)

    return convert


def from_gligen(entry: Entry, where: str, names: Collection[str]) -> Entry:
    """Boxes that GLIGEN grounds by a picture instead of words are refused."""
    mask = entry.get("text_mask")
    if "images" in entry or (isinstance(mask, list) and 0 in mask):
        raise ValueError(f"{where}: 'images' and 'text_mask' ground boxes by pictures: only 'phrases' can be read")
    return from_lists("phrases", "locations", "prompt", "GLIGEN")(entry, where, names)


def from_annos(entry: Entry, where: str, names: Collection[str]) -> Entry:
    """Of InstanceDiffusion: pixels of a picture whose size the entry says."""
    canvas = _canvas(entry, where)
    objects: list[Entry] = []
    for index, anno in enumerate(listed(entry, "annos", where)):
        own = f"{where}, annos[{index}]"
        if not isinstance(anno, dict) or "bbox" not in anno:
            raise ValueError(f"{own}: must be an object with a 'bbox', got {short_repr(anno)}")
        category, caption = anno.get("category_name", ""), anno.get("caption", "")
        label = category if category != "" else caption
        if label == "":
            raise ValueError(f"{own}: neither 'category_name' nor 'caption' says what the box holds")
        box = read_box(anno["bbox"], _object(where, index, label), "bbox", XYWH_PX, ("InstanceDiffusion", ""), canvas)
        objects.append({"label": category_name(label, names), "bbox": box})
        if category != "" and caption != "":
            objects[-1]["phrase"] = caption
    return with_prompt(entry, "caption", objects)


def _canvas(entry: Entry, where: str) -> Size:
    """(height, width) in pixels."""
    for key in ("height", "width"):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 2**31:
            raise ValueError(f"{where}: '{key}' of the picture, in pixels, is needed for 'bbox', got {short_repr(value)}")
    return entry["height"], entry["width"]


def from_object_list(title: str, reading: BoxReading, twin: str) -> Convert:
    """A `convert` for LayoutGPT's answers and NSR-1K's references, which share a key and differ in its boxes."""

    def convert(entry: Entry, where: str, names: Collection[str]) -> Entry:
        if "obj1" in entry or "obj2" in entry:
            pairs: list[tuple[str, Any]] = [(key, entry[key]) for key in ("obj1", "obj2") if key in entry]
        else:
            pairs = [(f"object_list[{i}]", pair) for i, pair in enumerate(listed(entry, "object_list", where))]
        objects = []
        for index, (key, pair) in enumerate(pairs):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{where}: '{key}' must be a label and a box, got {short_repr(pair)}")
            box = read_box(pair[1], _object(where, index, pair[0]), key, reading, (title, twin))
            objects.append({"label": category_name(pair[0], names), "bbox": box})
        return with_prompt(entry, "prompt", objects)

    return convert


def _object(where: str, index: int, label: Any) -> str:
    return f"{where}, object {index} ({short_repr(label)})"


def _as_it_is(entry: Entry, where: str, names: Collection[str]) -> Entry:
    return entry


OURS = LayoutFormat("structmar", "StructMAR", ("objects",), XYXY, _as_it_is)
SIDECAR = LayoutFormat("bbox", "a .bbox file", ("label", "bbox"), XYXY, _as_it_is, BOX_KEYS)
GLIGEN = LayoutFormat("gligen", "GLIGEN", ("phrases", "locations"), XYXY, from_gligen,
                      ("prompt", "phrases", "locations", "alpha_type", "text_mask"))  # fmt: skip
DIFFUSERS = LayoutFormat(
    "diffusers", "diffusers", ("gligen_phrases", "gligen_boxes"), XYXY,
    from_lists("gligen_phrases", "gligen_boxes", "prompt", "diffusers"), ("prompt", "gligen_phrases", "gligen_boxes"),
)  # fmt: skip
CREATILAYOUT = LayoutFormat(
    "creatilayout", "CreatiLayout", ("region_caption_list", "region_bboxes_list", "global_caption"), XYXY,
    from_lists("region_caption_list", "region_bboxes_list", "global_caption", "CreatiLayout",
               "detail_region_caption_list"),
    ("global_caption", "region_caption_list", "region_bboxes_list", "detail_region_caption_list"),
)  # fmt: skip
INSTANCEDIFFUSION = LayoutFormat(
    "instancediffusion", "InstanceDiffusion", ("annos",), XYWH_PX, from_annos, ("caption", "annos", "width", "height")
)
LAYOUTGPT = LayoutFormat("layoutgpt", "LayoutGPT", ("query_id",), XYXY, from_object_list("LayoutGPT", XYXY, "NSR-1K"),
                         ("prompt", "object_list", "query_id"))  # fmt: skip
NSR1K = LayoutFormat("nsr1k", "NSR-1K", ("image_id", "obj1", "obj2"), XYWH, from_object_list("NSR-1K", XYWH, "LayoutGPT"),
                     ("prompt", "object_list", "obj1", "obj2", "image_id"))  # fmt: skip
JSON_FORMATS = (OURS, SIDECAR, GLIGEN, DIFFUSERS, CREATILAYOUT, INSTANCEDIFFUSION, LAYOUTGPT, NSR1K)
