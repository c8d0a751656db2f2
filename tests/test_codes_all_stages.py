"""A model of codes through all stages by the real programs: pretrained by class, aligned, tuned, rewarded, sampled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import main_mar
import main_rl
import scripts.sample
from engine.checkpoint.files import read_identity
from models.frozen.vq import VqConfig, build_vq, llamagen_checkpoint
from scripts import cache_latents
from tests.helpers.class_folder import write_class_folder
from tests.helpers.coco_fixture import CATEGORIES
from tests.helpers.eval_world import write_detector
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import argv, load_checkpoint, read_metrics, write_world
from util.types import Category

NAMES = tuple(sorted((Category(each["id"], each["name"]) for each in CATEGORIES), key=lambda each: each.id))
TIMES = ("images_per_second", "rollout_seconds", "update_seconds")
VQ = VqConfig((8, 8, 8), 1, 8, 32, 4, norm_num_groups=4)
SIZES: dict[str, Any] = {
    "vae_stride": 4,
    "patch_size": 2,
    "code_dim": 8,
    "head": "discrete",
    "trunk": "single",
    "codebook_size": 32,
    "vae_embed_dim": 1,
    "rope_mode": "full",
    "no-learned_pos": True,
    "class_num": 3,
    "diffloss_d": None,
    "diffloss_w": None,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("codes") / "world")
    write_class_folder(root / "classes")
    write_detector(root / "detector.pth", NAMES)
    torch.manual_seed(1)
    torch.save(llamagen_checkpoint(build_vq(VQ), torch.float32), root / "vq.pt")
    return root


def flags(world: Path, output: str, **more: Any) -> list[str]:
    values = {"model": "mar_mini", "vae_path": world / "vq.pt", "max_steps": 1, "log_freq": 1}
    return argv(world, output, **(SIZES | values | more))


def rl_flags(world: Path, output: str, **more: Any) -> list[str]:
    values: dict[str, Any] = {"resume": world / "stage2", "detector_path": world / "detector.pth", "group_size": 2}
    values |= {"max_steps": None, "max_rl_steps": 2, "warmup_epochs": None, "sample_freq": 2, "num_iter": 4}
    return flags(world, output, **(values | more))


@pytest.fixture(scope="module")
def tuned(world: Path) -> Path:
    """Stage 2's checkpoint, from class labels on."""
    by_class = {"train_mode": "class", "class_root": world / "classes", "resume": None, "sample_freq": 1}
    for output, more in (
        ("stage0", by_class),
        ("stage1", {"resume": world / "stage0"}),
        ("stage2", {"resume": world / "stage1", "train_mode": "full"}),
    ):
        assert main_mar.main(flags(world, output, **more)) == 0
    return world / "stage2" / "checkpoint-last.pth"


def test_every_stage_starts_from_the_one_before(world: Path, tuned: Path) -> None:
    states = {stage: load_checkpoint(world, stage) for stage in ("stage0", "stage1", "stage2")}
    head = "code_head.out.weight"
    assert torch.equal(states["stage1"]["model"][head], states["stage0"]["model_ema"][head])
    assert float(states["stage2"]["model_ema"][head].abs().max()) > 0, "it starts at zero and learns"
    identity = read_identity(tuned)
    assert identity is not None and identity.sampling is not None
    assert (identity.sampling.head, identity.sampling.order, identity.sampling.num_iter) == (
        "discrete",
        "confidence",
        8,
    )


def test_class_labels_are_drawn(world: Path, tuned: Path, tmp_path: Path) -> None:
    """While it trains, and from its checkpoint."""
    assert (world / "stage0" / "samples" / "step-0000001.png").is_file()
    words = ["--resume", world / "stage0", "--vae_path", world / "vq.pt", "--class_label", 0, 2, "--num_images", 1]
    words += ["--output_dir", tmp_path / "out", "--device", "cpu", "--cfg", 2]
    scripts.sample.main([str(word) for word in words])
    assert (tmp_path / "out" / "0001.png").is_file()


def test_the_other_trunk_learns_classes_from_cached_codes(world: Path) -> None:
    """To the last bit as from pictures: codes are whole numbers."""
    cache, width = world / "cache", {"code_dim": None, "trunk": "mae"}
    words = ["--class_root", world / "classes", "--cached_path", cache, "--vae_path", world / "vq.pt"]
    words += ["--img_size", 32, "--num_workers", 0, "--device", "cpu"]
    cache_latents.main([str(word) for word in words])
    by_class = {"train_mode": "class", "class_root": world / "classes", "resume": None, "max_steps": 2} | width
    main_mar.main(flags(world, "pictures", **by_class))
    main_mar.main(flags(world, "codes", **by_class, use_cached=True, cached_path=cache))
    one, other = (load_checkpoint(world, output)["model"] for output in ("pictures", "codes"))
    assert_same(one, other)
    assert "encoder_blocks.0.attn.qkv.weight" in one and "diffloss.net.input_proj.weight" not in one


