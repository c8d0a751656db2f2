"""The pictures of the controls: the program takes every column's command, and columns stand beside one another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import scripts.sample
from engine.cli.sampling import parse_sampling_args, sampling_config
from scripts.mini import gallery
from scripts.mini.control_gallery import CONFIG, FIGURES, PLAIN, Figure, command_of, main
from tests.conftest import ROOT
from util.images import load_image, save_png

COLUMNS = {f"{figure.name}-{column.folder}": (figure, column) for figure in FIGURES for column in figure.columns}


@pytest.mark.parametrize("name", COLUMNS)
def test_commands_parse_and_go_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    figure, column = COLUMNS[name]
    _, _, module, *words = shlex.split(command_of(figure, column, tmp_path))
    assert module == "scripts.sample" and words[:2] == ["--config", CONFIG]
    args, _ = parse_sampling_args(scripts.sample.get_parser(), words, scripts.sample.check_args)
    sampling_config(args)


def write_run(folder: Path, figure: Figure, level: int) -> None:
    """As `scripts.sample` leaves it: pictures of one grey level, and the list."""
    entries = json.loads((ROOT / (figure.layout or PLAIN)).read_text())[: figure.num_rows]
    images = [{"file": f"{row:04d}.png", **entry, "seed": row} for row, entry in enumerate(entries)]
    for image in images:
        save_png(np.full((64, 64, 3), level, dtype=np.uint8), folder / image["file"])
    (folder / "samples.json").write_text(json.dumps({"images": images}))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_columns_stand_beside_one_another(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles, a row for each scene; where maps are shown they are those of the committed weights."""
    monkeypatch.chdir(ROOT)
    for number, column in enumerate(figure.columns):
        write_run(tmp_path / figure.name / column.folder, figure, 40 * number)
    picture = gallery.figure_picture(figure, tmp_path)
    num_columns = len(figure.columns) + (figure.maps_of is not None)
    assert picture.shape[1] == num_columns * (gallery.CELL + 4) + 4
    assert picture.shape[0] > figure.num_rows * (gallery.CELL + 8)
    middles = [gallery.CELL * column + gallery.CELL // 2 + 4 * (column + 1) for column in range(num_columns)]
    bottom = picture[-gallery.CELL // 4, middles].astype(int)  # [columns, 3], of the last row
    levels = [40 * number for number in range(1, len(figure.columns))]
    assert bottom[num_columns - len(levels) :, 0].tolist() == levels


def test_what_is_drawn_already_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    figure = next(each for each in FIGURES if each.name == "control_negative")
    asked: list[list[str]] = []

    def draw(words: list[str], check: bool) -> None:
        asked.append(words)
        write_run(Path(words[words.index("--output_dir") + 1]), figure, 100)

    monkeypatch.setattr(gallery.subprocess, "run", draw)
    argv = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--names", figure.name]
    write_run(tmp_path / "runs" / figure.name / figure.columns[0].folder, figure, 50)
    for _ in range(2):
        main(argv)
    assert len(asked) == len(figure.columns) - 1 and all("--num_threads" in words for words in asked)
    assert np.asarray(load_image(tmp_path / "out" / f"{figure.name}.png")).shape[2] == 3
