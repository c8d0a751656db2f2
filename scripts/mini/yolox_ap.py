"""Does a detector trained on photographs recognise the drawn classes? AP of a YOLOX ONNX model on generated scenes.

python -m scripts.mini.yolox_ap --detector yolox_nano.onnx --num_scenes 150 --size 256

The detector must be a YOLOX export for COCO's 80 classes with raw outputs [1, cells, 85] (tx, ty, tw, th, objectness,
classes) at strides 8, 16 and 32. Only the mini world's classes are scored: its other classes are not asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scripts.mini.drawing import CLASSES
from scripts.mini.scenes import Scene, render_scene

# COCO's 80 category ids in use, ascending: position = the detector's class index.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [i for i in range(1, 91) if i not in _UNUSED_IDS]
_STRIDES = (8, 16, 32)
_PAD_VALUE = 114
_NMS_IOU = 0.45
_MIN_SCORE = 0.01


def letterbox(image: NDArray[np.uint8], side: int) -> tuple[NDArray[np.float32], float]:
    """RGB image [h, w, 3] -> BGR blob [1, 3, side, side] in 0..255, padded at its right and bottom, and the scale."""
    scale = min(side / image.shape[0], side / image.shape[1])
    width, height = round(image.shape[1] * scale), round(image.shape[0] * scale)
    padded = np.full((side, side, 3), _PAD_VALUE, dtype=np.uint8)
    padded[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)[..., ::-1]
    return padded.astype(np.float32).transpose(2, 0, 1)[None], scale


def decode(raw: NDArray[np.float32], side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Raw output [cells, 85] -> boxes xywh in letterboxed pixels [cells, 4] and class scores [cells, 80]."""
    grids, strides = [], []
    for stride in _STRIDES:
        cells = np.arange(side // stride)
        x, y = np.meshgrid(cells, cells)
        grids.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((x.size, 1), stride))
    grid, scale = np.concatenate(grids), np.concatenate(strides)
    if raw.shape != (len(grid), 85):
        raise ValueError(f"expected a YOLOX output of shape {(len(grid), 85)} for input {side}, got {raw.shape}")
    centre, extent = (raw[:, :2] + grid) * scale, np.exp(raw[:, 2:4]) * scale
    return np.concatenate([centre - extent / 2, extent], axis=1).astype(np.float32), raw[:, 4:5] * raw[:, 5:]


def detect(net: cv2.dnn.Net, image: NDArray[np.uint8], side: int, class_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO-style detections (without image_id) of the classes `class_ids` in an RGB image."""
    blob, scale = letterbox(image, side)
    net.setInput(blob)
    boxes, scores = decode(net.forward()[0], side)
    found: list[dict[str, Any]] = []
    for category_id in class_ids:
        column = scores[:, COCO_IDS.index(category_id)]
        kept = np.asarray(cv2.dnn.NMSBoxes(boxes.tolist(), column.tolist(), _MIN_SCORE, _NMS_IOU), dtype=np.int64)
        for index in kept.ravel():
            box = [float(value) for value in boxes[index] / scale]
            found.append({"category_id": category_id, "bbox": box, "score": float(column[index])})
    return found


def ground_truth(scenes: Sequence[Scene]) -> COCO:
    """The scenes' boxes as a pycocotools index; image ids count from 1."""
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        for item in scene.objects:
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": item.category_id, "iscrowd": 0}
            annotations.append({**entry, "bbox": list(item.bbox), "area": item.area})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(scenes) + 1)],
        "annotations": annotations,
        "categories": [{"id": entry.id, "name": entry.name} for entry in CLASSES],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def per_class_ap(truth: COCO, detections: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float, float]]:
    """Category id -> (AP over IoU .50 to .95, AP at .50, recall at .50); NaN for a class that is not in the scenes."""
    if not detections:
        return {entry.id: (0.0, 0.0, 0.0) for entry in CLASSES}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(list(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = (
        evaluation.eval["precision"][..., 0, -1],
        evaluation.eval["recall"][..., 0, -1],
    )  # all areas, 100 boxes
    rows = {}
    for index, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, index].mean(), precision[0, :, index].mean(), recall[0, index]
        rows[int(category_id)] = tuple(float("nan") if value < 0 else float(value) for value in values)
    return rows  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, required=True, help="YOLOX ONNX file")
    parser.add_argument("--num_scenes", type=int, default=150, help="number of scenes")
    parser.add_argument("--size", type=int, default=256, help="resolution at which scenes are drawn")
    parser.add_argument("--input_size", type=int, default=416, help="the detector's input side")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the scenes")
    args = parser.parse_args()
    if not args.detector.is_file():
        raise FileNotFoundError(f"no detector at {args.detector}: give a YOLOX ONNX file with --detector")
    net = cv2.dnn.readNetFromONNX(str(args.detector))
    scenes = [render_scene(np.random.default_rng((args.seed, index)), args.size) for index in range(args.num_scenes)]
    truth, detections = ground_truth(scenes), []
    for image_id, scene in enumerate(scenes, start=1):
        found = detect(net, scene.image, args.input_size, [entry.id for entry in CLASSES])
        detections += [{"image_id": image_id, **item} for item in found]
    rows = per_class_ap(truth, detections)
    print(f"{args.detector.name} on {args.num_scenes} scenes of {args.size} px")
    print(f"{'class':<14} {'boxes':>5} {'AP':>6} {'AP50':>6} {'rec50':>6}")
    for entry in CLASSES:
        count = len(truth.getAnnIds(catIds=[entry.id]))
        print(f"{entry.name:<14} {count:>5} " + " ".join(f"{value:>6.3f}" for value in rows[entry.id]))
    means = np.nanmean(np.array([rows[entry.id] for entry in CLASSES]), axis=0)
    print(f"{'mean':<14} {len(truth.getAnnIds()):>5} " + " ".join(f"{value:>6.3f}" for value in means))


if __name__ == "__main__":
    main()
