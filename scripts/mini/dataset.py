"""The mini world's scenes as a COCO dataset: what scripts/mini/make_dataset.py writes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from scripts.mini.captions import Named
from scripts.mini.drawing import CLASSES
from scripts.mini.scenes import Scene, render_scene
from util.buckets import Size, read_size
from util.logging import progress

FORMAT_VERSION = 2  # raise it when the drawing changes: an older dataset in the folder is then an error
BEFORE_PHRASES = 1  # the version that lacks them, and is the same otherwise
SETTINGS_FILE = "settings.json"
_SPLITS = ("train2017", "val2017")
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class DatasetSettings:
    """All that the dataset's content depends on. sizes: HEIGHTxWIDTH of the scenes in turn; none: squares of `size`.
    colour_words: whether captions name colours."""

    num_train: int = 6000
    num_val: int = 500
    size: int = 64
    seed: int = 0
    format_version: int = FORMAT_VERSION
    sizes: tuple[str, ...] = ()
    colour_words: bool = True

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for each in self.sizes:
            read_size(each)

    def size_of(self, index: int) -> Size:
        """(height, width) of image `index` of a split."""
        return read_size(self.sizes[index % len(self.sizes)]) if self.sizes else (self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """As in the files: without sizes where there are none, and without colour words only where these are left out,
        as older ones."""
        values = asdict(self) | {"sizes": list(self.sizes)}
        unsaid = {"sizes": [], "colour_words": True}
        return {name: value for name, value in values.items() if name not in unsaid or value != unsaid[name]}


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of image `index` (from 0) of a split."""
    return np.random.default_rng((seed, _SPLITS.index(split), index))


def categories() -> list[dict[str, Any]]:
    """COCO's category entries for the classes drawn here."""
    return [{"id": entry.id, "name": entry.name, "supercategory": entry.supercategory} for entry in CLASSES]


