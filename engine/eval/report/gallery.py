"""The gallery of the evaluation report: which cases are shown, and a picture with its wanted and detected boxes.

Boxes are SVG over the embedded picture, so they stay crisp at any size. Wanted and detected differ in colour (blue and
orange of Okabe and Ito's palette, told apart with every common colour blindness), in stroke and in where labels go.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.eval.report.charts import format_number
from util.images import Picture
from util.labels import Corners, place_labels
from util.rng import generator

Entry = dict[str, Any]  # one line of per_image.jsonl
PictureOf = Callable[[Entry], Picture | None]
Plate = Corners[float]

CASES = 8  # of each kind: 24 pictures for a row
VIEW = 256.0  # width of the drawing; lengths below are in its units
FONT = 11.0
CHAR_WIDTH = 0.57 * FONT  # of a system font, on average
PLATE_HEIGHT = FONT + 4
MAX_PNG_SIDE = 300  # px; larger pictures are embedded as JPEG
MAX_SIDE = 640  # px; larger pictures are embedded smaller
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Cases:
    """Best, worst and random entries of one row, at most `CASES` each, no image twice in a list."""

    best: tuple[Entry, ...]
    worst: tuple[Entry, ...]
    random: tuple[Entry, ...]


@dataclass(frozen=True)
class _Box:
    corners: Plate  # in drawing units
    label: str
    is_wanted: bool


def choose_cases(entries: Sequence[Entry], row: str) -> Cases:
    """Cases of `row` by mIoU, ties by image id, then seed. Images without a mIoU (nothing wanted) are left out.

    The random ones depend on the row's name and its entries only, not on their order or on how well they went.
    """
    scored = [entry for entry in entries if entry["row"] == row and np.isfinite(_miou(entry))]
    by_image = sorted(scored, key=lambda entry: (entry["image_id"], entry["seed"]))
    best = sorted(by_image, key=lambda entry: -_miou(entry))
    worst = sorted(by_image, key=_miou)
    order = torch.randperm(len(by_image), generator=generator("report cases", row)).tolist()
    return Cases(_first(best), _first(worst), _first([by_image[index] for index in order]))


def _miou(entry: Entry) -> float:
    return float("nan") if entry["mIoU"] is None else float(entry["mIoU"])


def _first(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    chosen: dict[int, Entry] = {}
    for entry in entries:
        if len(chosen) == CASES:
            break
        chosen.setdefault(entry["image_id"], entry)
    return tuple(chosen.values())


def gallery(cases: Cases, picture_of: PictureOf, resolution: int | None) -> str:
    """HTML of the three groups. resolution: side of the pictures, for cases whose picture was not kept."""
    groups = (
        ("Best", "highest mIoU of an image", cases.best),
        ("Worst", "lowest mIoU of an image", cases.worst),
        ("Random", "drawn with a fixed seed", cases.random),
    )
    lines = []
    for name, meaning, entries in groups:
        lines.append(f'<h3>{name} <span class="quiet">{meaning}</span></h3>\n<div class="cases">')
        lines += [_figure(entry, picture_of(entry), resolution) for entry in entries]
        lines.append("</div>")
    return "\n".join(lines)


def _figure(entry: Entry, picture: Picture | None, resolution: int | None) -> str:
    score = f"mIoU {format_number(entry['mIoU'])}"
    return "\n".join(
        [
            "<figure>",
            case_svg(entry, picture, resolution),
            f'<figcaption><p class="score"><strong>{score}</strong> '
            f'<span class="quiet">SR50 {format_number(entry["SR50"])} · {escape(str(entry["extra"]))} extra</span></p>',
            f"<p>{escape(entry['prompt'])}</p>",
            f'<p class="quiet">{escape(_identity(entry))}</p>',
            "</figcaption></figure>",
        ]
    )


def case_svg(entry: Entry, picture: Picture | None, resolution: int | None) -> str:
    """The picture with its boxes. Without a picture: the boxes alone, on a plain ground that says so."""
    width, height = _size(entry, picture, resolution)
    scale = VIEW / width
    view = (VIEW, height * scale)
    boxes = [_Box(_scaled(each["box"], scale), each["name"], True) for each in entry["wanted"]]
    for each in entry["detected"]:
        boxes.append(_Box(_scaled(each["box"], scale), f"{each['name']} {each['score']:.2f}", False))
    place = f'width="{VIEW:g}" height="{view[1]:.1f}"'
    if picture is None:
        ground = f'<rect class="blank" {place}/><text class="middle quiet" x="{VIEW / 2}" y="{view[1] / 2:.1f}">'
        ground += "picture not kept</text>"
    else:
        ground = f'<image {place} preserveAspectRatio="none" href="{data_uri(picture)}"/>'
    name = _accessible_name(entry, has_picture=picture is not None)
    return "\n".join(
        [
            f'<svg class="case" viewBox="0 0 {VIEW:g} {view[1]:.1f}" role="img" aria-label="{escape(name)}">',
            ground,
            *(_outline(box) for box in boxes),
            *(_label(box, plate) for box, plate in zip(boxes, _plates(boxes, view), strict=True)),
            "</svg>",
        ]
    )


def _size(entry: Entry, picture: Picture | None, resolution: int | None) -> tuple[int, int]:
    """(width, height) in px; of a picture not kept and of no fixed size, what its boxes span."""
    if picture is not None:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise ValueError(
                f"the picture of image {entry['image_id']} must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}"
            )
        return picture.shape[1], picture.shape[0]
    if resolution is not None:
        return resolution, resolution
    boxes = [each["box"] for each in [*entry["wanted"], *entry["detected"]]]
    return max([1, *(int(box[2]) for box in boxes)]), max([1, *(int(box[3]) for box in boxes)])


def data_uri(picture: Picture) -> str:
    """uint8 [H, W, 3] as a data: address: PNG up to `MAX_PNG_SIDE`, else JPEG of at most `MAX_SIDE`."""
    image = Image.fromarray(picture)
    buffer = io.BytesIO()
    if max(image.size) <= MAX_PNG_SIDE:
        kind = "png"
        image.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _accessible_name(entry: Entry, has_picture: bool) -> str:
    wanted = ", ".join(each["name"] for each in entry["wanted"]) or "nothing"
    detected = ", ".join(f"{each['name']} {each['score']:.2f}" for each in entry["detected"]) or "nothing"
    missing = "" if has_picture else " (picture not kept)"
    return f"Image {entry['image_id']}{missing}. Wanted: {wanted}. Detected: {detected}."


def _scaled(box: Sequence[float], scale: float) -> Plate:
    x0, y0, x1, y1 = (float(value) * scale for value in box)
    return x0, y0, x1, y1


def _outline(box: _Box) -> str:
    x0, y0, x1, y1 = box.corners
    kind = "wanted" if box.is_wanted else "detected"
    shape = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
    return (
        f'<g class="{kind}"><title>{kind}: {escape(box.label)}</title><rect class="halo" {shape}/><rect {shape}/></g>'
    )


def _plates(boxes: Sequence[_Box], view: tuple[float, float]) -> list[Plate]:
    """Labels of wanted boxes begin their search at the upper edge, detected ones' at the lower one."""
    sizes = [(len(box.label) * CHAR_WIDTH + 6, PLATE_HEIGHT) for box in boxes]
    return place_labels([box.corners for box in boxes], sizes, view, [not box.is_wanted for box in boxes])


def _label(box: _Box, plate: Plate) -> str:
    x0, y0, x1, y1 = plate
    kind = "wanted" if box.is_wanted else "detected"
    return (
        f'<g class="{kind}-label"><rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" rx="2"/>'
        f'<text x="{x0 + 3:.1f}" y="{y1 - 4:.1f}">{escape(box.label)}</text></g>'
    )


def _identity(entry: Entry) -> str:
    """Which picture it is; pictures that nothing random made have no seed."""
    image = f"image {entry['image_id']}"
    return image if entry["seed"] is None else f"{image} · seed {entry['seed']}"
