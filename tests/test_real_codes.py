"""Real photographs, a VQ-16 of full size on random weights and MaskGIL's base size: two steps of stage 2 and a picture,
in a process of its own, whose memory is measured."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_mar
import scripts.sample
from models.frozen.vq import VQ16
from tests.conftest import ROOT
from tests.helpers.runs import in_child
from tests.helpers.vq_file import write_vq

pytestmark = pytest.mark.slow

CLIP = ROOT / "pretrained_models" / "mini" / "clip-text-mini"
MAX_GIGABYTES = 16


def words(**flags: object) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_base_size_on_photographs(shared: Path, tmp_path: Path) -> None:
    photos, output = shared / "data" / "coco_mini", tmp_path / "run"
    frozen = {"vae_path": write_vq(tmp_path / "vq.pt", VQ16), "clip_path": CLIP}

    def run() -> int:
        flags = {"model": "maskgil_base", "train_mode": "full", "coco_root": photos, "coco_split": "val2017",
                 "batch_size": 1, "epochs": 1, "warmup_epochs": 0, "max_steps": 2, "log_freq": 1, "num_workers": 0,
                 "num_threads": 1, "device": "cpu", "output_dir": output}  # fmt: skip
        main_mar.main(words(**flags, **frozen))
        flags = {"resume": output, "coco_root": photos, "coco_split": "val2017", "num_images": 1, "cfg": 3.0}
        scripts.sample.main(words(**flags, **frozen, device="cpu", output_dir=tmp_path / "samples"))
        return 0

    assert in_child(run, timeout=900) == 0
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses[0] == pytest.approx(np.log(16384), rel=1e-3) and np.isfinite(losses[1])
    assert np.asarray(Image.open(tmp_path / "samples" / "0000.png")).shape == (256, 256, 3)
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert gigabytes < MAX_GIGABYTES, f"{gigabytes:.1f} GB"
