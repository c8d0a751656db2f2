"""Textured backgrounds of the mini world: canvas size and generator in, RGB [size, size, 3] in [0, 1] out.

They are paler and less saturated than the objects; the same generator gives the same picture at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from scripts.mini.pen import Array, mix, smooth_noise


def _axes(size: int) -> tuple[Array, Array]:
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _sky(size: int, rng: np.random.Generator) -> Array:
    _, y = _axes(size)
    top = np.array([0.40, 0.62, 0.90]) * rng.uniform(0.85, 1.08)
    picture = mix(np.clip(top, 0, 1), (0.84, 0.92, 0.98), y)
    clouds = 0.6 * smooth_noise(rng, size, size, 6, 4) + 0.4 * smooth_noise(rng, size, size, 14, 9)
    return mix(picture, (0.98, 0.98, 0.99), np.clip((clouds - 0.52) * 3.2, 0, 0.85))


def _grass(size: int, rng: np.random.Generator) -> Array:
    patches = smooth_noise(rng, size, size, 7, 7)
    blades = smooth_noise(rng, size, size, 30, 60)
    base = mix((0.40, 0.56, 0.27), (0.56, 0.68, 0.36), patches)
    return base * (0.86 + 0.24 * blades)[..., None]


def _meadow(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    sky, grass = _sky(size, rng), _grass(size, rng)
    horizon = rng.uniform(0.50, 0.66) + 0.03 * np.sin(x * rng.uniform(3, 7) + rng.uniform(0, 6))
    return mix(sky, grass, np.clip((y - horizon) * size / 3 + 0.5, 0, 1))


def _beach(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    sea = mix((0.38, 0.66, 0.80), (0.56, 0.80, 0.86), smooth_noise(rng, size, size, 24, 5))
    sand = mix((0.88, 0.80, 0.62), (0.95, 0.89, 0.74), smooth_noise(rng, size, size, 40, 40))
    shore = rng.uniform(0.36, 0.52) + 0.03 * np.sin(x * rng.uniform(4, 9) + rng.uniform(0, 6))
    sky = mix((0.66, 0.82, 0.95), (0.90, 0.95, 0.98), y * 3)
    picture = mix(sky, sea, np.clip((y - 0.24) * size / 3 + 0.5, 0, 1))
    picture = mix(picture, (0.98, 0.98, 0.97), np.exp(-(((y - shore) / 0.012) ** 2)))
    return mix(picture, sand, np.clip((y - shore) * size / 3 + 0.5, 0, 1))


def _wall(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    tones = [(0.86, 0.83, 0.76), (0.76, 0.82, 0.84), (0.84, 0.78, 0.80), (0.80, 0.85, 0.76), (0.88, 0.87, 0.86)]
    tone = np.array(tones[int(rng.integers(len(tones)))])
    light = 1.06 - 0.22 * np.hypot(x - rng.uniform(0.1, 0.6), y - rng.uniform(0.0, 0.4))
    plaster = 1 + 0.05 * (smooth_noise(rng, size, size, 32, 32) - 0.5)
    return tone * (light * plaster)[..., None]


def _bricks(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    rows = int(rng.integers(7, 11))
    row = np.floor(y * rows)
    column = x * rows / 2.2 + 0.5 * (row % 2) + rng.uniform(0, 1)
    tones = rng.random((rows + 1, rows + 2), dtype=np.float32)
    tone = tones[row.astype(int), np.floor(column).astype(int) % (rows + 2)]
    brick = (
        mix((0.66, 0.46, 0.40), (0.79, 0.60, 0.51), tone)
        * (0.93 + 0.14 * smooth_noise(rng, size, size, 48, 48))[..., None]
    )
    gap_y = np.minimum(y * rows - row, 1 - (y * rows - row))
    gap_x = np.minimum(column - np.floor(column), 1 - (column - np.floor(column))) * 2.2
    return mix((0.82, 0.78, 0.73), brick, np.clip((np.minimum(gap_x, gap_y) - 0.05) * 24, 0, 1))


def _planks(size: int, rng: np.random.Generator) -> Array:
    _, y = _axes(size)
    count = int(rng.integers(4, 7))
    plank = np.floor(y * count)
    tone = rng.random(count + 1, dtype=np.float32)[plank.astype(int)]
    grain = smooth_noise(rng, size, size, 56, 5)
    dark, pale = [((0.60, 0.43, 0.28), (0.76, 0.59, 0.41)), ((0.72, 0.58, 0.42), (0.86, 0.74, 0.58))][
        int(rng.integers(2))
    ]
    picture = mix(dark, pale, np.clip(0.55 * tone + 0.5 * grain, 0, 1))
    gap = np.minimum(y * count - plank, 1 - (y * count - plank))
    return picture * (0.72 + 0.28 * np.clip(gap * 26, 0, 1))[..., None]


def _tiles(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    count = int(rng.integers(4, 7))
    column, row = np.floor(x * count), np.floor(y * count)
    pale, dark = [((0.93, 0.93, 0.91), (0.74, 0.79, 0.83)), ((0.92, 0.90, 0.86), (0.80, 0.74, 0.68))][
        int(rng.integers(2))
    ]
    picture = mix(pale, dark, (column + row) % 2)
    gap = np.minimum(
        np.minimum(x * count - column, 1 - (x * count - column)), np.minimum(y * count - row, 1 - (y * count - row))
    )
    picture = mix((0.66, 0.66, 0.66), picture, np.clip((gap - 0.012) * 40, 0, 1))
    return picture * (1.03 - 0.14 * (x + y) / 2 + 0.03 * smooth_noise(rng, size, size, 12, 12))[..., None]


def _cloth(size: int, rng: np.random.Generator) -> Array:
    x, y = _axes(size)
    count = int(rng.integers(5, 9))
    tone = [(0.55, 0.66, 0.78), (0.78, 0.60, 0.60), (0.62, 0.72, 0.58)][int(rng.integers(3))]
    stripes = 0.5 * (np.floor(x * count * 2) % 2) + 0.5 * (np.floor(y * count * 2) % 2)
    folds = 0.95 + 0.10 * smooth_noise(rng, size, size, 4, 6)
    return mix((0.95, 0.94, 0.91), tone, np.float32(0.75) * stripes.astype(np.float32)) * folds[..., None]


@dataclass(frozen=True)
class Background:
    """How a background is drawn and said; `shadow` is the depth of the shadows that objects cast on it."""

    phrase: str
    draw: Callable[[int, np.random.Generator], Array]
    is_outdoors: bool
    shadow: float


BACKGROUNDS: tuple[Background, ...] = (
    Background("in the sky", _sky, True, 0.10),
    Background("on the grass", _grass, True, 0.34),
    Background("in a meadow", _meadow, True, 0.26),
    Background("on a beach", _beach, True, 0.26),
    Background("in front of a wall", _wall, False, 0.30),
    Background("in front of a brick wall", _bricks, False, 0.32),
    Background("on a wooden table", _planks, False, 0.36),
    Background("on a tiled floor", _tiles, False, 0.32),
    Background("on a checked cloth", _cloth, False, 0.32),
)


def draw_background(index: int, size: int, rng: np.random.Generator) -> Array:
    """Background `index` of BACKGROUNDS as RGB [size, size, 3] in [0, 1]."""
    picture = np.clip(BACKGROUNDS[index].draw(size, rng), 0.0, 1.0).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), size / 400), dtype=np.float32)
