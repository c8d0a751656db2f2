"""Stage 3 on disk: tiny_run.py's world with a stage-2 checkpoint and two detectors, and the flags of a short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import main_mar
from engine.eval.profiles import load_profile
from tests.helpers.coco_fixture import CATEGORIES
from tests.helpers.eval_world import write_detector
from tests.helpers.tiny_run import argv, write_world
from util.types import Category

NAMES = tuple(sorted((Category(each["id"], each["name"]) for each in CATEGORIES), key=lambda each: each.id))
HELD_OUT = {"eval_freq": 1, "eval_images": 2}


def write_rl_world(root: Path) -> Path:
    """tests/helpers/tiny_run.py's world with a stage-2 checkpoint, two detectors and a profile."""
    write_world(root)
    write_detector(root / "detector.pth", NAMES)
    write_detector(root / "judge.pth", NAMES, seed=1)
    settings = vars(load_profile("mini")) | {"name": "tiny", "split": "val2014", "resolution": 32, "max_objects": 4}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    (root / "tiny.yaml").write_text(yaml.safe_dump(plain))
    main_mar.main(argv(root, "sft", train_mode="full", max_steps=1, log_freq=1))
    return root


def rl_argv(root: Path, output: str = "run", **flags: Any) -> list[str]:
    """Flags of a short stage 3 in `root`; `flags` replace or add."""
    values = {
        "resume": root / "sft" / "checkpoint-last.pth",
        "detector_path": root / "detector.pth",
        "group_size": 2,
        "num_iter": 3,
        "num_sampling_steps": 6,
        "clip_x0": 3.0,
        "rl_masks": 2,
        "rl_draws": 2,
        "log_freq": 1,
        "warmup_epochs": None,
        "max_rl_steps": 2,
        "sample_freq": 0,
    } | flags
    return argv(root, output, **values)


def held_out(root: Path) -> dict[str, Any]:
    return {"eval_detector": root / "judge.pth", "eval_profile": root / "tiny.yaml", **HELD_OUT}
