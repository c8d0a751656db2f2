"""A small drawing kit: anti-aliased shapes on one transparent, square patch, with light from the upper left.

Shapes live in local units: the object is the square [-1, 1] x [-1, 1] (v points down), rotated and squeezed onto the
patch. Colours are RGB in [0, 1]. Objects that turn freely stay inside the unit disc: the patch's margin holds them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]

MARGIN = 1.25  # half width of the patch in local units
_SUBPIXEL_BITS = 4
_LIGHT = np.array([-0.48, -0.62, 0.62], dtype=np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells_y: int, cells_x: int) -> Array:
    """Noise in [0, 1], [height, width]: `cells_y` x `cells_x` random values, interpolated. Same picture at any size."""
    grid = rng.random((cells_y, cells_x), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0.0, 1.0)


def arc(
    centre: tuple[float, float], radii: tuple[float, float], start: float = 0.0, stop: float = 360.0, points: int = 48
) -> Array:
    """Points [points, 2] on an ellipse's arc; degrees, clockwise from +u (v points down)."""
    angles = np.deg2rad(np.linspace(start, stop, points))
    return np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=1).astype(
        np.float32
    )


def rounded_box(x0: float, y0: float, x1: float, y1: float, radius: float) -> Array:
    """Outline [n, 2] of a rectangle with round corners."""
    corners = [
        ((x1 - radius, y0 + radius), 270.0),
        ((x1 - radius, y1 - radius), 0.0),
        ((x0 + radius, y1 - radius), 90.0),
        ((x0 + radius, y0 + radius), 180.0),
    ]
    return np.concatenate([arc(centre, (radius, radius), start, start + 90.0, 8) for centre, start in corners])


def mix(first: ArrayLike, second: ArrayLike, weight: float | Array) -> Array:
    """first * (1 - weight) + second * weight; a weight image [h, w] gives a colour image [h, w, 3]."""
    amount = np.asarray(weight, dtype=np.float32)[..., None]
    return np.asarray(first, dtype=np.float32) * (1 - amount) + np.asarray(second, dtype=np.float32) * amount


class Pen:
    """Paints on a patch: `rgb` [p, p, 3] and `alpha` [p, p], both float32 in [0, 1] (colour not premultiplied)."""

    def __init__(self, diameter_px: float, angle_deg: float = 0.0, squeeze: tuple[float, float] = (1.0, 1.0)) -> None:
        self.unit_px = diameter_px / 2.0
        self.pixels = max(4, int(np.ceil(2 * MARGIN * self.unit_px)))
        turn = np.deg2rad(angle_deg)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self._to_screen = rotation @ np.diag(squeeze)  # local -> screen units
        axis = ((np.arange(self.pixels) + 0.5 - self.pixels / 2) / self.unit_px).astype(np.float32)
        self.x, self.y = np.meshgrid(axis, axis)  # screen units, [p, p]
        inverse = np.linalg.inv(self._to_screen).astype(np.float32)
        self.u = inverse[0, 0] * self.x + inverse[0, 1] * self.y  # local units, [p, p]
        self.v = inverse[1, 0] * self.x + inverse[1, 1] * self.y
        self.rgb = np.zeros((self.pixels, self.pixels, 3), dtype=np.float32)
        self.alpha = np.zeros((self.pixels, self.pixels), dtype=np.float32)

    def _to_pixels(self, points: ArrayLike) -> NDArray[np.int32]:
        local = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        pixels = local @ self._to_screen.T * self.unit_px + self.pixels / 2 - 0.5
        return np.round(pixels * 2**_SUBPIXEL_BITS).astype(np.int32)

    def polygon(self, *outlines: ArrayLike) -> Array:
        """Coverage [p, p] of filled outlines, each [n, 2]; several outlines are joined."""
        canvas = np.zeros((self.pixels, self.pixels), dtype=np.uint8)
        for outline in outlines:
            cv2.fillPoly(canvas, [self._to_pixels(outline)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return canvas.astype(np.float32) / 255.0

    def ellipse(self, centre: tuple[float, float], rx: float, ry: float | None = None) -> Array:
        """Coverage [p, p] of a filled ellipse."""
        return self.polygon(arc(centre, (rx, rx if ry is None else ry)))

    def stroke(self, width: float, *lines: ArrayLike) -> Array:
        """Coverage [p, p] of open lines, each [n, 2], `width` local units thick (at least one pixel)."""
        canvas = np.zeros((self.pixels, self.pixels), dtype=np.uint8)
        thickness = max(1, round(width * self.unit_px))
        for line in lines:
            cv2.polylines(canvas, [self._to_pixels(line)], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        return canvas.astype(np.float32) / 255.0

    def paint(self, mask: Array, colour: ArrayLike, opacity: float = 1.0) -> None:
        """Lays `colour` (one colour or an image [p, p, 3]) over the patch where `mask` covers it."""
        added = mask * np.float32(opacity)
        total = added + self.alpha * (1 - added)
        share = np.divide(added, total, out=np.zeros_like(added), where=total > 0)[..., None]
        self.rgb = np.asarray(colour, dtype=np.float32) * share + self.rgb * (1 - share)
        self.alpha = total

    def tint(self, mask: Array, colour: ArrayLike, opacity: float = 1.0) -> None:
        """Like `paint`, but only on what is painted already: the object's outline does not grow."""
        amount = (mask * np.float32(opacity))[..., None]
        self.rgb = np.asarray(colour, dtype=np.float32) * amount + self.rgb * (1 - amount)

    def erase(self, mask: Array) -> None:
        """Makes the patch transparent under `mask`."""
        self.alpha = self.alpha * (1 - mask)

    def sphere_light(self, centre: tuple[float, float] = (0.0, 0.0), radius: float = 1.0) -> Array:
        """Diffuse light [p, p] in [0, 1] on a ball."""
        x, y = self.to_screen(centre)
        nx, ny = (self.x - x) / radius, (self.y - y) / radius
        nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.0, 1.0))
        return np.clip(nx * _LIGHT[0] + ny * _LIGHT[1] + nz * _LIGHT[2], 0.0, 1.0)

    def to_screen(self, point: tuple[float, float]) -> tuple[float, float]:
        x, y = self._to_screen @ np.asarray(point)
        return float(x), float(y)

    def glow(self, screen_centre: tuple[float, float], radius: float) -> Array:
        """A soft spot [p, p], 1 at its centre; position in screen units (light does not turn with the object)."""
        squared = (self.x - screen_centre[0]) ** 2 + (self.y - screen_centre[1]) ** 2
        return np.exp(-squared / np.float32(radius**2))

    def round_body(self, mask: Array, colour: ArrayLike, radius: float = 1.0, gloss: float = 0.5) -> None:
        """Paints a ball-like body: shaded colour, darker towards its rim, a highlight at the upper left."""
        light = self.sphere_light(radius=radius)
        base = np.asarray(colour, dtype=np.float32)
        self.paint(mask, np.clip(base * (0.50 + 0.62 * light)[..., None], 0.0, 1.0))
        self.tint(mask * self.glow((-0.38 * radius, -0.42 * radius), 0.24 * radius), (1.0, 1.0, 1.0), gloss)
