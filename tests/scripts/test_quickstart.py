"""scripts/quickstart.sh --smoke, as a newcomer types it, with everything it writes in a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.sample.grid import GRID_CELL, GRID_GAP
from tests.conftest import ROOT

WEIGHTS = (
    "structmar_mini_stage2.safetensors",
    "mar_mini.safetensors",
    "maskgil_mini_stage2.safetensors",
    "vae/kl8_mini.ckpt",
    "vq/vq4_mini.pt",
    "clip-text-mini",
    "fasterrcnn_mini.pth",
    "fasterrcnn_mini_judge.pth",
)
EVALUATED = ("committed", "own_stage2", "own_stage3")
STAGES = {"stage1": "text_layout", "stage2": "full", "stage3": "grpo"}


def quickstart(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), *arguments]
    env = os.environ | {"QUICKSTART_ROOT": str(root)}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1800, check=False)


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    finished = quickstart(tmp_path, "--fast")
    assert (finished.returncode, finished.stderr) == (2, "usage: bash scripts/quickstart.sh [--smoke]\n")
    assert list(tmp_path.iterdir()) == []


def check_pictures(folder: Path) -> None:
    """64 x 64 images that are not all alike, and a grid of them with room for captions."""
    listed = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["images"]
    images = [np.asarray(Image.open(folder / entry["file"])) for entry in listed]
    assert len(images) == 4 and all(image.shape == (64, 64, 3) and image.std() > 1 for image in images)
    assert len({image.tobytes() for image in images}) == 4
    with Image.open(folder / "grid.png") as grid:
        grid.load()  # decodes all of it
        assert grid.width == 2 * (GRID_CELL + GRID_GAP) + GRID_GAP
        assert grid.height > 2 * (GRID_CELL + GRID_GAP) + GRID_GAP


def read_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


def check_table(printed: list[str]) -> None:
    """The output ends with one table of the bounds, the three models and two differences, and the page's command."""
    table = [line for line in printed if line.startswith("|")]
    minus = f"minus StructMAR ({EVALUATED[0]})"
    names = ["", "real images", "VAE round trip", *(f"StructMAR ({which})" for which in EVALUATED)]
    assert [line.split("|")[1].strip() for line in table[:1] + table[2:]] == [*names[:5], minus, names[5], minus]
    assert printed[-1].endswith(".venv/bin/python -m scripts.page") and printed[-2] == ""
    assert printed[-3].startswith("In percent") and printed.index(table[-1]) == len(printed) - 5


def held_out_steps(printed: str) -> list[int]:
    """Of the lines that say what stage 3 changed."""
    lines = printed[printed.index("Before and after stage 3") :].splitlines()
    return [int(line.split(" layouts at step ")[1].split(":")[0]) for line in lines if " layouts at step " in line]


@pytest.mark.integration
def test_smoke_run_and_again(tmp_path: Path) -> None:
    """A few steps of everything; the second run finds all of it done and only samples."""
    missing = [name for name in WEIGHTS if not (ROOT / "pretrained_models" / "mini" / name).exists()]
    assert missing == [], "the repository's own weights are incomplete"
    first = quickstart(tmp_path, "--smoke")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    out = tmp_path / "output" / "quickstart_smoke"
    steps = [line.split()[1] for line in first.stdout.splitlines() if line.startswith("== ")]
    assert steps == [f"{number}/8" for number in range(1, 9)]
    printed = first.stdout.splitlines()
    links = printed.index(f"The committed weights: {out / 'committed' / 'grid.png'}")
    assert printed[links : links + 6] == [
        f"The committed weights: {out / 'committed' / 'grid.png'}",
        f"The committed weights: {out / 'committed_codes' / 'grid.png'}",
        f"The committed weights: {out / 'evaluation_committed' / 'report.html'}",
        f"Your own model:        {out / 'samples' / 'grid.png'}",
        f"Your own model:        {out / 'evaluation_own_stage2' / 'report.html'}",
        f"Your own model:        {out / 'evaluation_own_stage3' / 'report.html'}",
    ]
    assert held_out_steps(first.stdout) == [0, 2]
    check_table(printed)
    for which in EVALUATED:
        assert (out / f"evaluation_{which}" / "report.html").is_file()
    detected = [
        line for line in first.stderr.replace("\r", "\n").splitlines() if "detecting: real images: 100%" in line
    ]
    assert len(detected) == 1  # the bound is the same for all
    for name in ("committed", "committed_codes", "samples"):
        check_pictures(out / name)
        assert f"wrote 4 images to {out / name} in " in first.stdout  # with how long it took
    stages = [read_checkpoint(out / name) for name in STAGES]
    assert [state["stage"] for state in stages] == list(STAGES.values())
    assert [state["step"] for state in stages] == [4, 4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "output"]

    again = quickstart(tmp_path, "--smoke")
    assert again.returncode == 0, again.stderr[-4000:]
    assert "already there, nothing to do" in again.stdout
    assert held_out_steps(again.stdout) == [0, 2]
    check_table(again.stdout.splitlines())
    for name, stage, before in zip(STAGES, STAGES.values(), stages, strict=True):
        path = out / name / "checkpoint-last.pth"
        assert f"continuing stage '{stage}' from {path} at epoch" in again.stderr + again.stdout
        after = read_checkpoint(out / name)
        assert after["step"] == before["step"]
        assert all(torch.equal(tensor, before["model"][key]) for key, tensor in after["model"].items())
        logged = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        steps_logged = [line["step"] for line in logged if "loss" in line]
        assert steps_logged == sorted(set(steps_logged)) and steps_logged[-1] == before["step"]
