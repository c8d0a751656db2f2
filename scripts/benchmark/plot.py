"""The benchmark as one PNG: seconds of every contender relative to its case's first, and the cost curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.benchmark.curves import Curve
from scripts.benchmark.table import Row
from util.images import Picture

WIDTH, BAR_HEIGHT, BAR_LEFT = 1040, 17, 430
PANEL_SIZE = (520, 300)
MARGINS = (64, 40, 24, 36)  # left, top, right, bottom of the plot in its panel
BLACK, GREY, PALE = (0, 0, 0), (90, 90, 90), (225, 225, 225)
FIRST, LATER, LINE = (160, 160, 160), (0, 114, 178), (213, 94, 0)


def plot(rows: Sequence[Row], curves: Sequence[Curve]) -> Picture:
    """[H, W, 3] uint8. Raises ValueError if there is nothing to draw."""
    parts = [draw_bars(rows)] if rows else []
    panels = [draw_curve(curve) for curve in curves]
    parts += [beside(panels[index : index + 2]) for index in range(0, len(panels), 2)]
    if not parts:
        raise ValueError("there is nothing to draw: no case was timed")
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return np.asarray(sheet)


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, PANEL_SIZE[1]), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * PANEL_SIZE[0], 0))
    return sheet


def draw_bars(rows: Sequence[Row]) -> Image.Image:
    """A bar per row, as long as the times it is faster than its case's first contender (grey)."""
    speedups = [next(iter(row.ratios.values())) for row in rows]
    sheet = Image.new("RGB", (WIDTH, 40 + BAR_HEIGHT * len(rows) + 10), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((8, 10), "times faster than the case's first contender", fill=BLACK, font=ImageFont.load_default(15))
    unit = (WIDTH - BAR_LEFT - 60) / max(*speedups, 1.0)
    for index, (row, speedup) in enumerate(zip(rows, speedups, strict=True)):
        top = 40 + BAR_HEIGHT * index
        is_first = index == 0 or (rows[index - 1].case, rows[index - 1].images) != (row.case, row.images)
        colour = FIRST if is_first else LATER
        label = f"{row.case}, batch {row.images}: {row.who}, {row.precision}"
        draw.text((BAR_LEFT - 8, top + BAR_HEIGHT / 2), label, fill=BLACK, font=font, anchor="rm")
        draw.rectangle((BAR_LEFT, top + 3, BAR_LEFT + unit * speedup, top + BAR_HEIGHT - 3), fill=colour)
        right = BAR_LEFT + unit * speedup + 6
        draw.text((right, top + BAR_HEIGHT / 2), f"{speedup:.2f}", fill=GREY, font=font, anchor="lm")
    return sheet


def draw_curve(curve: Curve) -> Image.Image:
    """Seconds over a number, both axes logarithmic; the pale line is proportional growth."""
    panel = Image.new("RGB", PANEL_SIZE, "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    left, top = MARGINS[0], MARGINS[1]
    right, bottom = PANEL_SIZE[0] - MARGINS[2], PANEL_SIZE[1] - MARGINS[3]
    draw.text((left, 10), f"seconds over {curve.name}", fill=BLACK, font=ImageFont.load_default(15))
    values = np.array(list(curve.seconds), dtype=np.float64)
    seconds = np.array(list(curve.seconds.values()))
    proportional = seconds[0] * values / values[0]
    ends = (min(seconds.min(), proportional.min()) / 1.2, max(seconds.max(), proportional.max()) * 1.2)

    def place(y: np.ndarray) -> list[tuple[float, float]]:
        share_x = np.log(values / values[0]) / math.log(values[-1] / values[0])
        share_y = np.log(y / ends[0]) / math.log(ends[1] / ends[0])
        x, height = left + (right - left) * share_x, bottom - (bottom - top) * share_y
        return list(zip(x.tolist(), height.tolist(), strict=True))

    draw.line((left, bottom, right, bottom), fill=GREY)
    draw.line((left, top, left, bottom), fill=GREY)
    draw.line(place(proportional), fill=PALE, width=2)
    points = place(seconds)
    draw.line(points, fill=LINE, width=3, joint="curve")
    for (x, y), value, second in zip(points, curve.seconds, seconds, strict=True):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINE)
        draw.text((x, bottom + 6), str(value), fill=GREY, font=font, anchor="mt")
        draw.text((x, y - 8), f"{second:.3g}", fill=GREY, font=font, anchor="mb")
    return panel
