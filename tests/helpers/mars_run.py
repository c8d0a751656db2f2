"""A complete world for runs of main_mar.py --backbone mars: data in two languages, a tokenizer of codes, a language
model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import main_mar
from engine.data.translations import translations_path
from tests.helpers.lm_files import write_lm
from tests.helpers.tiny_run import load_checkpoint, write_world
from tests.helpers.vq_file import write_vq

SIDE = 8  # pixels: 4 x 4 codes of TINY_VQ
NUM_CODES = 32


def write_mars_world(root: Path) -> Path:
    """data/coco with Chinese captions in train2014, vq.pt and lm/ under `root`, which is returned."""
    write_world(root)
    write_vq(root / "vq.pt")
    write_lm(root / "lm")
    for split in ("train2014", "val2014"):
        path = root / "coco" / "annotations" / f"captions_{split}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["caption"] = "两个苹果" if annotation["id"] % 2 else "一个红色的苹果"
        translations_path(root / "coco", split).write_text(json.dumps(content))
    return root


def mars_argv(root: Path, output: str = "run", **flags: object) -> list[str]:
    """Flags of a short run of stage I; `flags` replace or add (True: a switch, False: its opposite; None: left out)."""
    values: dict[str, object] = {
        "backbone": "mars",
        "train_mode": "joint",
        "output_dir": root / output,
        "coco_root": root / "coco",
        "vae_path": root / "vq.pt",
        "lm_path": root / "lm",
        "img_size": SIDE,
        "max_text_tokens": 12,
        "batch_size": 2,
        "epochs": 3,
        "warmup_epochs": 0,
        "lr": 1e-2,
        "log_freq": 1,
        "num_workers": 0,
        "device": "cpu",
    } | flags
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def run_mars(root: Path, output: str, **flags: object) -> dict[str, Any]:
    """One run; returns the checkpoint that it left."""
    assert main_mar.main(mars_argv(root, output, **flags)) == 0
    return load_checkpoint(root, output)
