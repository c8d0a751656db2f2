"""main_mar.py on codes: classes, stages 1 and 2, a run that is stopped; MAR's own trunk with a discrete head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import main_mar
from engine.checkpoint.files import read_identity
from models.frozen.vq import VqConfig
from tests.helpers.class_folder import write_class_folder
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import SIZES, argv, load_checkpoint, read_metrics, write_world
from tests.helpers.vq_file import write_vq

VQ = VqConfig((8, 16, 16), 1, 8, 32, 4, norm_num_groups=4)  # stride 4
DISCRETE: dict[str, Any] = {"codebook_size": 32, "vae_embed_dim": None, "diffloss_d": None, "diffloss_w": None}
SINGLE = DISCRETE | {"model": "maskgil_mini", "code_dim": 8, "class_num": 3, "resume": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_class_folder(root / "classes")
    write_vq(root / "vq.pt", VQ)
    return root


def run(world: Path, output: str, **more: Any) -> dict[str, Any]:
    """One run; returns what it left."""
    assert set(SIZES) >= {"diffloss_d", "diffloss_w"}
    values = SINGLE | {"vae_path": world / "vq.pt", "log_freq": 1, "accum_iter": 2} | more
    assert main_mar.main(argv(world, output, **values)) == 0
    return load_checkpoint(world, output)


@pytest.fixture(scope="module")
def pretrained(world: Path) -> Path:
    """Two steps on classes."""
    only = {"coco_root": None, "clip_path": None, "train_mode": "class", "class_root": world / "classes"}
    run(world, "class", max_steps=2, sample_freq=2, num_preview=3, num_iter=4, cfg=2.0, **only)
    return world / "class" / "checkpoint-last.pth"


def test_pretraining_on_classes(world: Path, pretrained: Path) -> None:
    identity = read_identity(pretrained)
    assert identity is not None and (identity.config.trunk, identity.config.head) == ("single", "discrete")
    assert identity.config.proj_dropout == 0.1, "the preset's"
    assert identity.sampling is not None and identity.sampling.order == "confidence"
    losses = [line["loss"] for line in read_metrics(world, "class")]
    assert len(losses) == 2 and losses[0] == pytest.approx(torch.tensor(32.0).log().item(), abs=1e-4)
    assert min(Image.open(pretrained.parent / "samples" / "step-0000002.png").size) > 32


def test_stages_1_and_2(world: Path, pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(world, "stage1", resume=pretrained, train_mode="text_layout", max_steps=1, label_smoothing=0.0)
    before = load_checkpoint(world, "class")["model_ema"]
    assert torch.equal(first["model"]["code_head.out.weight"], before["code_head.out.weight"])
    assert all(name.startswith(("text_", "layout_")) or ".cross." in name for name in first["model_ema"])
    with caplog.at_level(logging.INFO):
        second = run(world, "stage2", resume=world / "stage1", train_mode="full", max_steps=1, loss_on="all",
                     mask_schedule="cosine")  # fmt: skip
    assert "starting stage 'full'" in caplog.text
    assert set(second["model"]) - set(second["model_ema"]) == {"class_emb.weight"}
    assert not torch.equal(second["model"]["code_head.out.weight"], first["model"]["code_head.out.weight"])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(world: Path, pretrained: Path) -> None:
    flags = {"train_mode": "full", "resume": pretrained, "attn_dropout": 0.1}
    whole = run(world, "whole", max_steps=3, **flags)
    run(world, "parts", max_steps=1, **flags)
    parts = run(world, "parts", max_steps=3, **flags)
    for state in (whole, parts):
        del state["args"]
    assert_same(whole, parts)


def test_the_blocks_of_mar_with_a_discrete_head(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"model": "mar_mini", "head": "discrete", "vae_stride": 4, "patch_size": 2, "class_num": None}
    with caplog.at_level(logging.INFO):
        state = run(world, "mae", resume=world / "mar.safetensors", train_mode="full", max_steps=1, **flags)
    assert "tensors ignored: diffloss.net." in caplog.text
    assert {"z_proj.codes.weight", "encoder_norm.weight", "code_head.out.weight"} <= set(state["model_ema"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"codebook_size": 64}, "codebook_size 64, but"),
        ({"codebook_size": 0}, "codebook_size 0 with head 'discrete'"),
        ({"vae_path": "vae.ckpt"}, "the model has vae_stride 4, but the VAE"),
        ({"diffusion_batch_mul": 4}, "diffusion_batch_mul 1, got 4"),
        ({"head": "diffusion"}, "codebook_size 32 with head 'diffusion'"),
        ({"num_sampling_steps": 20}, "num_sampling_steps"),
    ],
)
def test_mistakes(world: Path, more: dict[str, Any], message: str) -> None:
    path = world / more.pop("vae_path", "vq.pt")
    with pytest.raises(SystemExit) as caught:
        main_mar.main(argv(world, "refused", **SINGLE | {"vae_path": path} | more))
    assert message in str(caught.value)
    assert not (world / "refused").exists()
