"""Scenes of the mini world: one to five objects with COCO's own class names on a textured background, with exact boxes.

A scene is first planned (what, where, which colour, back to front) and then drawn: at 2 to 4 times the asked
resolution, objects with shading and a soft shadow, then averaged down. An object's mask is every pixel it still covers
by at least `MASK_COVERAGE` after nearer objects are laid over it; its box is that mask's exact extent, as in COCO. All
draws come from the generator given, so a scene is a function of its seed; the plan does not depend on the resolution.
Scenes may be oblong: lengths are then relative to the shorter side, so that objects are as large as in its square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from scripts.mini.backgrounds import BACKGROUNDS, draw_background
from scripts.mini.captions import Named, write_captions
from scripts.mini.chinese import write_chinese
from scripts.mini.drawing import CLASS_BY_ID, CLASSES, COLOURS, draw_object
from scripts.mini.pen import Array
from util.boxes import as_size
from util.buckets import Size

MASK_COVERAGE = 0.4
MIN_VISIBLE = 0.6
MAX_OBJECTS = 8
MAX_TRIES = 200
SQUARE = (1.0, 1.0)  # width and height in shorter sides


@dataclass(frozen=True)
class PlannedObject:
    """One object before drawing; lengths and positions are relative to the image's shorter side."""

    category_id: int
    colour: str | None  # the name used in captions; None where the class has one colour only
    rgb: tuple[float, float, float]
    centre: tuple[float, float]
    length: float
    angle_deg: float
    stretch: float
    seed: int


@dataclass(frozen=True)
class ScenePlan:
    objects: tuple[PlannedObject, ...]  # back to front
    background: int
    background_seed: int


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; `bbox` is COCO's [x, y, w, h] in pixels, exactly around `mask`."""

    category_id: int
    name: str
    colour: str | None
    bbox: tuple[float, float, float, float]
    area: int
    visible_fraction: float
    mask: NDArray[np.bool_]  # [height, width], the visible pixels


@dataclass(frozen=True)
class Scene:
    image: NDArray[np.uint8]  # [height, width, 3] RGB
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]
    chinese: tuple[str, ...]  # captions of the same


def _jitter(rgb: tuple[float, float, float], rng: np.random.Generator) -> tuple[float, float, float]:
    shade = rng.uniform(0.92, 1.04)
    red, green, blue = (float(np.clip(c * shade + rng.uniform(-0.025, 0.025), 0, 1)) for c in rgb)
    return red, green, blue


def _plan_object(
    rng: np.random.Generator, category_id: int, length: float, extent: tuple[float, float] = SQUARE
) -> PlannedObject:
    entry = CLASS_BY_ID[category_id]
    colour = entry.colours[int(rng.integers(len(entry.colours)))]
    half = 0.5 * length
    (x_low, x_high), (y_low, y_high) = ((min(half, end / 2), max(end - half, end / 2)) for end in extent)
    return PlannedObject(
        category_id=category_id,
        colour=colour if entry.is_colour_named else None,
        rgb=_jitter(COLOURS[colour], rng),
        centre=(float(rng.uniform(x_low, x_high)), float(rng.uniform(y_low, y_high))),
        length=length,
        angle_deg=float(rng.uniform(-entry.turn_deg, entry.turn_deg)),
        stretch=float(rng.uniform(*entry.stretch)),
        seed=int(rng.integers(2**62)),
    )


def _is_clear(behind: PlannedObject, front: PlannedObject) -> bool:
    """Whether `front` hides little of `behind`, does not lie wholly before it, and is well apart from its own kind."""
    sides = [
        min(b + behind.length / 2, f + front.length / 2) - max(b - behind.length / 2, f - front.length / 2)
        for b, f in zip(behind.centre, front.centre, strict=True)
    ]
    shared = max(sides[0], 0.0) * max(sides[1], 0.0)
    is_same_class = behind.category_id == front.category_id
    return shared < (0.06 if is_same_class else 0.20) * behind.length**2 and shared < 0.4 * front.length**2


