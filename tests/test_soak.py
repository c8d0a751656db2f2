"""Long runs with flat memory and open files: an hour of stage 2, and 2,000 sampled images.

    bash scripts/test.sh -m slow tests/test_soak.py
    SOAK_MINUTES=3 SOAK_IMAGES=100 .venv/bin/python -m pytest -q -s -m slow tests/test_soak.py     # to try it

Figures are printed (-s): memory of the process's own, in MB, and open files, at the first and the last third.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import main_mar
from scripts import sample
from tests.helpers.runs import FORK
from tests.helpers.tiny_run import argv, write_world

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
IMAGES = int(os.environ.get("SOAK_IMAGES", "2000"))
SLACK_MB = 25.0  # the allocator's, once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]


@dataclass(frozen=True)
class Reading:
    memory_mb: float
    files: int
    threads: int


def read_process(pid: int) -> Reading:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Reading(int(fields["RssAnon"]) / 1024, files, int(fields["Threads"]))


def watched(run: Callable[[], Any], limit_s: float | None) -> list[Reading]:
    """Readings of `run` in a forked process, twice a second, until it ends or SIGTERM at `limit_s` ends it."""
    child = FORK.Process(target=lambda: os._exit(run() or 0))
    child.start()
    assert child.pid is not None
    readings, end = [], time.monotonic() + (limit_s or 1e9)
    while child.is_alive() and time.monotonic() < end:
        try:
            readings.append(read_process(child.pid))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            break
        time.sleep(0.5)
    if limit_s is not None:
        os.kill(child.pid, signal.SIGTERM)
    child.join(120)
    assert child.exitcode == (0 if limit_s is None else 128 + signal.SIGTERM)
    return readings


def require_flat(name: str, readings: list[Reading]) -> None:
    """The last third needs no more than the one before it; the first one fills caches."""
    third = len(readings) // 3
    assert third >= 5, f"{name}: {len(readings)} readings are too few"
    middle, last = readings[third : 2 * third], readings[-third:]
    before, after = (sum(each.memory_mb for each in part) / third for part in (middle, last))
    files = [max(each.files for each in part) for part in (middle, last)]
    threads = [max(each.threads for each in part) for part in (middle, last)]
    sys.stderr.write(
        f"\n{name}: {len(readings) / 2:.0f} s, memory {before:.1f} -> {after:.1f} MB (largest "
        f"{max(each.memory_mb for each in readings):.1f}), files {files}, threads {threads}\n"
    )
    assert after <= 1.02 * before + SLACK_MB
    assert files[1] <= files[0] + 1
    assert threads[1] <= threads[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("soak"))


def test_stage_2_stays_flat(world: Path) -> None:
    """With workers that read pictures, previews and saves."""
    flags = {"train_mode": "full", "epochs": 10**8, "warmup_epochs": 0, "num_workers": 1, "log_freq": 20}
    pictures = {"sample_freq": 200, "num_preview": 2, "num_iter": 2, "num_sampling_steps": 3, "save_freq_steps": 200}
    words = argv(world, "soak", save_last_freq=10**8, **flags, **pictures)
    require_flat("stage 2", watched(lambda: main_mar.main(words), 60 * MINUTES))
    steps = [json.loads(line)["step"] for line in (world / "soak" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20, steps[-1] + 1, 20))


def test_sampling_stays_flat(world: Path) -> None:
    main_mar.main(argv(world, "weights", train_mode="full", max_steps=1, warmup_epochs=0))
    (world / "layout.json").write_text(
        json.dumps({"prompt": "a red dog", "objects": [{"label": "tomato", "bbox": [0.1, 0.1, 0.6, 0.6]}]})
    )
    words = ["--resume", "weights", "--vae_path", "vae.ckpt", "--clip_path", "clip", "--layout", "layout.json"]
    words = [str(world / word) if not word.startswith("--") else word for word in words]
    words += ["--num_images", str(IMAGES), "--batch_size", "4", "--num_iter", "16", "--num_sampling_steps", "10"]
    words += ["--output_dir", str(world / "samples"), "--device", "cpu"]
    require_flat(f"{IMAGES} images", watched(lambda: sample.main(words), None))
    assert len(list((world / "samples").glob("[0-9]*.png"))) == IMAGES
