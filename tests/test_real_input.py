"""All three stages on real photographs: COCO's own files, live images, the committed mini weights, the real programs.

The mini VAE and MAR know drawings only, so the samples are blurs; what is tested is that everything runs, that the loss
falls, that a run continues where it stopped, and that samples become pictures. Stage 3 is the paper's command, with
YOLOX-nano as the reward.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

import main_mar
import main_rl
import scripts.sample
from tests.conftest import ROOT
from tests.helpers.paper_commands import STAGE_3, words
from util.checkpoint import load_plain

pytestmark = pytest.mark.integration

MINI = ROOT / "pretrained_models" / "mini"
VAE, CLIP, MAR = MINI / "vae" / "kl8_mini.ckpt", MINI / "clip-text-mini", MINI / "mar_mini.safetensors"
BATCH_SIZE, STEPS_PER_EPOCH = 20, 4  # 80 photographs


def argv(**flags: object) -> list[str]:
    paths = {"vae_path": VAE, "clip_path": CLIP}
    return [word for name, value in (flags | paths).items() for word in (f"--{name}", str(value))]


def run(photos: Path, root: Path, stage: int, resume: Path, epochs: int, max_steps: int) -> int:
    """The mini stage's own configuration on the photographs, without a cache."""
    flags = argv(
        config=ROOT / "configs" / f"mini_stage{stage}.yaml",
        coco_root=photos,
        cached_path="",
        output_dir=root / f"stage{stage}",
        resume=resume,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        max_steps=max_steps,
        warmup_epochs=1,
        log_freq=1,
        num_threads=1,
    )
    return main_mar.main([*flags, "--no-use_cached", "--no-online_eval"])


def losses(root: Path, stage: int) -> list[float]:
    """One per step, of one unbroken run."""
    lines = (root / f"stage{stage}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def optimise(photos: Path, root: Path, detector: Path, max_updates: int) -> int:
    """The paper's stage-3 command with other paths, device, sizes and length."""
    flags = argv(
        coco_root=photos,
        coco_split="val2017",
        resume=root / "stage2" / "checkpoint-last.pth",
        detector_path=detector,
        output_dir=root / "stage3",
        model="mar_mini",
        diffloss_d=4,
        diffloss_w=256,
        num_iter=4,
        num_sampling_steps=8,
        rl_masks=1,
        rl_draws=2,
        max_rl_steps=max_updates,
        num_threads=1,
        device="cpu",
    )
    return main_rl.main([*words(STAGE_3), *flags])


def test_three_stages_and_samples(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (VAE, CLIP, MAR):
        assert path.exists(), f"{path.relative_to(ROOT)} belongs to the repository and is missing"
    photos = shared / "data" / "coco_mini"
    caplog.set_level(logging.INFO)
    origin = MAR
    for stage, name, epochs in ((1, "text_layout", 4), (2, "full", 4)):
        num_steps = epochs * STEPS_PER_EPOCH
        assert run(photos, tmp_path, stage, origin, epochs, max_steps=num_steps - 6) == 0
        checkpoint = tmp_path / f"stage{stage}" / "checkpoint-last.pth"
        assert f"starting stage '{name}' at epoch 0 with a fresh optimizer from" in caplog.text
        assert f"{origin} (stage '{'mar' if stage == 1 else 'text_layout'}'" in caplog.text
        assert run(photos, tmp_path, stage, origin, epochs, max_steps=num_steps) == 0
        stopped = divmod(num_steps - 6, STEPS_PER_EPOCH)
        where = f"at epoch {stopped[0]}, step {num_steps - 6} (image {BATCH_SIZE * stopped[1]} of the epoch)"
        assert f"continuing stage '{name}' from {checkpoint} {where}" in caplog.text
        curve = losses(tmp_path, stage)
        assert len(curve) == num_steps == load_plain(checkpoint)["step"]
        assert mean(curve[-6:]) < mean(curve[:6]), curve
        origin = checkpoint

    assert len(load_plain(origin)["categories"]) == 80
    sampling = {"num_images": 3, "num_iter": 4, "num_sampling_steps": 8, "cfg": 2.0, "clip_x0": 5, "device": "cpu"}
    output = tmp_path / "samples"
    scripts.sample.main(argv(resume=origin, coco_root=photos, coco_split="val2017", output_dir=output, **sampling))
    images = [np.asarray(Image.open(output / f"{index:04d}.png")) for index in range(3)]
    assert all(image.shape == (64, 64, 3) and image.std() > 1 for image in images)
    assert len({image.tobytes() for image in images}) == 3
    with Image.open(output / "grid.png") as grid:
        grid.load()
    assert "wrote 3 images" in capsys.readouterr().out

    assert optimise(photos, tmp_path, shared / "models" / "yolox_nano.onnx", 1) == 0
    assert f"starting stage 'grpo' at epoch 0 with a fresh optimizer from the EMA weights of {origin}" in caplog.text
    assert optimise(photos, tmp_path, shared / "models" / "yolox_nano.onnx", 2) == 0
    last = tmp_path / "stage3" / "checkpoint-last.pth"
    assert f"continuing stage 'grpo' from {last} at epoch 0, step 1" in caplog.text
    assert len(losses(tmp_path, 3)) == 2 == load_plain(last)["step"]