@pytest.fixture(scope="module")
def rewarded(world: Path, tuned: Path) -> Path:
    assert main_rl.main(rl_flags(world, "rl")) == 0
    return world / "rl"


def test_stage_3_takes_what_codes_need(world: Path, rewarded: Path) -> None:
    """Without a flag: the exact estimator, every code scored, rollouts in a random order; the rest as ever."""
    args = yaml.safe_load((rewarded / "args.yaml").read_text())
    assert (args["rl_estimator"], args["order"], args["rl_masks"]) == ("exact", "random", None)
    lines = read_metrics(world, "rl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["replay_gap"] < 1e-4 and line["skipped"] == 0
    assert lines[0]["ratio_min"] <= 1 <= lines[0]["ratio_max"] and lines[1]["kl"] > 0
    assert (rewarded / "rollouts" / "step-0000002.png").is_file()
    log = (rewarded / "log.txt").read_text()
    assert "4 iterations, 4 head calls" in log and "in 16 backbone passes" in log
    assert "order random" not in log.split("sampling options from the weights")[-1].splitlines()[0]
    identity = read_identity(rewarded / "checkpoint-last.pth")
    assert identity is not None and identity.sampling is not None
    assert identity.sampling.order == "confidence", "its images are sampled as stage 2's"


def test_a_run_that_was_stopped_ends_as_one_that_was_not(world: Path, rewarded: Path) -> None:
    main_rl.main(rl_flags(world, "parts", max_rl_steps=1))
    main_rl.main(rl_flags(world, "parts"))
    states = [load_checkpoint(world, name) for name in ("rl", "parts")]
    for state in states:
        del state["args"]
    assert_same(*states)
    lines = [[{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(world, name)]
             for name in ("rl", "parts")]  # fmt: skip
    assert lines[0] == lines[1]


def test_the_exact_kl_and_a_subset_of_iterations(world: Path, tuned: Path) -> None:
    more = {"kl_estimator": "exact", "rl_masks": 2, "order": "halton", "cfg": 2.0, "rl_step_ratio": 0.5}
    assert main_rl.main(rl_flags(world, "other", **more, max_rl_steps=1, inner_epochs=1)) == 0
    (line,) = read_metrics(world, "other")
    assert line["ratio_min"] == line["ratio_max"] == 1.0 and line["kl"] == 0.0 and line["sft_loss"] > 0


def test_its_weights_are_sampled(world: Path, rewarded: Path, tmp_path: Path) -> None:
    layout = [{"prompt": "a red dog", "objects": [{"label": NAMES[0].name, "bbox": [0.1, 0.2, 0.6, 0.9]}]}]
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    words = ["--resume", rewarded, "--vae_path", world / "vq.pt", "--clip_path", world / "clip", "--num_images", 1]
    words += ["--layout", tmp_path / "layout.json", "--output_dir", tmp_path / "out", "--device", "cpu"]
    scripts.sample.main([str(word) for word in words])
    assert (tmp_path / "out" / "0000.png").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"order": "confidence"}, "order confidence does not go with exact log-probabilities"),
        ({"top_k": 5}, "top_k 5 does not go with exact log-probabilities"),
        ({"top_p": 0.9}, "top_p 0.9 does not go with exact log-probabilities"),
        ({"rl_estimator": "elbo"}, "--rl_estimator elbo is for a diffusion head, this model's is discrete"),
        ({"rl_estimator": "trajectory"}, "--rl_estimator trajectory is for a diffusion head"),
        ({"rl_draws": 2}, "--rl_draws 2 does not go with --rl_estimator exact"),
        ({"kl_estimator": "eps"}, "--kl_estimator eps does not go with --rl_estimator exact"),
        ({"rl_masks": 5}, "num_masks must lie between 1 and num_iter = 4, got 5"),
        ({"num_sampling_steps": 5}, "num_sampling_steps is an option of the diffusion head, but the head is discrete"),
    ],
    ids=str,
)
def test_mistakes(world: Path, tuned: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main_rl.main(rl_flags(world, "refused", **more))
    assert message in str(caught.value)
    assert not (world / "refused").exists()


def test_a_diffusion_head_has_no_exact_log_probabilities(world: Path) -> None:
    with pytest.raises(SystemExit, match="--rl_estimator exact is for a discrete head, this model's is diffusion"):
        main_rl.main(argv(world, "refused", rl_estimator="exact", detector_path=world / "detector.pth"))


def test_a_tokenizer_of_another_kind_is_refused(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_class = {"train_mode": "class", "class_root": world / "classes", "resume": None}
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit, match="but the VAE"):
        main_mar.main(flags(world, "refused", **by_class, vae_path=world / "vae.ckpt"))
