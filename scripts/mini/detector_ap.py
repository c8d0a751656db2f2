"""AP of a detector on drawn scenes: what scripts/mini/yolox_ap.py prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.eval.ap import average_precision
from models.frozen.faster_rcnn import BoxDetector, DetectorSettings, load_detector
from scripts.mini.drawing import CLASSES
from scripts.mini.scenes import Scene, render_scene
from util.boxes import xyxy_to_xywh

SETTINGS = DetectorSettings(min_score=0.01, nms_iou=0.45)


def detect(detector: BoxDetector, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """The drawn classes' detections in COCO's result format; image ids count from 1."""
    drawn = {entry.id for entry in CLASSES}
    results = []
    for image_id, scene in enumerate(scenes, start=1):
        (found,) = detector([torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255])
        boxes_xywh = xyxy_to_xywh(found.boxes_px).tolist()
        for box, category_id, score in zip(boxes_xywh, found.category_ids.tolist(), found.scores.tolist(), strict=True):
            if category_id in drawn:
                results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return results


def ground_truth(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The scenes' boxes as a COCO instances dict; image ids count from 1."""
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        for item in scene.objects:
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": item.category_id, "iscrowd": 0}
            annotations.append({**entry, "bbox": list(item.bbox), "area": item.area})
    images = [{"id": image_id} for image_id in range(1, len(scenes) + 1)]
    categories = [{"id": entry.id, "name": entry.name} for entry in CLASSES]
    return {"images": images, "annotations": annotations, "categories": categories}


def run(args: argparse.Namespace) -> None:
    """Measures and prints. Raises ValueError or FileNotFoundError for a detector that cannot be loaded."""
    detector = load_detector(args.detector, settings=SETTINGS)
    scenes = [render_scene(np.random.default_rng((args.seed, index)), args.size) for index in range(args.num_scenes)]
    truth = ground_truth(scenes)
    result = average_precision(truth, detect(detector, scenes), [image["id"] for image in truth["images"]])
    print(f"{args.detector.name} on {args.num_scenes} scenes of {args.size} px")
    print(f"{'class':<14} {'boxes':>5} {'AP':>6} {'AP50':>6}")
    for entry in CLASSES:
        count = sum(each["category_id"] == entry.id for each in truth["annotations"])
        values = result.per_class[entry.id]
        print(f"{entry.name:<14} {count:>5} {values['AP']:>6.3f} {values['AP50']:>6.3f}")
    print(f"{'mean':<14} {len(truth['annotations']):>5} {result.values['AP']:>6.3f} {result.values['AP50']:>6.3f}")