def instance_records(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of a scene, without ids; the segmentation is an RLE of the visible pixels. phrase: what the box
    holds in words."""
    records = []
    for item in scene.objects:
        rle = coco_mask.encode(np.asfortranarray(item.mask.astype(np.uint8)))
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        record = {"category_id": item.category_id, "bbox": list(item.bbox), "area": item.area, "iscrowd": 0}
        colour = {} if item.colour is None else {"colour": item.colour}
        phrase = phrase_of(item.name, item.colour, item.bbox, scene.image.shape[:2])
        records.append({**record, "segmentation": segmentation, **colour, "phrase": phrase})
    return records


def phrase_of(name: str, colour: str | None, bbox: Sequence[float], size: Sequence[int]) -> str:
    """What a caption with sizes would call the object. bbox: xywh in pixels; size: (height, width)."""
    return Named(name, colour, (0.5, 0.5), max(bbox[2:]) / min(size)).phrase


def _write_scene(
    index: int, folder: Path, split: str, settings: DatasetSettings
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    rng = scene_generator(settings.seed, split, index)
    scene = render_scene(rng, settings.size_of(index), colour_words=settings.colour_words)
    path = folder / f"{index + 1:012d}.jpg"
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        _JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    if not cv2.imwrite(str(path), scene.image[..., ::-1], options):
        raise OSError(f"could not write {path}")
    return instance_records(scene), scene.captions


def _write_json(content: dict[str, Any], path: Path) -> None:
    partial_path = path.with_name(path.name + ".tmp")
    partial_path.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial_path, path)


def _write_split(folder: Path, split: str, count: int, settings: DatasetSettings, num_workers: int) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    write = partial(_write_scene, folder=folder / split, split=split, settings=settings)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        results = pool.imap(write, range(count), chunksize=32)
        for image_id, (records, texts) in enumerate(progress(results, total=count, desc=split), start=1):
            name = f"{image_id:012d}.jpg"
            height, width = settings.size_of(image_id - 1)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            instances += [
                {"id": len(instances) + 1 + k, "image_id": image_id, **record} for k, record in enumerate(records)
            ]
            captions += [
                {"id": len(captions) + 1 + k, "image_id": image_id, "caption": text} for k, text in enumerate(texts)
            ]
    info = {"description": "StructMAR mini world", **settings.to_dict()}
    content = {"info": info, "images": images}
    _write_json(
        {**content, "annotations": instances, "categories": categories()},
        folder / "annotations" / f"instances_{split}.json",
    )
    _write_json({**content, "annotations": captions}, folder / "annotations" / f"captions_{split}.json")


def is_finished(folder: Path, settings: DatasetSettings) -> bool:
    """Whether `folder` holds this dataset already; one of before there were phrases gets them. Another one there is a
    ValueError that names both."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return False
    found, wanted = json.loads(path.read_text(encoding="utf-8")), settings.to_dict()
    if found == wanted | {"format_version": BEFORE_PHRASES}:
        _add_phrases(folder, settings)
    elif found != wanted:
        raise ValueError(
            f"{path} describes another dataset: found {found}, asked for {wanted}; "
            "choose another --output_dir or remove it"
        )
    return True


def _add_phrases(folder: Path, settings: DatasetSettings) -> None:
    """To a dataset that was finished before annotations had phrases; its pictures stay."""
    names = {entry.id: entry.name for entry in CLASSES}
    for split in _SPLITS:
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        size_of = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for item in content["annotations"]:
            place = item["bbox"], size_of[item["image_id"]]
            item["phrase"] = phrase_of(names[item["category_id"]], item.get("colour"), *place)
        _write_json({**content, "info": {**content["info"], **settings.to_dict()}}, path)
    _write_json(settings.to_dict(), folder / SETTINGS_FILE)


def _chinese_captions(index: int, split: str, settings: DatasetSettings) -> tuple[str, ...]:
    rng = scene_generator(settings.seed, split, index)
    return render_scene(rng, settings.size_of(index), colour_words=settings.colour_words).chinese


def chinese_path(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"captions_{split}.zh.json"


def add_chinese(folder: Path, settings: DatasetSettings, num_workers: int = 1) -> bool:
    """Writes Chinese captions beside the English ones of a finished dataset, under the same ids; the scenes are drawn
    again for it. Returns False if they were there already."""
    missing = [split for split in _SPLITS if not chinese_path(folder, split).is_file()]
    for split in missing:
        content = json.loads((folder / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8"))
        write, count = partial(_chinese_captions, split=split, settings=settings), len(content["images"])
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            results = pool.imap(write, range(count), chunksize=32)
            texts = [text for each in progress(results, total=count, desc=f"{split}, Chinese") for text in each]
        pairs = zip(content["annotations"], texts, strict=True)
        content["annotations"] = [{**annotation, "caption": text} for annotation, text in pairs]
        _write_json(content, chinese_path(folder, split))
    return bool(missing)


def make_dataset(folder: Path, settings: DatasetSettings, num_workers: int = 1) -> bool:
    """Writes the dataset; returns False if it was there already. The settings file, written last, marks it finished."""
    if is_finished(folder, settings):
        return False
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in zip(_SPLITS, (settings.num_train, settings.num_val), strict=True):
        _write_split(folder, split, count, settings, num_workers)
    _write_json(settings.to_dict(), folder / SETTINGS_FILE)
    return True


def run(args: argparse.Namespace) -> None:
    """Writes the dataset unless it is there. Raises ValueError where another one is."""
    sizes = tuple(args.sizes or ())
    settings = DatasetSettings(
        args.num_train, args.num_val, args.size, args.seed, sizes=sizes, colour_words=args.colour_words
    )  # fmt: skip
    written = make_dataset(args.output_dir, settings, args.num_workers)
    written |= args.chinese and add_chinese(args.output_dir, settings, args.num_workers)
    print(f"{args.output_dir}: {'written' if written else 'already there, nothing to do'}")
