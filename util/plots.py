"""Plots by matplotlib, an extra: how a figure looks, and the curves of several runs' metrics.jsonl.

Thin lines are the values, thick ones their moving median over a tenth of a run. Colours are Okabe and Ito's, which are
told apart with every common colour blindness.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.extras import import_extra
from util.images import Picture
from util.read import read_text, short_repr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
GREY, PALE = "#5a5a5a", "#e1e1e1"
PANEL_SIZE = (520, 300)  # px
LEGEND_HEIGHT = 36
COLUMNS = 2
_DOTS_PER_INCH = 100
_SMOOTHED_SHARE = 0.1  # of a run's points, in the moving median
_MIN_POINTS_TO_SMOOTH = 30


# --- figures ---------------------------------------------------------------------------------------------------------


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of this size in px. Raises ValueError if matplotlib is not installed."""
    module = import_extra("matplotlib.figure", "plots")
    figure: Figure = module.Figure((width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    return figure


def picture_of(figure: Figure) -> Picture:
    """What the figure shows: uint8 [H, W, 3]."""
    canvas = import_extra("matplotlib.backends.backend_agg", "plots").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def style_axes(axes: Axes, title: str) -> None:
    """The title at the left; no frame but the lower line; pale lines at the ticks of y."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9, left=False)
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """steps: [n], rising; values: [n], finite."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Step -> its numbers, those of several lines of one step together; null is left out.

    Raises FileNotFoundError, or ValueError naming file and line for what is not a metrics line.
    """
    found: dict[int, dict[str, float]] = {}
    for number, text in enumerate(read_text(path, "metrics").splitlines(), 1):
        try:
            line = json.loads(text)
            step = line.pop("step")
            values = {key: value for key, value in line.items() if value is not None}
            if not all(_is_number(value) for value in (step, *values.values())):
                raise ValueError("not all of its values are finite numbers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is no line of metrics: {short_repr(text)}") from error
        found.setdefault(step, {}).update(values)
    return dict(sorted(found.items()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve_of(name: str, metrics: Mapping[int, Mapping[str, float]], key: str) -> Curve | None:
    """The values of `key` where there are any; None if there are none."""
    points = [(step, values[key]) for step, values in metrics.items() if key in values]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    return Curve(name, steps, values)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving median [n] over a tenth of the points (fewer at the ends); short curves stay as they are."""
    if len(values) < _MIN_POINTS_TO_SMOOTH:
        return values
    half = max(1, round(_SMOOTHED_SHARE * len(values) / 2))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.array([np.median(values[start:end]) for start, end in zip(low, high, strict=True)])


def value_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Lowest and highest of the smoothed values and the central 98 % of all, with a margin of 5 %."""
    every = np.concatenate([curve.values for curve in curves])
    thick = np.concatenate([smoothed(curve.values) for curve in curves])
    low = min(float(np.percentile(every, 1)), float(thick.min()))
    high = max(float(np.percentile(every, 99)), float(thick.max()))
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-6)
    return low - margin, high + margin


def metrics_figure(metrics: Mapping[str, Mapping[int, Mapping[str, float]]], panels: Mapping[str, str]) -> Figure:
    """metrics: name of a run -> `read_metrics`. panels: key -> title, a panel each; one that no run has stays empty.

    Raises ValueError for no run or more runs than there are colours.
    """
    if not 0 < len(metrics) <= len(COLOURS):
        raise ValueError(f"expected 1 to {len(COLOURS)} runs, got {len(metrics)}: {', '.join(metrics)}")
    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = new_figure(columns * PANEL_SIZE[0], rows * PANEL_SIZE[1] + LEGEND_HEIGHT)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = dict(zip(metrics, COLOURS, strict=False))
    for axes, (key, title) in zip(places, panels.items(), strict=False):
        curves = [curve for name, values in metrics.items() if (curve := curve_of(name, values, key)) is not None]
        _draw_panel(axes, title, curves, colours)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles = [axes.plot([], [], color=colour, linewidth=3, label=name)[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=11)
    return figure


def _draw_panel(axes: Axes, title: str, curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    style_axes(axes, title)
    if not curves:
        axes.text(0.02, 0.9, "not measured", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for curve in curves:
        if len(curve.values) >= _MIN_POINTS_TO_SMOOTH:
            axes.plot(curve.steps, curve.values, color=colours[curve.name], alpha=0.35, linewidth=0.7)
    for curve in curves:
        marker = "o" if len(curve.values) < _MIN_POINTS_TO_SMOOTH else None
        thick = smoothed(curve.values)
        axes.plot(curve.steps, thick, color=colours[curve.name], linewidth=2, marker=marker, markersize=4)
    axes.set_ylim(*value_range(curves))
    axes.set_xlim(0, 1.01 * max(float(curve.steps.max()) for curve in curves) or 1)
