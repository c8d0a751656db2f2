"""A tiny folder of pictures by class: each class has its colour, no two pictures the same size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"n01_plum": (20, 20, 230), "n02_leaf": (20, 200, 20), "n10_tomato": (230, 20, 20)}
NUM_PICTURES = {"n01_plum": 4, "n02_leaf": 3, "n10_tomato": 2}


def write_class_folder(root: Path) -> Path:
    """Returns `root`, which holds train/<class>/*.JPEG. The left half of every picture is darker."""
    for name, color in COLORS.items():
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(NUM_PICTURES[name]):
            pixels = np.full((40 + number, 36 + 2 * number, 3), color, dtype=np.uint8)
            pixels[:, : pixels.shape[1] // 2] //= 2
            Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG", quality=95)
    return root
