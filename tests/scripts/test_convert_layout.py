"""The program that writes layout files as ours or as GLIGEN's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.convert_layout import main
from tests.conftest import ROOT

MINI = ROOT / "configs" / "layouts" / "mini.json"


def test_there_and_back_is_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gligen, ours = str(tmp_path / "gligen.json"), tmp_path / "ours.json"
    main(["--layout", str(MINI), "--output", gligen, "--to", "gligen"])
    main(["--layout", gligen, "--output", str(ours)])
    assert json.loads(ours.read_text()) == json.loads(MINI.read_text())
    assert f"wrote {ours}: {len(json.loads(MINI.read_text()))} entries" in capsys.readouterr().out


def test_text_needs_its_canvas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answer.txt").write_text("dog {height: 16px; width: 32px; top: 8px; left: 0px; }\n")
    words = ["--layout", str(tmp_path / "answer.txt"), "--output", str(tmp_path / "new.json"), "--prompt", "a dog"]
    with pytest.raises(SystemExit):
        main(words)
    main([*words, "--layout_canvas", "32x64"])
    (entry,) = json.loads((tmp_path / "new.json").read_text())
    assert entry == {"prompt": "a dog", "objects": [{"label": "dog", "bbox": [0.0, 0.25, 0.5, 0.75]}]}
