"""The paper's first command at its full size, on a CPU: it runs, fits in memory, and trains what it should.

All weights have the real names and shapes and deterministic values, so the numbers mean nothing, but every path is the
one that MAR-H, KL-16 and CLIP ViT-B/32 take. The second stage needs gradients and moments of 1.1 billion parameters,
more than a laptop has: here it is followed up to its first step, its training is tested at small sizes.

    OMP_NUM_THREADS=2 .venv/bin/python -m pytest -m slow -s tests/models/test_paper_size.py
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import check_identity, find_source, load_weights, resumed_position
from engine.train.state import Course, Position
from models.structmar import StructMAR, StructMARConfig
from models.weights import is_trainable
from tests.conftest import ROOT
from tests.helpers.full_size import MEMORY_LIMIT, Finished, run_measured, write_clip
from tests.helpers.paper_commands import STAGE_1, words
from tests.helpers.weights_rule import deterministic_tensor
from util.checkpoint import load_plain
from util.types import Category

pytestmark = pytest.mark.slow

DISK_NEEDED = 20e9


def manifest(name: str) -> dict[str, list[int]]:
    """Tensor name -> shape."""
    text = (ROOT / "tests" / "data" / "manifest.json").read_text(encoding="utf-8")
    return json.loads(text)[name]["tensors"]


def write_safetensors(shapes: dict[str, list[int]], path: Path) -> None:
    """The file that safetensors would write, one tensor in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(deterministic_tensor(name, tuple(shape)).numpy().tobytes())


def write_coco_2014(photos: Path, root: Path) -> None:
    """The photographs of `photos`/train2017 under COCO 2014's names."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2014").mkdir()
    for kind in ("instances", "captions"):
        content = json.loads((photos / "annotations" / f"{kind}_train2017.json").read_text(encoding="utf-8"))
        for image in content["images"]:
            old, image["file_name"] = image["file_name"], f"COCO_train2014_{image['id']:012d}.jpg"
            link = root / "train2014" / image["file_name"]
            if not link.exists():
                link.symlink_to(photos / "train2017" / old)
        (root / "annotations" / f"{kind}_train2014.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def world(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every file of the paper's first command. 4.3 GB, and a checkpoint of 6.8: removed afterwards."""
    root = tmp_path_factory.mktemp("huge")
    free = shutil.disk_usage(root).free
    if free < DISK_NEEDED:
        pytest.skip(f"{root} has {free / 1e9:.0f} GB free, {DISK_NEEDED / 1e9:.0f} GB are needed")
    write_safetensors(manifest("mar_huge"), root / "mar_huge.safetensors")
    vae = {name: deterministic_tensor(name, tuple(shape)) for name, shape in manifest("kl16").items()}
    torch.save({"model": vae}, root / "kl16.ckpt")
    write_clip(root / "clip")
    write_coco_2014(shared / "data" / "coco_mini", root / "coco")
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def stage1(world: Path) -> Finished:
    """The command, with other paths, device, batch size and length."""
    changes = {
        "output_dir": world / "stage1",
        "coco_root": world / "coco",
        "resume": world / "mar_huge.safetensors",
        "vae_path": world / "kl16.ckpt",
        "clip_path": world / "clip",
        "device": "cpu",
        "batch_size": 1,
        "max_steps": 2,
    }
    changed = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    return run_measured([sys.executable, "main_mar.py", *words(STAGE_1), *changed], world / "log.txt")


@pytest.fixture(scope="module")
def checkpoint(stage1: Finished, world: Path) -> dict:
    assert stage1.code == 0, stage1.log[-4000:]
    return load_plain(world / "stage1", mmap=True)


def test_it_runs_in_16_gb(stage1: Finished, checkpoint: dict, world: Path) -> None:
    size = (world / "stage1" / "checkpoint-last.pth").stat().st_size
    sys.stdout.write(
        f"\nstage 1, mar_huge, batch 1, two steps: {stage1.measured}, checkpoint {size / 1e9:.2f} GB\n{stage1.log}\n"
    )
    assert stage1.peak < MEMORY_LIMIT
    lines = (world / "stage1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = json.loads(lines[-1])
    assert metrics["step"] == checkpoint["step"] == 2
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert (checkpoint["stage"], len(checkpoint["categories"])) == ("text_layout", 80)


def test_only_the_frozen_backbone_is_missing_from_the_optimizer(checkpoint: dict) -> None:
    with torch.device("meta"):
        model = StructMAR(StructMARConfig.from_dict(checkpoint["config"]))
    names = {name for name, _ in model.named_parameters()}
    optimized = set(checkpoint["optimizer"]["state"])
    listed = [name for group in checkpoint["optimizer"]["param_groups"] for name in group["params"]]
    assert optimized == {name for name in names if is_trainable(name, "text_layout")}
    assert sorted(listed) == sorted(optimized)
    assert set(checkpoint["model_ema"]) == optimized
    backbone = set(manifest("mar_huge"))
    assert names - optimized == backbone & names
    assert optimized.isdisjoint(backbone)


def test_the_backbone_stayed_as_it_was(checkpoint: dict) -> None:
    shapes = manifest("mar_huge")
    for name in ("encoder_blocks.0.attn.qkv.bias", "decoder_blocks.19.mlp.fc1.bias", "diffloss.net.cond_embed.bias",
                 "z_proj.weight", "mask_token"):  # fmt: skip
        assert torch.equal(checkpoint["model"][name], deterministic_tensor(name, tuple(shapes[name])))


def test_stage_2_would_start_fresh_from_it(checkpoint: dict, world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything up to the optimizer, which would not fit: decision, identity, and the weights on the meta device."""
    caplog.set_level(logging.INFO)
    path = world / "stage1" / "checkpoint-last.pth"
    source = find_source(world / "stage2", str(path), True, "full")
    config = StructMARConfig.from_dict(checkpoint["config"] | {"grad_checkpointing": True})
    categories = tuple(Category(entry["id"], entry["name"]) for entry in checkpoint["categories"])
    vae, text = checkpoint["vae"], checkpoint["text_encoder"]
    check_identity(source, Identity(config, vae["id"], vae["latent_scale"], text["id"], categories))
    with torch.device("meta"):
        model = StructMAR(config)
    report = load_weights(model, source, "full")
    assert report is not None and report.new == report.ignored == ()
    position = resumed_position(source, Course(images=82783, images_per_step=64, epochs=10))
    assert (source.kind, position) == ("start", Position())
    message = f"starting stage 'full' at epoch 0 with a fresh optimizer from the EMA weights of {path}"
    assert message in caplog.text
