"""Files that somebody opens at the page: a picture of ours, a layout file, or any other picture, to edit it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from engine.data.layout_formats import parse_entries
from engine.data.scenes import Scene, read_entry
from engine.page.limits import MAX_PAGE_SEED
from engine.page.studio import Json, Studio, as_base64
from engine.page.wish import decode_base64, decode_picture, read_options, read_page_edit, read_page_scene, require_whole
from engine.sample.output import MADE_WITH
from models.config import PRECISIONS
from util.boxes import plan_center_crop
from util.images import crop_image, encode_png
from util.picture_files import png_text
from util.read import parse_json, short_repr

MAX_SCENES = 1000  # of a layout file


def open_file(body: Any, studio: Studio) -> Json:
    """body: {"content": base64}. Gives "scenes", or one scene with all that a picture of ours was drawn with.

    scenes: entries of a layout file. picture: base64 of a PNG. seed, options, precision, edit: as in a request.
    Raises ValueError for what is neither a picture nor a layout that the model can draw.
    """
    if not isinstance(body, dict) or set(body) != {"content"}:
        raise ValueError(f"a file is sent as {{'content': base64}}, got {short_repr(body)}")
    content = decode_base64(body["content"], "content")
    if (text := _as_text(content)) is not None:
        return {"scenes": [scene.to_dict() for scene in _scenes(text, studio)]}
    picture = decode_picture(content, "the file")
    texts = png_text(content, "the file")
    if MADE_WITH in texts and "objects" in texts:
        return {**_made_with(texts, studio), "picture": as_base64(encode_png(picture))}
    size = studio.pipeline.model.config.img_size
    cropped = crop_image(Image.fromarray(picture), plan_center_crop(picture.shape[1], picture.shape[0], size))
    return {"picture": as_base64(encode_png(np.ascontiguousarray(cropped)))}


def _as_text(content: bytes) -> str | None:
    """None for what is no text: pictures have bytes that are none."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _scenes(text: str, studio: Studio) -> list[Scene]:
    known = studio.pipeline.known_labels
    found = parse_entries(text, "the layout file", names=[category.name for category in known.categories])
    if len(found) > MAX_SCENES:
        raise ValueError(f"the layout file holds {len(found)} scenes, at most {MAX_SCENES} are opened")
    return [read_entry(each.content, each.where, known) for each in found]


def _made_with(text: dict[str, str], studio: Studio) -> Json:
    """What the text of a picture says that it was drawn with. Options of another head are left out."""
    entry = {name: parse_json(text[name], name) for name in ("objects", "height", "width") if name in text}
    scene = read_page_scene({"prompt": text.get("prompt", ""), **entry}, studio.pipeline.known_labels)
    made: Json = {"scenes": [scene.to_dict()]}
    made["seed"] = parse_json(text.get("seed", "0"), "seed")
    require_whole("seed", made["seed"], 0, MAX_PAGE_SEED)
    sampling = parse_json(text.get("sampling", "{}"), "sampling")
    if isinstance(sampling, dict) and sampling.get("head") == studio.own.head:
        made["options"] = read_options(sampling, studio.own).to_dict()
    settings = parse_json(text[MADE_WITH], MADE_WITH)
    if isinstance(settings, dict) and settings.get("precision") in PRECISIONS:
        made["precision"] = settings["precision"]
    if isinstance(settings, dict) and isinstance(settings.get("edit"), dict):
        read_page_edit(settings["edit"])
        made["edit"] = settings["edit"]
    return made
