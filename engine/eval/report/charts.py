"""Bars of the evaluation report as inline SVG, and how its numbers are written.

A chart is text: no script, no fonts, no files. Its colours are classes that the page's style sheet defines, so light
and dark mode are one drawing. Every bar's number stands beside it, readable for screen readers too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASH = "–"  # a figure that is undefined or was not measured
MAX_LABEL = 20  # characters

WIDTH = 460  # of a chart; all measures are px at its natural size
PLOT = (150, 358)  # left and right end of the bars: 0 and 100 %
VALUE_ENDS = (410, WIDTH - 2)  # right ends of the two columns of numbers
TOP = 34  # above the first bar: the names of the columns
PITCH = 22
BOUND_HEIGHT, VALUE_HEIGHT = 14, 6


@dataclass(frozen=True)
class Bar:
    """One line of a chart. value, bound: shares in [0, 1] or None; note: small print after the label."""

    label: str
    value: float | None
    bound: float | None
    note: str = ""


def format_number(value: float | None, factor: float = 100.0, digits: int = 1) -> str:
    """`value * factor` with that many decimals; a dash for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value * factor + 0.0:.{digits}f}"


def bar_chart(title: str, bars: Sequence[Bar], value_name: str, bound_name: str | None) -> str:
    """Horizontal bars, 0 to 100 %: the value in front, its bound as a wider, paler bar behind it.

    value_name, bound_name: of the rows, for the accessible name. bound_name None: the values alone.
    """
    height = TOP + PITCH * len(bars) + 6
    against = f" beside {bound_name}" if bound_name else ""
    name = f"{title}: {value_name}{against}, in percent, {len(bars)} bars"
    lines = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(name)}">',
        f'<text class="chart-title" x="0" y="13">{escape(title)}</text>',
        *_axis(height),
        f'<text class="end strong" x="{VALUE_ENDS[0]}" y="{TOP - 7}">value</text>',
    ]
    if bound_name:
        lines.append(f'<text class="end quiet" x="{VALUE_ENDS[1]}" y="{TOP - 7}">bound</text>')
    for index, bar in enumerate(bars):
        lines += _bar(bar, TOP + PITCH * index, bound_name is not None)
    return "\n".join([*lines, "</svg>"])


def _axis(height: int) -> list[str]:
    lines = []
    for percent in (0, 25, 50, 75, 100):
        x = _position(percent / 100)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 3}" y2="{height - 4}"/>')
        lines.append(f'<text class="middle quiet" x="{x:.1f}" y="{TOP - 7}">{percent}</text>')
    return lines


def _bar(bar: Bar, top: int, has_bound: bool) -> list[str]:
    baseline = top + PITCH / 2 + 4
    note = f' <tspan class="quiet">{escape(bar.note)}</tspan>' if bar.note else ""
    label = escape(_short(bar.label, MAX_LABEL - len(bar.note)))
    value, bound = format_number(bar.value), format_number(bar.bound)
    hover = f"{bar.label}: {value}" + (f", bound {bound}" if has_bound else "")
    lines = [
        f"<g><title>{escape(hover)}</title>",
        f'<text class="end" x="{PLOT[0] - 8}" y="{baseline}">{label}{note}</text>',
    ]
    if has_bound:
        lines.append(_rect("bar-bound", bar.bound, top, BOUND_HEIGHT))
        lines.append(f'<text class="end quiet" x="{VALUE_ENDS[1]}" y="{baseline}">{bound}</text>')
    lines.append(_rect("bar-value", bar.value, top, VALUE_HEIGHT if has_bound else BOUND_HEIGHT))
    lines.append(f'<text class="end strong" x="{VALUE_ENDS[0]}" y="{baseline}">{value}</text></g>')
    return [line for line in lines if line]


def _rect(kind: str, value: float | None, top: int, height: int) -> str:
    """Nothing for an undefined value: a bar of length 0 would be a zero."""
    if value is None or not math.isfinite(value):
        return ""
    width, y = max(_position(value) - PLOT[0], 0.0), top + (PITCH - height) / 2
    return f'<rect class="{kind}" x="{PLOT[0]}" y="{y:.1f}" width="{width:.1f}" height="{height}"/>'


def _position(share: float) -> float:
    return PLOT[0] + (PLOT[1] - PLOT[0]) * min(max(share, 0.0), 1.0)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(limit - 1, 1)] + "…"
