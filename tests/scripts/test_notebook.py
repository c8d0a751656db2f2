"""The notebook: all its cells run, from any folder, and it stores no outputs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PATH = ROOT / "scripts" / "sample.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells), "outputs stored"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.integration
@pytest.mark.parametrize("folder", ["scripts", "elsewhere"])
def test_every_cell_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    """elsewhere: any folder, with the repository on the Python path, as it is for tests."""
    monkeypatch.chdir(tmp_path if folder == "elsewhere" else ROOT / folder)
    others = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
    monkeypatch.setattr("sys.path", [*others, str(ROOT)] if folder == "elsewhere" else others)
    settings, *rest = code_cells()
    few = re.sub(r"^(NUM_\w+) = None", r"\1 = 2", settings, flags=re.MULTILINE)
    assert few.count(" = 2") == 2
    names: dict[str, Any] = {}
    for number, source in enumerate([few, *rest]):
        exec(compile(source, f"cell {number} of {PATH.name}", "exec"), names)
    assert len(names["images"]) == len(names["scenes"]) == 4 and names["ROOT"] == ROOT
    assert {name for name, _ in names["scores"]} == {name for scene in names["scenes"] for name in scene.names}
    assert all(0 <= iou <= 1 for _, iou in names["scores"])
    assert re.search(r"mean IoU \d\.\d\d, \d of 9 objects in their boxes\n$", capsys.readouterr().out)
