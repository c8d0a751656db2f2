"""Five Chinese captions for a scene, of the same objects and the same place as the English ones of captions.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from scripts.mini.captions import CLEAR_GAP, Named

NOUNS = {
    "traffic light": "红绿灯", "stop sign": "停车标志", "umbrella": "雨伞", "sports ball": "球", "kite": "风筝",
    "banana": "香蕉", "apple": "苹果", "orange": "橙子", "donut": "甜甜圈", "tv": "电视机", "clock": "时钟",
    "vase": "花瓶",
}  # fmt: skip
COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "white": "白色", "brown": "棕色",
}  # fmt: skip
PLACES = {
    "in the sky": "天空中", "on the grass": "草坪上", "in a meadow": "草地上", "on a beach": "沙滩上",
    "in front of a wall": "墙前", "in front of a brick wall": "砖墙前", "on a wooden table": "木桌上",
    "on a tiled floor": "瓷砖地上", "on a checked cloth": "格子布上",
}  # fmt: skip
SIZES = {"small": "小", "large": "大", "": ""}
NUMBERS = ("", "一", "两", "三", "四", "五", "六", "七", "八")


def words(item: Named, has_size: bool = False) -> str:
    """Colour, size and noun, as far as they are named: 红色的大雨伞."""
    colour = "" if item.colour is None else f"{COLOURS[item.colour]}的"
    return f"{colour}{SIZES[item.size] if has_size else ''}{NOUNS[item.noun]}"


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{'、'.join(parts[:-1])}和{parts[-1]}"


def listed(objects: Sequence[Named], has_size: bool = False) -> str:
    """Every kind with its number, in order of appearance: 一个红色的风筝和两个橙子."""
    counts = Counter(words(item, has_size) for item in objects)
    return join([f"{NUMBERS[number]}个{name}" for name, number in counts.items()])


def related(objects: Sequence[Named], place: str, rng: np.random.Generator, sideways: bool) -> str | None:
    """Where one of two objects is beside the other: 沙滩上，一个风筝在一个时钟的左边. None where these are of one kind
    or not clearly apart."""
    order = rng.permutation(len(objects))
    first, second = objects[order[0]], objects[order[1]]
    axis = 0 if sideways else 1
    gap = first.centre[axis] - second.centre[axis]
    if words(first) == words(second) or abs(gap) < CLEAR_GAP:
        return None
    side = ("左边" if gap < 0 else "右边") if sideways else ("上面" if gap < 0 else "下面")
    rest = [objects[index] for index in range(len(objects)) if index not in (order[0], order[1])]
    others = f"，还有{listed(rest)}" if rest else ""
    return f"{place}，一个{words(first)}在一个{words(second)}的{side}{others}"


def write_chinese(objects: Sequence[Named], english_place: str, rng: np.random.Generator) -> list[str]:
    """Five captions. The first three never say left or right, so that a horizontal flip leaves them true."""
    place = PLACES[english_place]
    shuffled = [objects[index] for index in rng.permutation(len(objects))]
    total = f"{NUMBERS[len(objects)]}个物体：{listed(objects)}"
    openings = [f"一张图片，{place}有{listed(objects)}", f"这里{place}有{listed(shuffled)}", total]
    captions = [f"{place}有{listed(objects)}", listed(shuffled), openings[int(rng.integers(len(openings)))]]
    sized = f"{place}有{listed(shuffled, has_size=True)}"
    if len(objects) == 1:
        return [*captions, sized, f"{place}只有{listed(objects)}"]
    above = related(objects, place, rng, sideways=False) or f"{place}有{listed(shuffled)}"
    return [*captions, above, related(objects, place, rng, sideways=True) or sized]