def _plan_background(rng: np.random.Generator, category_ids: Sequence[int]) -> int:
    """With probability 0.8 the background suits a random object of the scene: outdoor things are mostly outdoors."""
    choices = list(range(len(BACKGROUNDS)))
    if rng.random() < 0.8:
        outdoors = CLASS_BY_ID[category_ids[int(rng.integers(len(category_ids)))]].outdoors
        choices = [i for i in choices if BACKGROUNDS[i].is_outdoors == outdoors]
    return choices[int(rng.integers(len(choices)))]


def plan_scene(
    rng: np.random.Generator, num_objects: tuple[int, int] = (1, 5), extent: tuple[float, float] = SQUARE
) -> ScenePlan:
    """Plans `num_objects` (least, most) objects, 0.19 to 0.75 of the image's shorter side long, larger ones behind
    smaller ones. extent: the image's width and height, in shorter sides.

    An object for which no place is found is left out, so there may be fewer.
    """
    wanted = int(rng.integers(num_objects[0], num_objects[1] + 1))
    longest = {1: 0.75, 2: 0.62, 3: 0.52}.get(wanted, 0.45)
    ids = [int(rng.choice([entry.id for entry in CLASSES]))]
    while len(ids) < wanted:
        ids.append(ids[-1] if rng.random() < 0.2 else int(rng.choice([entry.id for entry in CLASSES])))
    lengths = np.sort(np.exp(rng.uniform(np.log(0.19), np.log(longest), wanted)))[::-1]
    planned: list[PlannedObject] = []
    for category_id, length in zip(rng.permutation(ids), lengths, strict=True):
        for _ in range(MAX_TRIES):
            candidate = _plan_object(rng, int(category_id), float(length), extent)
            if all(_is_clear(other, candidate) for other in planned):
                planned.append(candidate)
                break
    background = _plan_background(rng, [item.category_id for item in planned])
    return ScenePlan(tuple(planned), background, int(rng.integers(2**62)))


def plan_single(rng: np.random.Generator, category_id: int) -> ScenePlan:
    """One large object near the middle, for class-conditional pretraining."""
    planned = _plan_object(rng, category_id, float(rng.uniform(0.45, 0.85)))
    room = 0.5 * (1 - planned.length) * 0.7
    centre = (0.5 + float(rng.uniform(-room, room)), 0.5 + float(rng.uniform(-room, room)))
    planned = PlannedObject(**{**vars(planned), "centre": centre})
    return ScenePlan((planned,), _plan_background(rng, [category_id]), int(rng.integers(2**62)))


def _paste(canvas_shape: tuple[int, int], patch: Array, left: int, top: int) -> Array:
    """`patch` [p, p] (or [p, p, 3]) placed on an empty canvas, cut at its edges."""
    height, width = canvas_shape
    canvas = np.zeros((height, width, *patch.shape[2:]), dtype=np.float32)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + patch.shape[1], width), min(top + patch.shape[0], height)
    if x0 < x1 and y0 < y1:
        canvas[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas


def _draw_planned(item: PlannedObject, size: Size) -> tuple[Array, Array]:
    """RGB [height, width, 3] and alpha [height, width] of one object on its own, on the (enlarged) canvas."""
    unit = min(size)
    rgb, alpha = draw_object(
        item.category_id, item.rgb, item.length * unit, item.angle_deg, item.stretch, np.random.default_rng(item.seed)
    )
    left, top = (round(c * unit - alpha.shape[0] / 2) for c in item.centre)
    return _paste(size, rgb, left, top), _paste(size, alpha, left, top)


def _draw_background(index: int, size: Size, rng: np.random.Generator) -> Array:
    """The middle of a square background: [height, width, 3]."""
    side = max(size)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    return draw_background(index, side, rng)[top : top + size[0], left : left + size[1]].copy()


def _shrink(picture: Array, size: Size) -> Array:
    return np.asarray(cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA), dtype=np.float32)


