"""The plot of any run's numbers: names of runs, keys, errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import plot_metrics


def write_run(folder: Path, text: str) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a" / "run", '{"step": 1, "loss": 2.0, "lr": 0.1}\n{"step": 2, "loss": 1.0}\n')
    other = write_run(tmp_path / "b" / "run", '{"step": 1, "loss": 3.0}\n')
    common = [one, other, "--output", str(tmp_path / "new" / "plot.png")]
    plot_metrics.main([*common, "--keys", "loss", "lr"])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'plot.png'}\n"
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"^error: --keys los is in no run, did you mean loss\? there are loss, lr$"):
        plot_metrics.main([*common, "--keys", "lr", "los"])
    with pytest.raises(SystemExit, match=r"^error: metrics .*b/metrics.jsonl does not exist$"):
        plot_metrics.main([one, str(tmp_path / "b"), "--keys", "loss", "--output", common[-1]])
    with pytest.raises(SystemExit, match=r"^error: --output .* is a folder"):
        plot_metrics.main([one, "--keys", "loss", "--output", str(tmp_path)])


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]
    assert list(plot_metrics.run_names(folders)) == ["a/x", "b/x", "b/y"]
    assert list(plot_metrics.run_names(folders[1:])) == ["x", "y"]
    with pytest.raises(ValueError, match="the same run is named twice"):
        plot_metrics.run_names([folders[0], folders[0] / "../x"])
