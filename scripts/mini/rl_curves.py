"""Learning curves of several runs as one PNG, from their metrics.jsonl.

    python -m scripts.mini.rl_curves --runs output/mini/rl_200_updates/elbo output/mini/rl_200_updates/no_kl \\
        --output curves.png

Four panels over updates: reward of the rollouts, held-out AP50 (by --eval_detector), KL to the reference, norm of the
gradient. Thin lines are the values, thick ones their moving median over a tenth of the run; a panel whose number no
run has stays empty. Colours are Okabe and Ito's, which are told apart with every common colour blindness.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.images import Picture, save_png
from util.logging import METRICS_NAME

PANELS = {
    "reward": "reward of the rollouts",
    "eval/AP50": "held-out AP50, another detector",
    "kl": "KL to stage 2",
    "grad_norm": "gradient norm",
}
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))
PANEL_SIZE = (520, 300)
MARGINS = (64, 34, 16, 32)  # left, top, right, bottom of the plot in its panel
LEGEND_HEIGHT = 34
NUM_TICKS = 5
GREY, PALE = (90, 90, 90), (225, 225, 225)
SMOOTHED_SHARE = 0.1  # of a run's points, in the moving median
MIN_POINTS_TO_SMOOTH = 30


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
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: main_rl.py writes it")
    found: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            step = line.pop("step")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is no line of metrics: {text[:80]!r}") from error
        found.setdefault(step, {}).update({key: value for key, value in line.items() if value is not None})
    return dict(sorted(found.items()))


def curve_of(name: str, metrics: Mapping[int, Mapping[str, float]], key: str) -> Curve | None:
    """The values of `key` where there are any; None if there are none."""
    points = [(step, values[key]) for step, values in metrics.items() if key in values]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    return Curve(name, steps, values)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving median [n] over a tenth of the points (fewer at the ends); short curves stay as they are."""
    if len(values) < MIN_POINTS_TO_SMOOTH:
        return values
    half = max(1, round(SMOOTHED_SHARE * len(values) / 2))
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


def draw_panel(title: str, curves: Sequence[Curve], colours: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """One plot with its axes, PANEL_SIZE."""
    panel = Image.new("RGB", PANEL_SIZE, "white")
    draw = ImageDraw.Draw(panel)
    left, top, right, bottom = MARGINS
    right, bottom = PANEL_SIZE[0] - right, PANEL_SIZE[1] - bottom
    draw.text((left, 8), title, fill="black", font=ImageFont.load_default(15))
    if not curves:
        draw.text((left, top + 8), "not measured", fill=GREY, font=ImageFont.load_default(13))
        return panel
    low, high = value_range(curves)
    last = max(float(curve.steps.max()) for curve in curves)

    def place(curve: Curve, values: np.ndarray) -> list[tuple[float, float]]:
        x = left + (right - left) * curve.steps / last
        y = bottom - (bottom - top) * (np.clip(values, low, high) - low) / (high - low)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    _draw_axes(draw, (left, top, right, bottom), last, (low, high))
    for curve in curves:
        pale = tuple(round(255 - 0.35 * (255 - channel)) for channel in colours[curve.name])
        if len(curve.values) >= MIN_POINTS_TO_SMOOTH:
            draw.line(place(curve, curve.values), fill=pale, width=1)
    for curve in curves:
        points = place(curve, smoothed(curve.values))
        draw.line(points, fill=colours[curve.name], width=3, joint="curve")
        if len(points) < MIN_POINTS_TO_SMOOTH:
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colours[curve.name])
    return panel


def _draw_axes(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], last: float, ends: tuple[float, float]
) -> None:
    """Grid lines with their numbers: values at the left, updates below."""
    left, top, right, bottom = box
    font = ImageFont.load_default(12)
    for tick in ticks(*ends):
        y = bottom - (bottom - top) * (tick - ends[0]) / (ends[1] - ends[0])
        draw.line((left, y, right, y), fill=PALE)
        draw.text((left - 6, y), f"{tick:.4g}", fill=GREY, font=font, anchor="rm")
    for tick in ticks(0.0, last):
        x = left + (right - left) * tick / last
        draw.line((x, bottom, x, bottom + 4), fill=GREY)
        draw.text((x, bottom + 6), f"{tick:.4g}", fill=GREY, font=font, anchor="mt")
    draw.line((left, bottom, right, bottom), fill=GREY)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, about NUM_TICKS of them."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def learning_curves(runs: Mapping[str, Path]) -> Picture:
    """runs: name -> metrics.jsonl. Raises FileNotFoundError, and ValueError for none or more than there are colours."""
    if not 0 < len(runs) <= len(COLOURS):
        raise ValueError(f"expected 1 to {len(COLOURS)} runs, got {len(runs)}: {', '.join(runs)}")
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    colours = dict(zip(runs, COLOURS, strict=False))
    width, height = PANEL_SIZE
    sheet = Image.new("RGB", (2 * width, 2 * height + LEGEND_HEIGHT), "white")
    for index, (key, title) in enumerate(PANELS.items()):
        curves = [curve for name, values in metrics.items() if (curve := curve_of(name, values, key)) is not None]
        panel = draw_panel(f"{title}, over updates", curves, colours)
        sheet.paste(panel, (width * (index % 2), LEGEND_HEIGHT + height * (index // 2)))
    _draw_legend(ImageDraw.Draw(sheet), colours)
    return np.asarray(sheet)


def _draw_legend(draw: ImageDraw.ImageDraw, colours: Mapping[str, tuple[int, int, int]]) -> None:
    font = ImageFont.load_default(15)
    x, y = float(MARGINS[0]), LEGEND_HEIGHT / 2 + 4
    for name, colour in colours.items():
        draw.line((x, y, x + 26, y), fill=colour, width=4)
        draw.text((x + 34, y), name, fill="black", font=font, anchor="lm")
        x += 34 + font.getlength(name) + 30


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help=f"run folders, each with a {METRICS_NAME}")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        picture = learning_curves({folder.name: folder / METRICS_NAME for folder in args.runs})
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    save_png(picture, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
