"""A dataset, a checkpoint and detectors for evaluations that take a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from engine.eval.judge import Judge
from engine.eval.plan import EvaluationRun
from engine.eval.profiles import Profile, load_profile
from engine.eval.run import run_evaluation
from engine.eval.targets import EvalSet, Target
from models.config import SMALL
from models.frozen.detections import Detections
from models.frozen.faster_rcnn import build_detector, detector_checkpoint
from tests.helpers.tiny import CATEGORIES
from util.distributed import DistInfo
from util.images import Picture
from util.types import Category

COLOURS = {1: (220, 30, 30), 18: (30, 200, 30), 37: (30, 30, 220)}  # by category id
BOXES = {  # by image id: (category id, bbox xywh) in 64x64 pixels
    3: [(1, (4, 8, 24, 32)), (18, (36, 20, 20, 40))],
    8: [(37, (10, 10, 40, 44))],
    11: [(18, (0, 30, 30, 30)), (37, (40, 4, 20, 20)), (1, (44, 40, 16, 16))],
    15: [(1, (16, 16, 32, 32))],
    20: [(37, (2, 2, 28, 28)), (37, (34, 34, 28, 28))],
}


def write_dataset(root: Path, split: str = "val2017", box_size: int = 64) -> Path:
    """Coloured rectangles on grey, 64x64, in COCO's format."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations, captions = [], [], []
    for image_id, boxes in BOXES.items():
        pixels = np.full((box_size, box_size, 3), 128, dtype=np.uint8)
        for category_id, (x, y, w, h) in boxes:
            pixels[y : y + h, x : x + w] = COLOURS[category_id]
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
            annotations.append({**entry, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        name = f"{image_id:012d}.png"
        Image.fromarray(pixels).save(root / split / name)
        images.append({"id": image_id, "file_name": name, "width": box_size, "height": box_size})
        captions.append({"id": image_id, "image_id": image_id, "caption": f"a red dog, scene {image_id}"})
    names = [{"id": each.id, "name": each.name} for each in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": names}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (root / "annotations" / f"captions_{split}.json").write_text(
        json.dumps({"images": images, "annotations": captions})
    )
    return root


def write_many_sizes(root: Path, last: tuple[int, int]) -> Path:
    """Photographs of unlike sizes (width, height)."""
    write_dataset(root)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for image, size in zip(content["images"], ((64, 64), (80, 64), (64, 96), (80, 64), last), strict=True):
        photo = root / "val2017" / image["file_name"]
        with Image.open(photo) as picture:
            picture.resize(size).save(photo)
        image["width"], image["height"] = size
    path.write_text(json.dumps(content))
    return root


def tiny_profile(size: int | None = 32, **changes: object) -> Profile:
    """Centre crop of val2017 to `size` px (None: for the geometry "original"), up to four objects."""
    return replace(load_profile("mini"), name="tiny", resolution=size, max_objects=4, match_score=0.3, **changes)


def write_profile(path: Path, **changes: object) -> Path:
    profile = tiny_profile(**changes)
    path.write_text(yaml.safe_dump({key: _plain(value) for key, value in vars(profile).items()}))
    return path


def write_detector(path: Path, categories: Sequence[Category] = CATEGORIES, seed: int = 0) -> Path:
    """A Faster R-CNN with random weights: it finds something, never anything sensible."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_detector(SMALL, len(categories) + 1)
    torch.save(detector_checkpoint(model, SMALL, categories, torch.float32), path)
    return path


class ColourDetector:
    """Finds the rectangles of `write_dataset` by their colour: one per category and image, at its exact extent."""

    id, arch = "0" * 64, "colours"
    categories = tuple(CATEGORIES)

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> Detections:
        boxes, ids = [], []
        for category_id, colour in COLOURS.items():
            distance = (image * 255 - torch.tensor(colour, dtype=torch.float32)[:, None, None]).abs().amax(0)  # [H, W]
            rows, columns = torch.nonzero(distance < 60, as_tuple=True)
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                ids.append(category_id)
        scores = torch.full((len(ids),), 0.9)
        return Detections(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(ids), scores)


def colour_judge() -> Judge:
    return Judge.of(ColourDetector(), CATEGORIES)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def evaluate(folder: Path, eval_set: EvalSet, name: str, shift: int = 0, **changes: Any) -> Path:
    """Scores the photographs, moved to the right by `shift` pixels, as the pictures of a model."""

    def picture_of(target: Target) -> Picture:
        return np.roll(eval_set.picture(target), shift, axis=1)

    values: dict[str, Any] = {
        "eval_set": eval_set, "judge": colour_judge(), "skipped_categories": (), "is_reward": False, "name": name,
        "generation": None, "folder_pictures": picture_of, "source": {"kind": "images", "folder": name},
        "real_bound": True, "round_trip": None, "vae_id": None, "bounds": None, "no_layout_run": False,
        "quality": None, "num_resamples": 60, "detector_batch_size": 4, "rescore": False,
        "dist": DistInfo(0, 1, 0, torch.device("cpu")), "output_dir": folder,
    }  # fmt: skip
    run_evaluation(EvaluationRun(**(values | changes)))
    return folder
