"""Phrases of boxes by the real programs: trained from weights without them, resumed, drawn, scored, refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import main_rl
import scripts.evaluate_layout
import scripts.sample
from engine.checkpoint.load import export_weights
from engine.sample.pipeline import StructMARPipeline
from models.weights import PHRASE_PARTS
from tests.helpers.coco_fixture import CATEGORIES, annotation_path
from tests.helpers.eval_world import write_detector, write_profile
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import argv, load_checkpoint, write_world
from util.types import Category

NAMES = tuple(sorted((Category(each["id"], each["name"]) for each in CATEGORIES), key=lambda each: each.id))
SPLITS = ("train2014", "val2014")
QUICK = {"num_iter": 3, "num_sampling_steps": 4, "clip_x0": 3.0, "cfg_layout": 2.0}
BOX = [0.1, 0.3, 0.6, 0.9]
PHRASED: dict[str, Any] = {"train_mode": "full", "phrases": True, "log_freq": 1}


def write_phrases(root: Path) -> None:
    """ "red a", "red b" ... in both splits; one box of each stays without."""
    for split in SPLITS:
        path = annotation_path(root / "coco", "instances", split)
        content = json.loads(path.read_text())
        for number, annotation in enumerate(content["annotations"][1:]):
            annotation["phrase"] = f"red {'abc'[number % 3]}"
        path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of stage 2 without phrases ("before"), and with them ("phrased"), three steps from the former."""
    root = write_world(tmp_path_factory.mktemp("phrases") / "world")
    write_phrases(root)
    write_detector(root / "detector.pth", NAMES)
    write_profile(root / "tiny.yaml")
    assert main_mar.main(argv(root, "before", train_mode="full", max_steps=1)) == 0
    export_weights(root / "before" / "checkpoint-last.pth", root / "before.safetensors")
    start = {"resume": root / "before.safetensors", "lr": 0.1, **PHRASED}
    assert main_mar.main(argv(root, "phrased", **start, max_steps=3)) == 0
    export_weights(root / "phrased" / "checkpoint-last.pth", root / "phrased.safetensors")
    return root


@pytest.fixture(scope="module")
def pipe(world: Path) -> StructMARPipeline:
    return pipeline(world, "phrased")


def pipeline(world: Path, name: str) -> StructMARPipeline:
    pipe = StructMARPipeline.from_checkpoint(world / f"{name}.safetensors", world / "vae.ckpt", world / "clip")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- training ------------------------------------------------------------------------------------------------------


def test_phrases_train_from_weights_without_them(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        main_mar.main(argv(world, "again", resume=world / "before.safetensors", lr=0.1, **PHRASED, max_steps=1))
    assert "2 tensors new, at their initial values: layout_embed.unknown, layout_embed.phrase" in caplog.text
    trained = load_checkpoint(world, "phrased")
    assert trained["config"]["phrases"] and not load_checkpoint(world, "before")["config"]["phrases"]
    assert all(trained["model"][name].any() and name in trained["model_ema"] for name in PHRASE_PARTS)


def test_a_stopped_run_ends_as_one_that_was_not(world: Path) -> None:
    start = {"resume": world / "before.safetensors", "lr": 0.1, **PHRASED}
    for steps in (1, 3):
        main_mar.main(argv(world, "parts", **start, max_steps=steps))
    first, second = load_checkpoint(world, "phrased"), load_checkpoint(world, "parts")
    del first["args"], second["args"]
    assert_same(first, second)


def test_two_processes_train_them_as_one(world: Path) -> None:
    """Sharded, and under the same names."""
    start = {"resume": world / "before.safetensors", "phrase_prob": 1.0, **PHRASED, "max_steps": 1}
    flags = argv(world, "sharded", **start, batch_size=1, fsdp=True)
    in_two_processes(lambda _: main_mar.main(flags), join_group=False)
    sharded, whole = (load_checkpoint(world, name)["model"] for name in ("sharded", "phrased"))
    assert sharded.keys() == whole.keys()
    assert all(sharded[name].shape == whole[name].shape for name in PHRASE_PARTS)
    assert sharded["layout_embed.phrase"].any()


def test_stage_1_trains_them_from_mars_weights(world: Path) -> None:
    main_mar.main(argv(world, "stage1", phrases=True, phrase_prob=1.0, lr=0.1, max_steps=2))
    assert load_checkpoint(world, "stage1")["model_ema"].keys() >= set(PHRASE_PARTS)


def test_what_a_run_cannot_take_is_refused(world: Path) -> None:
    for flags, message in (
        ({"resume": world / "phrased.safetensors"}, "phrases True in the file, False here"),
        ({"phrase_prob": 0.5}, "--phrase_prob 0.5 is for models with --phrases"),
        ({"resume": world / "before", "phrases": True}, "phrases False in the file, True here"),
    ):
        with pytest.raises(SystemExit) as caught:
            main_mar.main(argv(world, "none", **{"train_mode": "full", "max_steps": 1, **flags}))
        assert message in str(caught.value)
        assert not (world / "none").exists()


def test_stage_3_takes_weights_with_phrases(world: Path) -> None:
    """Prompts are boxes with classes, as ever."""
    flags = argv(
        world, "grpo", resume=world / "phrased.safetensors", phrases=True, detector_path=world / "detector.pth",
        group_size=2, num_iter=3, num_sampling_steps=6, clip_x0=3.0, rl_masks=2, rl_draws=2, warmup_epochs=None,
        max_rl_steps=1, sample_freq=0,
    )  # fmt: skip
    assert main_rl.main(flags) == 0
    assert load_checkpoint(world, "grpo")["config"]["phrases"]


# --- drawing -------------------------------------------------------------------------------------------------------


def drawn(pipe: StructMARPipeline, phrase: str, **more: Any) -> torch.Tensor:
    options = {"num_inference_steps": 3, "num_diffusion_steps": 4, "clip_x0": 3.0, "output_type": "latent", "seed": 1}
    latents: torch.Tensor = pipe("a red dog", [BOX], [phrase], **options, **more).images
    return latents


def test_a_call_places_words_beside_classes(pipe: StructMARPipeline) -> None:
    variants = [drawn(pipe, phrase) for phrase in ("tomato", "red a", "red b")]
    variants += [drawn(pipe, "red a", classes=[label]) for label in ("plum", "tomato")]
    for index, one in enumerate(variants):
        assert not any(torch.equal(one, other) for other in variants[:index])
    assert torch.equal(drawn(pipe, "red a", classes=[None]), variants[1])
    with pytest.raises(ValueError, match="prompt 0: 1 boxes need as many classes, got 2"):
        drawn(pipe, "red a", classes=["plum", "plum"])


def test_a_saved_folder_keeps_them(pipe: StructMARPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "folder")
    again = StructMARPipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again, "red a"), drawn(pipe, "red a"))


