"""A results.json and per_image.jsonl of an evaluation that never took place, for the report's tests."""

from __future__ import annotations

from typing import Any

LAYOUT = ("mIoU", "mIoU_image", "SR50", "SR50_image", "precision", "extra_rate", "centroid_distance", "confidence")
AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def figure(value: float | None, spread: float | None = 0.02) -> dict[str, float | None]:
    if value is None or spread is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - spread, "high": value + spread}


def row(name: str, kind: str, level: float) -> dict[str, Any]:
    """A row whose figures are all different: `level` times a share that depends on the place of the figure."""
    places = {key: level * (1 - 0.043 * index) for index, key in enumerate((*AP, *LAYOUT))}
    ap = {key: figure(places[key], 0.02 if key in AP[:3] else None) for key in AP}
    full = {key: figure(places[key] * 0.97, 0.02 if key in AP[:3] else None) for key in AP}
    areas = {area: {"count": 10 * k + 7, "mIoU": level * 0.3 * k, "SR50": level * 0.31 * k} for k, area in SIZES}
    classes = {
        name: {"count": 120 - 9 * k, "AP50": level * (1 - 0.05 * k), "mIoU": level * (0.9 - 0.06 * k), "SR50": level}
        for k, name in enumerate(("kite", "apple", "traffic light", "tv & <radio>"))
    }
    share = None if kind == "bound" and name == "real images" else {"AP": 101.5 * level, "AP50": 100 * level}
    return {
        "name": name,
        "kind": kind,
        "num_seeds": 3 if kind == "model" else 1,
        "full": full,
        "conditioned": ap,
        "layout": {key: figure(places[key]) for key in LAYOUT},
        "percent_of_bound": share and {**share, "mIoU": 98.7 * level},
        "per_class": classes,
        "per_size": areas,
        "quality": {"CLIP score (ViT-B/32)": 0.3111 * level} if kind == "model" else {},
    }


SIZES = ((1, "small"), (2, "medium"), (3, "large"))


def results(is_reward: bool = False) -> dict[str, Any]:
    return {
        "format": "structmar-eval-1",
        "profile": {
            "name": "mini",
            "hash": "0a1b2c3d4e5f",
            "description": "Drawn scenes at 64 px.",
            "unknown": ["The detector's <threshold> is not published; 0.3 here."],
            "settings": {"name": "mini", "geometry": "center_crop", "resolution": 64, "num_images": None},
        },
        "dataset": {
            "split": "val2017",
            "num_images": 500,
            "ids_hash": "91bc02d7aa10",
            "num_boxes": 1500,
            "num_conditioned": 1490,
            "removed": {"smaller than min_area": 10},
        },
        "detector": {"arch": "fasterrcnn_mini", "id": "feedc0de" * 8, "is_reward": is_reward, "unknown_categories": []},
        "source": {"kind": "checkpoint", "path": "output/stage2/checkpoint-last.pth"},
        "sampling": {"num_iter": 64, "cfg": 3.0},
        "seeds": [0, 1, 2],
        "num_resamples": 200,
        "rows": [
            row("real images", "bound", 0.953),
            row("VAE round trip", "bound", 0.911),
            row("model", "model", 0.637),
            row("no layout", "control", 0.081),
            row("shuffled layouts", "control", 0.017),
        ],
        "skipped": {"FID": "no Inception weights (--inception)"},
    }


def entry(image_id: int, miou: float | None, seed: int = 0, row: str = "model") -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "image_id": image_id,
        "file_name": f"{image_id:012d}.jpg",
        "prompt": f"picture {image_id}",
        "mIoU": miou,
        "SR50": 0.5,
        "extra": 1,
        "wanted": [{"name": "kite", "box": [4.0, 8.0, 30.0, 40.0]}],
        "detected": [{"name": "apple", "box": [6.0, 9.0, 28.0, 44.0], "score": 0.874}],
        "picture": None,
    }
