"""What a detector finds in a picture, and how far it lies where it was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.data.scenes import Scene
from engine.eval.layout_metrics import pair_boxes, pairwise_iou
from models.frozen.detections import BoxDetector
from util.images import Picture

MIN_SCORE = 0.5


@torch.no_grad()
def look(detector: BoxDetector, picture: Picture, scene: Scene, device: torch.device) -> dict[str, Any]:
    """found: label, bbox (xyxy in [0, 1]) and score of each object in the picture, best first. ious: of each of the
    scene's boxes with its partner of the same label; 0 for one that is missing, None for a label that the detector does
    not know."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().to(device) / 255  # [3, H, W]
    detections = detector([pixels])[0]
    is_sure = (detections.scores >= MIN_SCORE).cpu().numpy()
    boxes = detections.boxes_px.cpu().numpy()[is_sure].astype(np.float64)
    scores = detections.scores.cpu().numpy()[is_sure].astype(np.float64)
    name_of = {category.id: category.name for category in detector.categories}
    labels = [name_of[int(each)] for each in detections.category_ids.cpu().numpy()[is_sure]]

    height, width = picture.shape[:2]
    size = np.array([width, height, width, height], dtype=np.float64)
    wanted = scene.layout.boxes_xyxy.numpy().astype(np.float64) * size
    is_same = np.array([[name == label for label in labels] for name in scene.names], dtype=bool)
    gains = np.where(is_same.reshape(len(wanted), len(boxes)), pairwise_iou(wanted, boxes), 0.0)
    rows, columns = pair_boxes(gains, scores)
    ious: list[float | None] = [0.0 if name in name_of.values() else None for name in scene.names]
    for row, column in zip(rows, columns, strict=True):
        ious[row] = round(float(gains[row, column]), 3)
    shares = np.clip(boxes / size, 0, 1).round(4).tolist()
    found = [
        {"label": label, "bbox": box, "score": round(float(score), 3)}
        for label, box, score in zip(labels, shares, scores, strict=True)
    ]
    return {"found": found, "ious": ious}
