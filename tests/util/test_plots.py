"""Curves of metrics: what is read, how it is smoothed, where it is drawn; what is missing is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from util.extras import import_extra, pinned
from util.images import Picture
from util.plots import (
    COLOURS,
    LEGEND_HEIGHT,
    PANEL_SIZE,
    Curve,
    metrics_figure,
    new_figure,
    picture_of,
    read_metrics,
    smoothed,
    value_range,
)


def test_lines_of_one_step_are_one_point(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "reward": 0.5, "kl": null}\n{"step": 2, "eval/AP50": 0.7}\n{"step": 1, "reward": 0.4}\n'
    )
    assert read_metrics(path) == {1: {"reward": 0.4}, 2: {"reward": 0.5, "eval/AP50": 0.7}}


@pytest.mark.parametrize(
    "bad", ['{"loss"', "[1]", '{"loss": 1}', '{"step": 1, "loss": "low"}', '{"step": "1"}', '{"step": 1, "loss": NaN}']
)
def test_what_is_no_line_of_metrics_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad)
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is no line of metrics: ") as error:
        read_metrics(path)
    assert bad in str(error.value)


def test_medians_and_ranges_by_hand() -> None:
    assert smoothed(np.arange(10.0)).tolist() == list(range(10))  # too short to smooth
    values = np.tile([0.0, 1.0], 20)
    assert smoothed(values)[[0, 1, 20, 21]].tolist() == [0.0, 0.5, 0.0, 1.0]  # two neighbours on either side
    values = np.where(np.arange(40) == 20, 1000.0, np.arange(40.0))  # a single spike moves it by one place at most
    assert smoothed(values)[18:23].tolist() == [18.0, 19.0, 21.0, 22.0, 23.0]
    values = np.where(np.arange(1000) == 500, 1e6, np.arange(1000.0))
    low, high = value_range([Curve("a", np.arange(1000.0), values)])  # nor does it decide what is seen
    assert -50 < low < 20 and 990 < high < 1100
    assert value_range([Curve("a", np.zeros(1), np.array([2.0]))]) == pytest.approx((1.9, 2.1))


def level(value: float) -> dict[int, dict[str, float]]:
    return {step: {"reward": value, "loss": -value} for step in range(1, 41)}


def heights(picture: Picture, column: int) -> list[float]:
    """Mean row of the first two runs' colours in a panel of the first row."""
    panel = picture[LEGEND_HEIGHT + 30 : LEGEND_HEIGHT + PANEL_SIZE[1], column * PANEL_SIZE[0] :][:, : PANEL_SIZE[0]]
    shades = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in COLOURS[:2]]
    return [float(np.argwhere((panel == shade).all(axis=2))[:, 0].mean()) for shade in shades]


def test_a_better_run_is_drawn_higher() -> None:
    panels = {"reward": "reward", "loss": "loss", "kl": "nowhere measured"}
    picture = picture_of(metrics_figure({"low": level(0.2), "high": level(0.8)}, panels))
    assert picture.shape == (2 * PANEL_SIZE[1] + LEGEND_HEIGHT, 2 * PANEL_SIZE[0], 3) and picture.dtype == np.uint8
    low, high = heights(picture, 0)
    assert low > high + 100  # rows count from the top
    low, high = heights(picture, 1)
    assert high > low + 100
    for metrics in ({}, {str(run): level(0.1) for run in range(len(COLOURS) + 1)}):
        with pytest.raises(ValueError, match=f"expected 1 to 6 runs, got {len(metrics)}"):
            metrics_figure(metrics, panels)


def test_a_missing_extra_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"^plots need the package matplotlib, .* -m pip install matplotlib==\d"
    ) as error:
        new_figure(10, 10)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert import_extra("json", "tests") is json
    assert pinned("torch").startswith("torch==") and pinned("no-such-package") == "no-such-package"
