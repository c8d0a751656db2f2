"""How scripts/mini/colour_accuracy.py, which says what it measures, reads colours off pixels."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from engine.eval.bootstrap import Interval, bootstrap_weights, interval
from scripts.mini.drawing import CLASS_BY_ID, COLOURS
from util.images import Picture, load_image
from util.output import write_text_atomic

COLOUR_FORMAT = "structmar-colour-1"
NONE = "none"  # the verdict where no pixel votes
DARKEST, DARKEST_WHITE, LIGHTEST = 0.3, 0.5, 1.15  # shades of the palette, as factors
NUM_SHADES = 8
LIGHTNESS_WEIGHT = 0.25
MAX_DISTANCE = 12.0  # in CIELAB with weighted lightness
MIN_COVERAGE = 0.85  # of the class's most covered place
MAX_HIDDEN = 0.3  # of the box
GRID = 24  # side of the classes' coverage maps


@dataclass(frozen=True)
class Item:
    """One object whose colour captions name. box: whole pixels x, y, width, height.

    is_determined: the captions say which colour this box has, because all objects of its class in the image have one.
    """

    image_id: int
    category_id: int
    colour: str
    box: tuple[int, int, int, int]
    is_determined: bool = True


@dataclass(frozen=True)
class ColourSet:
    """What is judged. coverage: category id -> [GRID, GRID], the share of its objects that cover each place of the box.

    num_hidden: objects left out because a nearer one covers them.
    """

    folder: Path
    split: str
    file_names: Mapping[int, str]  # image id -> name, ascending
    size: tuple[int, int]  # (width, height)
    items: tuple[Item, ...]
    coverage: Mapping[int, np.ndarray]
    num_hidden: int


def hidden_share(box: Sequence[float], nearer: Sequence[Sequence[float]]) -> float:
    """The largest share of `box` that one of the nearer boxes overlaps. Boxes are xywh."""
    x, y, width, height = box
    shares = [0.0]
    for left, top, wide, high in nearer:
        across = min(x + width, left + wide) - max(x, left)
        down = min(y + height, top + high) - max(y, top)
        shares.append(max(across, 0.0) * max(down, 0.0) / (width * height))
    return max(shares)


def whole_box(bbox: Sequence[float]) -> tuple[int, int, int, int]:
    x, y, width, height = (round(value) for value in bbox)
    return x, y, width, height


def coverage_map(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Mean of the objects' masks (COCO RLE), each stretched from its box to [GRID, GRID]; float32 in [0, 1]."""
    maps = []
    for annotation in annotations:
        x, y, width, height = whole_box(annotation["bbox"])
        mask = coco_mask.decode(annotation["segmentation"])[y : y + height, x : x + width].astype(np.float32)
        maps.append(cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_LINEAR))
    return np.asarray(np.mean(maps, axis=0), dtype=np.float32)


