"""Controls of the layout from where a user says them: layout files, calls of the pipeline and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.compare_heads
import scripts.sample
from engine.checkpoint.load import export_weights
from engine.data.scenes import KnownLabels, read_entry
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from tests.helpers.tiny import CATEGORIES, World, write_world
from util.types import LayoutBatch

BOXES = [[0.1, 0.3, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]]
OBJECTS = [{"label": label, "bbox": box} for label, box in zip(("dog", "sports ball"), BOXES, strict=True)]
PROMPT = "a dog and a ball"
FAST = {"num_inference_steps": 4, "num_diffusion_steps": 3, "clip_x0": 3.0, "seed": 5}
FLAGS = ["--num_iter", "4", "--num_sampling_steps", "3", "--clip_x0", "3", "--seed", "5", "--device", "cpu"]
GUIDED = {"guidance_scale": 2.0, "layout_guidance_scale": 3.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> StructMARPipeline:
    loaded = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(pipe: StructMARPipeline, boxes: Any = None, **options: Any) -> torch.Tensor:
    """Latents."""
    phrases = None if boxes is None else [item["label"] for item in OBJECTS]
    return pipe(PROMPT, boxes, phrases, output_type="latent", **FAST | GUIDED | options).images


def write_layout(path: Path, *objects: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"prompt": PROMPT, "objects": list(objects)}))
    return path


def sampled(world: World, out: Path, layout: Path, *flags: str) -> np.ndarray:
    words = ["--resume", str(world.checkpoint), *world.frozen_flags(), *FLAGS, "--layout", str(layout)]
    scripts.sample.main([*words, "--num_images", "1", "--output_dir", str(out), *flags])
    return np.asarray(Image.open(out / "0000.png")).astype(int)


def test_a_box_without_a_strength_has_none_of_its_own() -> None:
    """1 is a strength as any other; a file that is written again says the same."""
    objects = [OBJECTS[0] | {"scale": 1}, OBJECTS[1]]
    scene = read_entry({"prompt": PROMPT, "objects": objects}, "here", KnownLabels(CATEGORIES, 4))
    assert scene.layout.scales == (1.0, None)
    assert [item.get("scale") for item in scene.to_dict()["objects"]] == [1.0, None]
    plain = read_entry({"prompt": PROMPT, "objects": OBJECTS}, "here", KnownLabels(CATEGORIES, 4))
    assert plain.layout.scales == () and LayoutBatch.collate([plain.layout], 4).with_scale(1.0).scales is None
    batch = LayoutBatch.collate([scene.layout, plain.layout], 4)
    found = batch.with_scale(0.25).own_scales()
    assert found is not None and found.tolist() == [[1.0, 0.25, 1.0, 1.0], [0.25, 0.25, 1.0, 1.0]]


def test_strengths_of_a_call(pipe: StructMARPipeline) -> None:
    """Of each box, of those that have none, and of all."""
    expected = drawn(pipe, BOXES, subject_scales=[0.2, 0.2])
    assert torch.equal(drawn(pipe, BOXES, layout_scale=0.2), expected)
    assert torch.equal(drawn(pipe, BOXES, layout_scale=0.2, subject_scales=[None, 0.2]), expected)
    assert torch.equal(drawn(pipe, BOXES, subject_scales=[1, 1], layout_scale=0.2), drawn(pipe, BOXES))
    assert not torch.equal(expected, drawn(pipe, BOXES))


def test_a_call_that_drops_its_boxes_is_that_of_the_caption(pipe: StructMARPipeline) -> None:
    caption_alone = drawn(pipe)
    assert torch.equal(drawn(pipe, BOXES, drop_grounding_tokens=True), caption_alone)
    faded = drawn(pipe, BOXES, layout_schedule=(0.0, 0.0))
    torch.testing.assert_close(faded, caption_alone, rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_of_a_call(pipe: StructMARPipeline) -> None:
    """As negative as the caption itself, it undoes guidance by the caption."""
    constant = {"cfg_schedule": "constant"}
    undone = drawn(pipe, negative_prompt=PROMPT, **constant)
    unguided = drawn(pipe, guidance_scale=1.0, layout_guidance_scale=1.0, **constant)
    torch.testing.assert_close(undone, unguided, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(drawn(pipe, negative_prompt="a red dog"), drawn(pipe), atol=1e-3)
    assert torch.equal(drawn(pipe, negative_prompt=""), drawn(pipe))


def test_the_script_draws_what_the_call_draws(pipe: StructMARPipeline, world: World, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout.json", *OBJECTS)
    call = {"layout_schedule": (0.3, 0.2), "subject_scales": [0.5, 2.0], "negative_prompt": "a red dog"}
    (image,) = pipe(PROMPT, BOXES, [item["label"] for item in OBJECTS], **FAST | GUIDED | call).images
    flags = [
        "--layout_schedule",
        "0.3",
        "0.2",
        "--negative_prompt",
        "a red dog",
        "--cfg_text",
        "2",
        "--cfg_layout",
        "3",
    ]
    found = sampled(world, tmp_path / "flag", layout, *flags, "--subject_scales", "0.5", "2")
    assert np.abs(found - np.asarray(image).astype(int)).max() <= 1
    told = json.loads((tmp_path / "flag" / "samples.json").read_text())
    assert [item["scale"] for item in told["images"][0]["objects"]] == [0.5, 2.0]
    scaled = [item | {"scale": scale} for item, scale in zip(OBJECTS, (0.5, 2.0), strict=True)]
    again = sampled(world, tmp_path / "file", write_layout(tmp_path / "scaled.json", *scaled), *flags)
    assert np.array_equal(again, found)


def test_weights_may_name_the_guidance_that_a_negative_prompt_needs(world: World, tmp_path: Path) -> None:
    """Then it needs none on the command line; one there counts first."""
    path = tmp_path / "weights.safetensors"
    export_weights(world.checkpoint, path, sampling=SamplingConfig(cfg_text=2.0, cfg_layout=3.0))
    layout = write_layout(tmp_path / "layout.json", *OBJECTS)
    words = ["--resume", str(path), "--negative_prompt", "a red dog"]
    told = sampled(world, tmp_path / "own", layout, *words)
    scales = ["--cfg_text", "2", "--cfg_layout", "3"]
    assert np.array_equal(told, sampled(world, tmp_path / "said", layout, *words[2:], *scales))
    with pytest.raises(SystemExit, match="it needs --cfg_text other than 1"):
        sampled(world, tmp_path / "none", layout, *words, "--cfg_text", "1")


MISTAKES: dict[str, tuple[list[str], str]] = {
    "as many strengths as boxes": (
        ["--subject_scales", "0.5"],
        r"--subject_scales, layout file .*layout\.json, entry 0: 2 boxes need as many strengths, got 1 \(0\.5\)",
    ),
    "range of a strength": (["--subject_scales", "1", "-1"], r"--subject_scales must lie in \[0, 100\], got -1"),
    "range of all strengths": (["--layout_scale", "101"], r"--layout_scale must lie in \[0, 100\], got 101"),
    "range of the schedule": (["--layout_schedule", "0.5", "2"], r"--layout_schedule must lie in \[0, 1\], got 2"),
    "negative without guidance": (
        ["--negative_prompt", "dark"],
        "--negative_prompt 'dark' is what guidance by the caption leads away from: it needs --cfg_text other than 1",
    ),
    "blank negative prompt": (["--negative_prompt", " ", "--cfg", "2"], "--negative_prompt is blank, got ' '"),
    "half a character": (
        ["--negative_prompt", "dark\ud800", "--cfg", "2"],
        "--negative_prompt is no text: it has a lone surrogate",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_before_anything_runs(world: World, tmp_path: Path, case: str) -> None:
    flags, message = MISTAKES[case]
    with pytest.raises(SystemExit, match=message):
        sampled(world, tmp_path / "out", write_layout(tmp_path / "layout.json", *OBJECTS), *flags)
    assert not (tmp_path / "out").exists()


def test_strengths_need_a_layout_file(world: World, tmp_path: Path) -> None:
    words = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--prompt", "a dog", "--subject_scales", "2"]
    with pytest.raises(SystemExit, match=r"--subject_scales 2 are of the boxes of a --layout, which is not given"):
        scripts.sample.main([*words, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "flags", [["--layout_schedule", "0.3", "0.2"], ["--drop_grounding_tokens"]], ids=lambda f: f[0]
)
def test_what_has_no_layout_or_repeats_single_iterations_refuses_them(
    world: World, tmp_path: Path, flags: list[str]
) -> None:
    words = ["--resume", str(world.mar), "--vae_path", str(world.vae), "--model", "mar_mini", "--class_label", "1"]
    with pytest.raises(SystemExit, match=rf"{flags[0]} .* does not go with --class_label: classes have neither"):
        scripts.sample.main([*words, "--output_dir", str(tmp_path / "out"), *flags])
    words = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--coco_root", str(tmp_path), *flags]
    with pytest.raises(SystemExit, match=rf"{flags[0]} .* does not go with scripts\.compare_heads"):
        scripts.compare_heads.main(words)
