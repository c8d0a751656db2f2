"""The benchmark as one PNG: how much faster every contender is than its case's first, and the cost curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scripts.benchmark.curves import Curve
from scripts.benchmark.table import Row
from util.images import Picture
from util.plots import COLOURS, COLUMNS, GREY, PALE, PANEL_SIZE, new_figure, picture_of, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = COLUMNS * PANEL_SIZE[0]
BAR_HEIGHT, BARS_EDGE = 18, 60  # px of a bar, and above and below them all
FIRST, LATER, LINE = "#a0a0a0", COLOURS[0], COLOURS[-1]


def plot(rows: Sequence[Row], curves: Sequence[Curve]) -> Picture:
    """[H, W, 3] uint8. Raises ValueError if there is nothing to draw."""
    heights = [BAR_HEIGHT * len(rows) + BARS_EDGE] if rows else []
    heights += [PANEL_SIZE[1]] * math.ceil(len(curves) / COLUMNS)
    if not heights:
        raise ValueError("there is nothing to draw: no case was timed")
    figure = new_figure(WIDTH, sum(heights))
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if rows:
        draw_bars(parts.pop(0).subplots(), rows)
    for start, part in zip(range(0, len(curves), COLUMNS), parts, strict=True):
        panels = list(part.subplots(1, COLUMNS, squeeze=False).flat)
        for axes, curve in zip(panels, curves[start : start + COLUMNS], strict=False):
            draw_curve(axes, curve)
        for axes in panels[len(curves) - start :]:
            axes.set_axis_off()
    return picture_of(figure)


def draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar per row, as long as the times it is faster than its case's first contender (grey)."""
    speedups = [next(iter(row.ratios.values())) for row in rows]
    cases = [(row.case, row.images) for row in rows]
    is_first = [index == 0 or cases[index - 1] != case for index, case in enumerate(cases)]
    labels = [f"{row.case}, batch {row.images}: {row.who}, {row.precision}" for row in rows]
    style_axes(axes, "times faster than the case's first contender")
    places = np.arange(len(rows))
    bars = axes.barh(places, speedups, height=0.7, color=[FIRST if each else LATER for each in is_first])
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=8, color=GREY)
    axes.set_yticks(places, labels, fontsize=8, color="black")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def draw_curve(axes: Axes, curve: Curve) -> None:
    """Seconds over a number, both axes logarithmic; the pale line is proportional growth."""
    values = np.array(list(curve.seconds), dtype=np.float64)
    seconds = np.array(list(curve.seconds.values()))
    style_axes(axes, f"seconds over {curve.name}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(values, seconds[0] * values / values[0], color=PALE, linewidth=2)
    axes.plot(values, seconds, color=LINE, linewidth=2, marker="o", markersize=4)
    for value, second in zip(values, seconds, strict=True):
        axes.annotate(f"{second:.3g}", (value, second), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(values, [str(value) for value in curve.seconds])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_yticks([])