def box_of(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """COCO box [x, y, w, h] exactly around a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)


def draw_scene(plan: ScenePlan, size: int | Size) -> tuple[NDArray[np.uint8], tuple[SceneObject, ...]]:
    """Draws a plan: image [height, width, 3] uint8 RGB, and its objects (back to front). size: (height, width), or a
    square's side."""
    size = as_size(size)
    scale = 4 if max(size) <= 128 else 2
    big, unit = (size[0] * scale, size[1] * scale), min(size) * scale
    canvas = _draw_background(plan.background, big, np.random.default_rng(plan.background_seed))
    depth = BACKGROUNDS[plan.background].shadow
    alphas: list[Array] = []
    for item in plan.objects:
        rgb, alpha = _draw_planned(item, big)
        shift = np.array([[1, 0, 0.05 * item.length * unit], [0, 1, 0.08 * item.length * unit]], dtype=np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, big[::-1]), (0, 0), 0.045 * item.length * unit)
        canvas *= 1 - depth * shadow[..., None]
        canvas += (rgb - canvas) * alpha[..., None]
        alphas.append(alpha)
    return (np.round(_shrink(canvas, size) * 255)).astype(np.uint8), _visible_objects(plan, alphas, size)


def _visible_objects(plan: ScenePlan, alphas: Sequence[Array], size: Size) -> tuple[SceneObject, ...]:
    objects: list[SceneObject] = []
    uncovered: Array = np.ones((1, 1), dtype=np.float32)
    for item, alpha in zip(reversed(plan.objects), reversed(alphas), strict=True):
        mask = _shrink(alpha * uncovered, size) >= MASK_COVERAGE
        whole = _shrink(alpha, size) >= MASK_COVERAGE
        uncovered = uncovered * (1 - alpha)
        visible = float(mask.sum() / whole.sum()) if whole.any() else 0.0
        box = box_of(mask) if mask.any() else (0.0, 0.0, 0.0, 0.0)
        name = CLASS_BY_ID[item.category_id].name
        objects.append(SceneObject(item.category_id, name, item.colour, box, int(mask.sum()), visible, mask))
    return tuple(reversed(objects))


def _captions(
    plan: ScenePlan, objects: Sequence[SceneObject], size: Size, seed: int, colour_words: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """In English and in Chinese; neither depends on the other."""
    named = []
    for item in objects:
        x, y, width, height = (value / side for value, side in zip(item.bbox, 2 * size[::-1], strict=True))
        length = max(item.bbox[2:]) / min(size)
        named.append(Named(item.name, item.colour if colour_words else None, (x + width / 2, y + height / 2), length))
    place = BACKGROUNDS[plan.background].phrase
    chinese = write_chinese(named, place, np.random.default_rng((seed, 1)))
    return tuple(write_captions(named, place, np.random.default_rng(seed))), tuple(chinese)


def render_scene(
    rng: np.random.Generator,
    size: int | Size = 64,
    num_objects: tuple[int, int] = (1, 5),
    colour_words: bool = True,
) -> Scene:
    """A random scene of `num_objects` (least, most) objects, each at least 0.6 visible. size: (height, width) in
    pixels, or a square's side. colour_words: False leaves colours out of the captions, and nothing else changes."""
    if not 1 <= num_objects[0] <= num_objects[1] <= MAX_OBJECTS:
        raise ValueError(f"num_objects (least, most) must be within 1 and {MAX_OBJECTS}, got {num_objects}")
    size = as_size(size)
    extent = size[1] / min(size), size[0] / min(size)
    for _ in itertools.count():
        plan = plan_scene(rng, num_objects, extent)
        if len(plan.objects) < num_objects[0]:
            continue
        caption_seed = int(rng.integers(2**62))
        image, objects = draw_scene(plan, size)
        if all(item.visible_fraction >= MIN_VISIBLE for item in objects):
            return Scene(image, objects, *_captions(plan, objects, size, caption_seed, colour_words))
    raise AssertionError("unreachable")


def render_single(rng: np.random.Generator, category_id: int, size: int = 64) -> Scene:
    """One object of class `category_id` (COCO id), large and near the middle, `size` x `size` pixels."""
    if category_id not in CLASS_BY_ID:
        raise ValueError(f"category id {category_id} is not drawn here; the mini world has {sorted(CLASS_BY_ID)}")
    plan = plan_single(rng, category_id)
    caption_seed = int(rng.integers(2**62))
    image, objects = draw_scene(plan, size)
    return Scene(image, objects, *_captions(plan, objects, as_size(size), caption_seed))