def test_weights_without_phrases_refuse_them(world: Path) -> None:
    with pytest.raises(ValueError, match="prompt 0, object 0: unknown label 'red a'"):
        drawn(pipeline(world, "before"), "red a")


def sample(world: Path, weights: str, folder: Path, item: dict[str, Any]) -> np.ndarray:
    folder.mkdir()
    (folder / "layout.json").write_text(json.dumps({"prompt": "a red dog", "objects": [{"bbox": BOX, **item}]}))
    words = ["--resume", f"{world / weights}.safetensors", "--vae_path", str(world / "vae.ckpt"), "--device", "cpu"]
    words += ["--clip_path", str(world / "clip"), "--layout", str(folder / "layout.json"), "--num_images", "1"]
    words += [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    scripts.sample.main([*words, "--output_dir", str(folder / "out")])
    return np.asarray(Image.open(folder / "out" / "0000.png"))


def test_layout_files_say_them(world: Path, tmp_path: Path) -> None:
    """An unknown label is a phrase; a phrase beside a label is something else."""
    by_label = sample(world, "phrased", tmp_path / "a", {"label": "red a"})
    by_phrase = sample(world, "phrased", tmp_path / "b", {"label": "something", "phrase": "red a"})
    both = sample(world, "phrased", tmp_path / "c", {"label": "plum", "phrase": "red a"})
    assert np.array_equal(by_label, by_phrase) and not np.array_equal(by_label, both)
    with pytest.raises(SystemExit, match="'phrase' 'red a', but these weights were trained without phrases"):
        sample(world, "before", tmp_path / "d", {"label": "plum", "phrase": "red a"})


# --- scoring -------------------------------------------------------------------------------------------------------


def evaluate(world: Path, weights: str, output: Path, boxes_by: str) -> dict[str, Any]:
    words = ["--profile", world / "tiny.yaml", "--coco_root", world / "coco", "--coco_split", "val2014"]
    words += ["--detector", world / "detector.pth", "--resume", f"{world / weights}.safetensors", "--device", "cpu"]
    words += ["--vae_path", world / "vae.ckpt", "--clip_path", world / "clip", "--output_dir", output]
    words += ["--boxes_by", boxes_by, "--num_resamples", 20, "--max_images", 2, "--no-real_bound"]
    words += [word for name, value in QUICK.items() for word in (f"--{name}", value)]
    scripts.evaluate_layout.main([str(word) for word in words])
    record: dict[str, Any] = json.loads((output / "generation.json").read_text())
    return record


def test_an_evaluation_names_boxes_as_asked(world: Path, tmp_path: Path) -> None:
    """Whatever they are called, the same boxes are scored."""
    ways = ("class", "phrase", "both")
    records = [evaluate(world, "phrased", tmp_path / way, way) for way in ways]
    assert len({record["scenes"] for record in records}) == 3
    truths = {(tmp_path / way / "ground_truth_conditioned.json").read_text() for way in ways}
    assert len(truths) == 1
    pictures = [[path.read_bytes() for path in sorted((tmp_path / way / "images").rglob("*.png"))] for way in ways]
    assert len(pictures[0]) == 2 and pictures[0] != pictures[1] != pictures[2]
    with pytest.raises(SystemExit, match="--boxes_by phrase: .* was trained without phrases"):
        evaluate(world, "before", tmp_path / "none", "phrase")