def load_colour_set(root: Path, split: str, max_images: int | None = None) -> ColourSet:
    """Reads instances_{split}.json; `max_images` keeps the first by id. Raises FileNotFoundError, or ValueError naming
    the file for a dataset that is not the mini world's (no colours, unknown classes, images of several sizes)."""
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make it with python -m scripts.mini.make_dataset")
    content = json.loads(path.read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: image["id"])[:max_images]
    sizes = {(image["width"], image["height"]) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{path}: expected images of one size, found {sorted(sizes)}")
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    by_image: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in sorted(content["annotations"], key=lambda entry: entry["id"]):
        if annotation["category_id"] not in CLASS_BY_ID:
            raise ValueError(f"{path}: category id {annotation['category_id']} is not one of {sorted(CLASS_BY_ID)}")
        by_class.setdefault(annotation["category_id"], []).append(annotation)
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
    items, num_hidden = _items(by_image)
    if not items:
        raise ValueError(f"{path}: no annotation has a colour; is it a dataset of scripts.mini.make_dataset?")
    judged = {item.category_id for item in items}
    coverage = {each: coverage_map(annotations) for each, annotations in by_class.items() if each in judged}
    names = {image["id"]: image["file_name"] for image in images}
    return ColourSet(root / split, split, names, sizes.pop(), tuple(items), coverage, num_hidden)


def _items(by_image: Mapping[int, Sequence[Mapping[str, Any]]]) -> tuple[list[Item], int]:
    items, num_hidden = [], 0
    for image_id, entries in by_image.items():
        colours_of: dict[int, set[str]] = {}
        for annotation in entries:
            if annotation.get("colour") is not None:
                colours_of.setdefault(annotation["category_id"], set()).add(annotation["colour"])
        for place, annotation in enumerate(entries):
            if annotation.get("colour") is None:
                continue
            if hidden_share(annotation["bbox"], [other["bbox"] for other in entries[place + 1 :]]) > MAX_HIDDEN:
                num_hidden += 1
                continue
            box = whole_box(annotation["bbox"])
            category_id = annotation["category_id"]
            items.append(Item(image_id, category_id, annotation["colour"], box, len(colours_of[category_id]) == 1))
    return items, num_hidden


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """RGB in [0, 1] [H, W, 3] -> CIELAB [H, W, 3] with the lightness weighted."""
    lab = cv2.cvtColor(np.ascontiguousarray(rgb, dtype=np.float32), cv2.COLOR_RGB2LAB)
    return lab * np.array([LIGHTNESS_WEIGHT, 1.0, 1.0], dtype=np.float32)


def shades_of(name: str) -> np.ndarray:
    """A palette colour from dark to light, as `to_lab` gives it: [NUM_SHADES, 3]."""
    factors = np.linspace(DARKEST_WHITE if name == "white" else DARKEST, LIGHTEST, NUM_SHADES)
    return to_lab(np.clip(factors[None, :, None] * COLOURS[name], 0, 1))[0]


PALETTE = {name: shades_of(name) for name in COLOURS}


def name_colour(lab: np.ndarray, weights: np.ndarray, candidates: Sequence[str]) -> str:
    """The candidate with the most votes, or NONE. lab: [h, w, 3] of `to_lab`; weights: [h, w]."""
    pixels = lab[weights > 0]  # [n, 3]
    offsets = [np.linalg.norm(pixels[:, None] - PALETTE[name][None], axis=-1).min(axis=1) for name in candidates]
    distances = np.stack(offsets, axis=1)  # [n, candidates]
    near = distances.min(axis=1) < MAX_DISTANCE
    votes = np.bincount(
        distances.argmin(axis=1)[near], weights=weights[weights > 0][near], minlength=len(candidates)
    )  # [candidates]
    return candidates[int(votes.argmax())] if votes.max() > 0 else NONE


def box_weights(coverage: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """1 where the class nearly always covers the box, 0 elsewhere: [height, width]."""
    stretched = cv2.resize(coverage, box[2:], interpolation=cv2.INTER_AREA)
    return np.asarray(stretched >= MIN_COVERAGE * stretched.max(), dtype=np.float32)


def judge(colour_set: ColourSet, pictures: Mapping[int, Picture]) -> list[str]:
    """The colour seen at each item. pictures: image id -> uint8 [H, W, 3] RGB of the set's size."""
    lab = {image_id: to_lab(picture.astype(np.float32) / 255) for image_id, picture in pictures.items()}
    verdicts = []
    for item in colour_set.items:
        x, y, width, height = item.box
        patch = lab[item.image_id][y : y + height, x : x + width]
        weights = box_weights(colour_set.coverage[item.category_id], item.box)
        verdicts.append(name_colour(patch, weights, CLASS_BY_ID[item.category_id].colours))
    return verdicts


def read_pictures(folder: Path, colour_set: ColourSet) -> dict[int, Picture]:
    """Every picture of the set: `<12-digit id>.png`, or the dataset's file name. Raises FileNotFoundError for the first
    that is missing, ValueError for one of another size."""
    pictures = {}
    for image_id, name in colour_set.file_names.items():
        choices = [folder / f"{image_id:012d}.png", folder / name]
        path = next((choice for choice in choices if choice.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"image {image_id}: neither {choices[0]} nor {choices[1]} exists")
        image = load_image(path)
        if image.size != colour_set.size:
            raise ValueError(f"{path} is {image.size} (width, height), the dataset's images are {colour_set.size}")
        pictures[image_id] = np.asarray(image)
    return pictures


def shifted(pictures: Mapping[int, Picture]) -> dict[int, Picture]:
    """Each image id with the next one's picture. Raises ValueError for fewer than two."""
    if len(pictures) < 2:
        raise ValueError(f"the control needs at least two images, got {len(pictures)}")
    ids = list(pictures)
    return {image_id: pictures[other] for image_id, other in zip(ids, ids[1:] + ids[:1], strict=True)}


def shares(keys: Sequence[str], right: np.ndarray) -> dict[str, dict[str, float]]:
    """Key -> how many, and the share that is right. right: [n] bool."""
    labels = np.array(keys)
    found = {key: right[labels == key] for key in sorted(set(keys))}
    return {key: {"count": len(hits), "accuracy": float(hits.mean())} for key, hits in found.items()}


def accuracy(right: np.ndarray, index: np.ndarray, weights: np.ndarray) -> Interval:
    """The share that is right, with its interval. right: [n] bool; index: [n] image places; weights: [R, images]."""
    hits = np.bincount(index, weights=right, minlength=weights.shape[1])
    totals = np.bincount(index, minlength=weights.shape[1])
    drawn = weights @ totals  # [R]
    samples = np.where(drawn > 0, weights @ hits / np.maximum(drawn, 1), np.nan)  # [R]
    return interval(float(right.mean()) if len(right) else math.nan, samples)


def counts_by_image(right: np.ndarray, index: np.ndarray, num_images: int) -> dict[str, list[int]]:
    """Objects of each image over all seeds: those that are right, and all. right: [n] bool; index: [n] image places."""
    wanted, hits = (np.bincount(each, minlength=num_images).tolist() for each in (index, index[right]))
    return {"right": hits, "wanted": wanted}


def result_row(
    name: str, kind: str, colour_set: ColourSet, runs: Sequence[Sequence[str]], weights: np.ndarray
) -> dict[str, Any]:
    """One row of the results. runs: per seed, the verdicts of all items; weights: [R, images], of the bootstrap.

    A resample's accuracy is over the objects of the images drawn; all seeds of an image are drawn together.
    """
    items = [item for _ in runs for item in colour_set.items]
    seen = [verdict for verdicts in runs for verdict in verdicts]
    right = np.array([item.colour == verdict for item, verdict in zip(items, seen, strict=True)])
    place = {image_id: index for index, image_id in enumerate(colour_set.file_names)}
    index = np.array([place[item.image_id] for item in items])
    determined = np.array([item.is_determined for item in items])
    pairs = Counter(zip([item.colour for item in items], seen, strict=True))
    colours = [item.colour for item in items]
    confusion = {wanted: {said: n for (w, said), n in sorted(pairs.items()) if w == wanted} for wanted in set(colours)}
    return {
        "name": name,
        "kind": kind,
        "num_seeds": len(runs),
        "accuracy": asdict(accuracy(right, index, weights)),
        "accuracy_determined": asdict(accuracy(right[determined], index[determined], weights)),
        "accuracy_several": asdict(accuracy(right[~determined], index[~determined], weights)),
        "determined_by_image": counts_by_image(right[determined], index[determined], len(place)),
        "per_class": shares([CLASS_BY_ID[item.category_id].name for item in items], right),
        "per_colour": shares(colours, right),
        "confusion": {wanted: confusion[wanted] for wanted in COLOURS if wanted in confusion},
    }


def evaluate(colour_set: ColourSet, folders: Sequence[Path], num_resamples: int) -> dict[str, Any]:
    """Rows: real drawings, one for all `folders` (seeds of one model) if any, shifted drawings."""
    weights = bootstrap_weights(len(colour_set.file_names), num_resamples, seed=0)
    real = read_pictures(colour_set.folder, colour_set)
    rows = [result_row("real drawings", "bound", colour_set, [judge(colour_set, real)], weights)]
    if folders:
        runs = [judge(colour_set, read_pictures(folder, colour_set)) for folder in folders]
        rows.append(result_row("images", "model", colour_set, runs, weights))
    rows.append(result_row("shuffled drawings", "control", colour_set, [judge(colour_set, shifted(real))], weights))
    return {
        "format": COLOUR_FORMAT,
        "split": colour_set.split,
        "num_images": len(colour_set.file_names),
        "num_objects": len(colour_set.items),
        "num_hidden": colour_set.num_hidden,
        "num_determined": sum(item.is_determined for item in colour_set.items),
        "folders": [str(folder) for folder in folders],
        "num_resamples": num_resamples,
        "rows": rows,
    }


def format_table(results: Mapping[str, Any]) -> str:
    """A Markdown table, one line per row: the accuracy with its interval, then each class, in percent."""
    classes = list(results["rows"][0]["per_class"])
    head = "| | right where the caption decides [95 %] | all [95 %] | one class in several colours [95 %]"
    lines = [f"{head} | {' | '.join(classes)} |", "|---" * (len(classes) + 4) + "|"]
    for row in results["rows"]:
        shown = []
        for part in ("accuracy_determined", "accuracy", "accuracy_several"):
            value, low, high = (f"{100 * row[part][key]:.1f}" for key in ("value", "low", "high"))
            shown.append(f"{value} [{low}, {high}]")
        cells = [f"{100 * row['per_class'][name]['accuracy']:.1f}" for name in classes]
        lines.append(f"| {row['name']} | {' | '.join(shown)} | {' | '.join(cells)} |")
    counted = f"{results['num_objects']} objects of {results['num_images']} images"
    counted += f", in {results['num_determined']} of them the caption decides"
    return "\n".join([*lines, "", f"{counted}; {results['num_hidden']} more were left out, a nearer one covers them."])


def run(args: argparse.Namespace) -> None:
    """Measures, writes and prints. Raises ValueError or FileNotFoundError."""
    colour_set = load_colour_set(args.coco_root, args.split, args.max_images)
    results = evaluate(colour_set, args.images, args.num_resamples)
    if args.output is not None:
        write_text_atomic(args.output, json.dumps(results, indent=2) + "\n")
    print(format_table(results))
