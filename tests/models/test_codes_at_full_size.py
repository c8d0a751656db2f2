"""Codes at full size on a CPU: photographs of 256 px through a tokenizer of LlamaGen's VQ-16 layout, `maskgil_base`.

Weights are random, in real names and shapes: the numbers mean nothing, but every path is the one that the released
tokenizer and CLIP ViT-B/32 take. No caches: pictures are encoded as they are trained on.

    OMP_NUM_THREADS=2 .venv/bin/python -m pytest -m slow -s tests/models/test_codes_at_full_size.py
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint.files import read_identity
from models.frozen.vq import VQ16
from tests.helpers.full_size import MEMORY_LIMIT, run_measured, write_clip
from tests.helpers.vq_file import write_vq

DISK_NEEDED = 6e9
pytestmark = pytest.mark.slow


@pytest.fixture
def world(shared: Path, tmp_path: Path) -> Iterator[Path]:
    """The frozen parts, 0.5 GB, and room for a checkpoint of 2: removed afterwards."""
    if not (shared / "data" / "coco_mini").is_dir():
        pytest.skip(f"{shared} has no data/coco_mini")
    free = shutil.disk_usage(tmp_path).free
    if free < DISK_NEEDED:
        pytest.skip(f"{tmp_path} has {free / 1e9:.0f} GB free, {DISK_NEEDED / 1e9:.0f} GB are needed")
    write_vq(tmp_path / "vq16.pt", VQ16)
    write_clip(tmp_path / "clip")
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_stage_2_runs_in_16_gb(shared: Path, world: Path) -> None:
    flags = {
        "model": "maskgil_base",
        "train_mode": "full",
        "coco_root": shared / "data" / "coco_mini",
        "coco_split": "train2017",
        "vae_path": world / "vq16.pt",
        "clip_path": world / "clip",
        "output_dir": world / "run",
        "batch_size": 1,
        "epochs": 1,
        "warmup_epochs": 0,
        "max_steps": 2,
        "log_freq": 1,
        "num_workers": 0,
        "device": "cpu",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    finished = run_measured([sys.executable, "main_mar.py", *words], world / "log.txt")
    assert finished.code == 0, finished.log[-4000:]
    checkpoint = world / "run" / "checkpoint-last.pth"
    size = checkpoint.stat().st_size
    sys.stdout.write(f"\nmaskgil_base, batch 1, two steps: {finished.measured}, checkpoint {size / 1e9:.2f} GB\n")
    assert finished.peak < MEMORY_LIMIT
    lines = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(math.log(VQ16.codebook_size), abs=1e-3), "at first all codes are as likely"
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    identity = read_identity(checkpoint)
    assert identity is not None
    config = identity.config
    assert (config.head, config.codebook_size, config.grid, config.decoder_depth) == ("discrete", 16384, (16, 16), 12)
