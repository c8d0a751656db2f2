"""The training of scripts/mini/train_detector.py, which says what it does."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou

from models.frozen.faster_rcnn import (
    BoxDetector,
    Detections,
    build_detector,
    detector_checkpoint,
    load_detector,
)
from scripts.mini.training import batch_indices, learning_rate, load_images, load_state, save_state
from util.checkpoint import save_atomic
from util.rng import derive_seed, generator
from util.types import Category


@dataclass(frozen=True)
class Boxes:
    """A split in memory: images uint8 [n, 3, H, W]; for each its boxes xyxy in pixels [k, 4] and labels [k] from 1."""

    image_ids: list[int]
    images: Tensor
    boxes_px: list[Tensor]
    labels: list[Tensor]
    categories: list[Category]
    coco: COCO


def load_split(folder: Path, split: str, max_images: int | None) -> Boxes:
    """Reads a COCO split. Raises FileNotFoundError if it is not there."""
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: make it with python -m scripts.mini.make_dataset")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    image_ids = sorted(coco.imgs)[:max_images]
    categories = [Category(c["id"], c["name"]) for c in sorted(coco.cats.values(), key=lambda c: c["id"])]
    label_of = {category.id: index for index, category in enumerate(categories, start=1)}
    boxes, labels = [], []
    for image_id in image_ids:
        records = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        xywh = torch.tensor([record["bbox"] for record in records]).float().reshape(-1, 4)
        boxes.append(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        labels.append(torch.tensor([label_of[record["category_id"]] for record in records], dtype=torch.int64))
    images = load_images([folder / split / coco.imgs[image_id]["file_name"] for image_id in image_ids])
    return Boxes(image_ids, images, boxes, labels, categories, coco)


def soften(image: Tensor, rng: torch.Generator) -> Tensor:
    """image [3, H, W] in [0, 1]: shrunk to 0.5 to 0.9 of its size and enlarged again, with faint noise."""
    height, width = image.shape[1:]
    scale = 0.5 + 0.4 * torch.rand((), generator=rng).item()
    small = F.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)
    soft = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[0]
    strength = 0.04 * torch.rand((), generator=rng).item()
    return (soft + strength * torch.randn(image.shape, generator=rng)).clamp(0, 1)


def training_pair(
    data: Boxes, index: int, soften_prob: float, rng: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Image `index` in [0, 1] with torchvision's target; flipped with probability 1/2, softened with `soften_prob`."""
    image, boxes = data.images[index].float() / 255, data.boxes_px[index]
    if torch.rand((), generator=rng).item() < 0.5:
        width = image.shape[2]
        image = image.flip(2)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    if torch.rand((), generator=rng).item() < soften_prob:
        image = soften(image, rng)
    return image, {"boxes": boxes, "labels": data.labels[index]}


def train_step(model: FasterRCNN, data: Boxes, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
    """The losses of step `step`, by part."""
    rng = generator(args.seed, "detector", "step", step)
    indices = batch_indices(step, len(data.images), args.batch_size, args.seed, "detector").tolist()
    pairs = [training_pair(data, index, args.soften_prob, rng) for index in indices]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(
            derive_seed(args.seed, "detector", "sampler", step)
        )  # torchvision's sampler takes no generator
        return model([image for image, _ in pairs], [target for _, target in pairs])


def train(args: argparse.Namespace, data: Boxes) -> FasterRCNN:
    """Trains from the state beside the output, if there is one, or from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(args.seed, "detector", "init"))  # layer initialisers know no other generator
        model = build_detector(args.arch, len(data.categories) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    state_path, settings = state_file(args.output), resumable_settings(args)
    start = 0
    if state := load_state(state_path, settings):
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"continuing from {state_path} at step {start}", flush=True)
    model.train()
    began = time.time()
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        parts = train_step(model, data, args, step)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            report(done, args.steps, loss.item(), parts, (time.time() - began) / (done - start))
        if done % args.save_freq == 0:
            save_state(state_path, settings, done, model=model.state_dict(), optimizer=optimizer.state_dict())
    return model


def report(done: int, steps: int, loss: float, parts: dict[str, Tensor], seconds: float) -> None:
    """One line of progress. Raises FloatingPointError on a loss that is not finite."""
    numbers = " ".join(f"{name.removeprefix('loss_')} {value.item():.4f}" for name, value in parts.items())
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {done}: {numbers}")
    print(f"step {done}/{steps} loss {loss:.4f} {numbers} {seconds:.3f} s/step", flush=True)


def state_file(output: Path) -> Path:
    return output.with_suffix(".state.pth")


def resumable_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with the one that was cut off."""
    free = {"data", "output", "save_freq", "log_freq", "overwrite", "debug"}
    return {key: value for key, value in vars(args).items() if key not in free}


def match_iou(boxes_px: Tensor, category_ids: Tensor, found: Detections, min_score: float) -> list[float]:
    """For each true box the largest IoU with a detection of its own class scored at least `min_score` (0 if none)."""
    kept = found.scores >= min_score
    overlaps = box_iou(boxes_px, found.boxes_px[kept])  # [k, n]
    overlaps = overlaps * (category_ids[:, None] == found.category_ids[kept][None])
    return overlaps.max(dim=1).values.tolist() if overlaps.shape[1] else [0.0] * len(boxes_px)


def evaluate(detector: BoxDetector, data: Boxes, batch_size: int = 25, min_score: float = 0.5) -> dict[str, float]:
    """AP (.50 to .95), AP50; of detections scored at least `min_score`, recall at IoU .5 and the mean IoU of those."""
    results: list[dict[str, Any]] = []
    overlaps: list[float] = []
    for start in range(0, len(data.images), batch_size):
        images = [image.float() / 255 for image in data.images[start : start + batch_size]]
        for offset, found in enumerate(detector(images)):
            image_id, index = data.image_ids[start + offset], start + offset
            true_ids = torch.tensor([category.id for category in data.categories])[data.labels[index] - 1]
            overlaps += match_iou(data.boxes_px[index], true_ids, found, min_score)
            for box, category_id, score in zip(found.boxes_px, found.category_ids, found.scores, strict=True):
                x0, y0, x1, y1 = box.tolist()
                entry = {"image_id": image_id, "category_id": int(category_id), "score": score.item()}
                results.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    matched = [value for value in overlaps if value >= 0.5]
    average_precision, at_50 = average_precisions(data, results)
    return {
        "AP": average_precision,
        "AP50": at_50,
        "recall": len(matched) / max(len(overlaps), 1),
        "mean_iou": float(np.mean(matched)) if matched else 0.0,
    }


def average_precisions(data: Boxes, results: list[dict[str, Any]]) -> tuple[float, float]:
    """COCO's AP and AP50 of `results` on the images of `data`."""
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data.coco, data.coco.loadRes(results), "bbox")
        evaluation.params.imgIds = data.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if args.output.is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    data = load_split(args.data, "train2017", args.max_images)
    held_out = load_split(args.data, "val2017", args.max_images)
    model = train(args, data)
    save_atomic(detector_checkpoint(model, args.arch, data.categories, torch.float16), args.output)
    state_file(args.output).unlink(missing_ok=True)
    detector = load_detector(args.output)
    scores = evaluate(detector, held_out)
    args.output.with_suffix(".json").write_text(
        json.dumps({"settings": resumable_settings(args), **scores}, indent=1) + "\n"
    )
    print("held-out: " + " ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    count, size = sum(p.numel() for p in model.parameters()), args.output.stat().st_size / 2**20
    print(f"{args.output}: {size:.2f} MiB, {count:,} parameters, id {detector.id}")
