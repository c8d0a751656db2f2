"""The pipeline as a Python user calls it: images, options, folders, callbacks, and mistakes found before any work."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine.sample.generate
import scripts.sample
from engine.checkpoint.load import export_weights
from engine.data.scenes import text_scene
from engine.sample.pipeline import StructMARPipeline
from models.frozen.vae import build_autoencoder
from models.sampling.config import SamplingConfig
from tests.conftest import ROOT
from tests.helpers.tiny import CATEGORIES, VAE, World, write_world

BOXES = [[0.1, 0.3, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]]
PHRASES = ["dog", "sports ball"]
OWN = SamplingConfig(
    num_iter=4, num_sampling_steps=4, cfg_text=2.0, cfg_layout=3.0, cfg_schedule="constant", clip_x0=3.0
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def weights(world) -> Path:
    """An exported file that says how to sample it."""
    path = world.root / "weights.safetensors"
    export_weights(world.checkpoint, path, sampling=OWN)
    return path


@pytest.fixture(scope="module")
def loaded(world, weights) -> StructMARPipeline:
    pipe = StructMARPipeline.from_checkpoint(weights, world.vae, world.clip)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded) -> StructMARPipeline:
    loaded.precision = "fp32"
    return loaded


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "pipeline"
    loaded.save_pretrained(path)
    return path


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


def script_image(world: World, weights: Path, out: Path, *flags: str, index: int = 0) -> np.ndarray:
    layout = out / "layout.json"
    out.mkdir(parents=True, exist_ok=True)
    objects = [{"label": label, "bbox": box} for label, box in zip(PHRASES, BOXES, strict=True)]
    layout.write_text(json.dumps({"prompt": "a dog and a ball", "objects": objects}))
    words = ["--resume", str(weights), *world.frozen_flags(), "--layout", str(layout), "--device", "cpu"]
    scripts.sample.main([*words, "--output_dir", str(out), *flags])
    return pixels(Image.open(out / f"{index:04d}.png"))


# --- images --------------------------------------------------------------------------------------------------------


def test_it_draws_the_scripts_images(pipe, world, weights, tmp_path):
    """With the weights' own options, which neither side is told."""
    images = pipe("a dog and a ball", BOXES, PHRASES, seed=5, num_images_per_prompt=2).images
    assert all(isinstance(image, Image.Image) for image in images)
    for index, image in enumerate(images):
        expected = script_image(world, weights, tmp_path, "--seed", "5", "--num_images", "2", index=index)
        assert np.array_equal(pixels(image), expected)


def test_a_folder_draws_the_scripts_images(folder, world, weights, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        again = StructMARPipeline.from_pretrained(folder)
    assert "accelerate" not in caplog.text
    again.set_progress_bar_config(disable=True)
    image = again("a dog and a ball", boxes=BOXES, phrases=PHRASES, seed=7).images[0]
    expected = script_image(world, weights, tmp_path, "--seed", "7", "--num_images", "1")
    assert np.array_equal(pixels(image), expected)
    assert again.identity.sampling == OWN and again.labels == [category.name for category in CATEGORIES]
    assert not again.model.training and again.source == str(folder)


def test_a_folder_of_the_committed_weights_draws_the_same_latents(tmp_path):
    """To the last bit: where weights begin in a file does not matter to the kernels' sums."""
    mini = ROOT / "pretrained_models/mini"
    frozen = {"vae_path": mini / "vae/kl8_mini.ckpt", "clip_path": mini / "clip-text-mini"}
    pipe = StructMARPipeline.from_checkpoint(mini / "structmar_mini_stage2.safetensors", **frozen)
    pipe.save_pretrained(tmp_path / "folder")
    again = StructMARPipeline.from_pretrained(tmp_path / "folder")
    options = {"boxes": BOXES, "phrases": ["kite", "vase"], "seed": 3, "output_type": "latent"}
    expected, found = (each("a red kite", num_inference_steps=3, **options).images for each in (pipe, again))
    assert torch.equal(found, expected)
    assert {parameter.data_ptr() % 64 for parameter in again.model.parameters()} == {0}


def test_a_folder_can_be_moved_and_saved_again(folder, pipe, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again = StructMARPipeline.from_pretrained(moved)
    assert again.describe() | {"path": ""} == pipe.describe() | {"path": ""}
    again.save_pretrained(tmp_path / "again")
    first, second = (json.loads((each / "structmar.json").read_text()) for each in (folder, tmp_path / "again"))
    assert first == second
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["engine.sample.transformer", "StructMARTransformer"]
    assert {path.name for path in folder.iterdir()} >= {"transformer", "vae", "text_encoder", "tokenizer"}
    assert "Infinity" not in (folder / "transformer" / "config.json").read_text()


def test_seeds_and_generators(pipe):
    one, two = pipe(["a dog", "a dog"], seed=3).images
    (again,) = pipe("a dog", seed=4).images
    assert np.abs(pixels(two) - pixels(again)).max() <= 1
    assert np.abs(pixels(one) - pixels(two)).max() > 20
    generators = [engine.sample.generate.image_generator(seed) for seed in (3, 4)]
    given = pipe(["a dog", "a dog"], generator=generators).images
    assert np.array_equal(pixels(given[0]), pixels(one)) and np.array_equal(pixels(given[1]), pixels(two))
    alone = pipe("a dog", generator=torch.Generator().manual_seed(1)).images[0]
    assert np.array_equal(pixels(alone), pixels(pipe("a dog", generator=torch.Generator().manual_seed(1)).images[0]))
    torch.manual_seed(1)
    free = [pixels(pipe("a dog").images[0]) for _ in range(2)]
    assert not np.array_equal(*free)


def test_prompts_with_different_numbers_of_boxes_share_a_batch(pipe):
    prompts = ["a dog and a ball", "a dog", "a ball", ""]
    boxes: list[Any] = [BOXES, BOXES[:1], None, []]
    phrases: list[Any] = [PHRASES, PHRASES[:1], None, []]
    together = pipe(prompts, boxes, phrases, seed=0).images
    for index, image in enumerate(together):
        (alone,) = pipe(prompts[index], boxes[index], phrases[index], seed=index).images
        assert np.abs(pixels(alone) - pixels(image)).max() <= 1


def test_arrays_and_aliases(pipe):
    plain = pipe("a dog", [BOXES[0]], ["dog"], seed=0).images[0]
    for boxes in ([tuple(BOXES[0])], np.array([BOXES[0]]), torch.tensor([BOXES[0]], dtype=torch.float64)):
        assert np.array_equal(pixels(pipe("a dog", boxes, ("dog",), seed=0).images[0]), pixels(plain))
    gligen = pipe("a dog", gligen_boxes=[BOXES[0]], gligen_phrases=["dog"], seed=0).images[0]
    assert np.array_equal(pixels(gligen), pixels(plain))


def test_options_are_the_weights_own_or_the_calls(pipe, monkeypatch):
    seen = []
    original = engine.sample.generate.sample

    def spy(model, config, *args, **kwargs):
        seen.append((config, kwargs["dtype"]))
        return original(model, config, *args, **kwargs)

    monkeypatch.setattr(engine.sample.generate, "sample", spy)
    pipe("a dog", seed=0)
    options = {"guidance_scale": 1.5, "layout_guidance_scale": 2, "num_inference_steps": 3, "num_diffusion_steps": 5}
    options |= {"temperature": 0.5, "cfg_schedule": "linear", "clip_x0": 2.0, "t_max": 900, "order": "halton"}
    options |= {"num_sampling_steps_last": 2, "guidance_interval": (0.0, 0.5), "uncond_refresh": 2}
    pipe.to(torch.bfloat16)("a dog", seed=0, **options)
    expected = SamplingConfig(3, 5, 1.5, 2, "linear", 0.5, 2.0, 900, 2, "halton", (0.0, 0.5), 2)
    assert seen == [(OWN, torch.float32), (expected, torch.bfloat16)]
    assert pipe.model.fake_latent.dtype == torch.float32


def test_output_types(pipe):
    picture = pixels(pipe("a dog", seed=0).images[0])
    array = pipe("a dog", seed=0, output_type="np").images
    tensor = pipe("a dog", seed=0, output_type="pt").images
    latents = pipe("a dog", seed=0, output_type="latent").images
    assert array.shape == (1, 32, 32, 3) and np.abs(255 * array[0] - picture).max() <= 0.51
    assert tensor.shape == (1, 3, 32, 32) and latents.shape == (1, 4, 8, 8)
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array[0])
    torch.testing.assert_close(pipe.codec.decode(latents) / 2 + 0.5, tensor)
    images = pipe("a dog", seed=0, return_dict=False)
    assert isinstance(images, tuple) and np.array_equal(pixels(images[0][0]), picture)


def test_from_parts_copies_nothing(pipe):
    around = StructMARPipeline.from_parts(pipe.model.train(), pipe.codec, pipe.caption_encoder)
    assert around.model is pipe.model and around.identity is None and around.labels == []
    around.draw([text_scene("a dog")], OWN, [0])
    assert around.model.training
    pipe.model.eval()
    with pytest.raises(ValueError, match="only a pipeline of finished weights can be saved"):
        around.save_pretrained("nowhere")


# --- callbacks -----------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_iteration(pipe):
    seen = []

    def callback(given, iteration, left, inputs):
        assert given is pipe
        seen.append((iteration, left, int((inputs["tokens"] != 0).any(-1).sum())))

    image = pipe("a dog", seed=0, callback_on_step_end=callback).images[0]
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    known = [entry[2] for entry in seen]
    assert known == sorted(set(known)) and known[-1] == 64
    assert np.array_equal(pixels(image), pixels(pipe("a dog", seed=0).images[0]))


def test_a_callback_may_change_tokens_or_stop(pipe):
    def zero(_pipe, _iteration, left, inputs):
        return {"tokens": torch.zeros_like(inputs["tokens"])} if left == 0 else None

    latents = pipe("a dog", seed=0, output_type="latent", callback_on_step_end=zero).images
    assert not latents.any()

    def stop(pipe, iteration, _left, _inputs):
        pipe.interrupt = iteration == 1

    calls = []

    def stop_and_count(*arguments):
        calls.append(1)
        stop(*arguments)

    stopped = pipe("a dog", seed=0, output_type="latent", callback_on_step_end=stop_and_count).images
    whole = pipe("a dog", seed=0, output_type="latent").images
    assert len(calls) == 2 and whole.all()
    known = stopped != 0
    assert 0 < int(known.sum()) < known.numel() and torch.equal(stopped[known], whole[known])
    with pytest.raises(ValueError, match=r"gave tokens of shape \(1, 2\), expected \(1, 64, 4\)"):
        pipe("a dog", seed=0, callback_on_step_end=lambda *_: {"tokens": torch.zeros(1, 2)})


# --- mistakes ------------------------------------------------------------------------------------------------------

BOX = [0.1, 0.1, 0.5, 0.5]
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"prompt": 3}, "prompt must be a string or a list of at least one, got 3"),
    "no prompt": ({"prompt": []}, r"prompt must be a string or a list of at least one, got \[\]"),
    "prompt in a list": ({"prompt": ["a", None]}, "prompt 1 must be a string, got None"),
    "boxes of prompts": (
        {"prompt": ["a", "b"], "boxes": [[BOX]]},
        "boxes must hold one list for each of the 2",
    ),
    "counts": ({"boxes": [BOX], "phrases": ["dog", "dog"]}, "prompt 0: every box needs its phrase, got 1 boxes and 2"),
    "no phrases": ({"boxes": [BOX]}, "prompt 0: every box needs its phrase, got 1 boxes and 0 phrases"),
    "a flat box": ({"boxes": BOX, "phrases": ["dog"] * 4}, "prompt 0, object 0 .'dog'.: 'bbox' must be four numbers"),
    "phrases": ({"boxes": [BOX], "phrases": "dog"}, "prompt 0: phrases must be a list, got 'dog'"),
    "range": ({"boxes": [[0, 0, 32, 32]], "phrases": ["dog"]}, r"'bbox' x1 = 32 is not in \[0, 1\]"),
    "order": ({"boxes": [[0.5, 0, 0.1, 1]], "phrases": ["dog"]}, "needs x0 < x1, got x0 = 0.5, x1 = 0.1"),
    "phrase": ({"boxes": [BOX], "phrases": ["dgo"]}, "object 0: unknown label 'dgo'; did you mean 'dog'"),
    "too many": ({"boxes": [BOX] * 5, "phrases": ["dog"] * 5}, "5 objects, but the checkpoint places at most 4"),
    "both names": ({"boxes": [BOX], "gligen_boxes": [BOX]}, "give either boxes or gligen_boxes"),
    "seed": ({"seed": -1}, "seed must be a whole number in 0 .*, got -1"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, "give either seed or generator, got seed 1"),
    "generators": (
        {"generator": [torch.Generator()] * 2},
        "generator must be a torch.Generator, or one",
    ),
    "images": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1 on, got 0"),
    "batch": ({"batch_size": 1.5}, "batch_size must be a whole number from 1 on, got 1.5"),
    "output": ({"output_type": "jpg"}, r"output_type must be one of \('pil', .*got 'jpg'"),
    "callback": ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"may name \['tokens'\], got \['latents'\]"),
    "iterations": ({"num_inference_steps": 65}, "num_inference_steps 65 exceeds the 64 tokens of an image"),
    "steps": ({"num_diffusion_steps": 0}, "num_diffusion_steps must lie between 1 and 1000, got 0"),
    "type": ({"num_inference_steps": "many"}, "num_inference_steps must be int, got 'many'"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale must lie in .0, 100., got nan"),
    "order of tokens": ({"order": "spiral"}, "order must be one of .*, got 'spiral'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_any_work(pipe, monkeypatch, case):
    monkeypatch.setattr(engine.sample.generate, "sample", None)
    monkeypatch.setattr(pipe.caption_encoder, "context", None)
    arguments, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a dog"} | arguments))


def test_an_exchanged_component_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    torch.manual_seed(1)
    build_autoencoder(VAE).save_pretrained(broken / "vae")
    with pytest.raises(ValueError, match=r"broken: vae has the contents \w{64}, but \w{64} were saved"):
        StructMARPipeline.from_pretrained(broken)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pipeline folder .*none does not exist"):
        StructMARPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is no pipeline folder: it has no structmar\.json"):
        StructMARPipeline.from_pretrained(tmp_path)
    other = shutil.copytree(folder, tmp_path / "other")
    record = json.loads((other / "structmar.json").read_text())
    (other / "structmar.json").write_text(json.dumps(record | {"format": "structmar-pipeline-9"}))
    with pytest.raises(ValueError, match=r"structmar\.json has format 'structmar-pipeline-9', this version reads"):
        StructMARPipeline.from_pretrained(other)
    (other / "structmar.json").write_text("{")
    with pytest.raises(ValueError, match=r"structmar\.json is not valid JSON"):
        StructMARPipeline.from_pretrained(other)


def test_other_dtypes_are_refused(folder, pipe):
    assert StructMARPipeline.from_pretrained(folder, dtype=torch.bfloat16).precision == "bf16"
    assert StructMARPipeline.from_pretrained(folder, torch_dtype=torch.float32).precision == "fp32"
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"):
        StructMARPipeline.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"got torch\.float16"):
        pipe.to(torch.float16)


def test_a_pipeline_with_other_frozen_parts_is_not_saved(world, weights, tmp_path):
    clip = shutil.copytree(world.clip, tmp_path / "clip")
    settings = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-4}))
    with pytest.raises(ValueError, match=r"text encoder .* has id \w{64}, but the checkpoint was trained with"):
        StructMARPipeline.from_checkpoint(weights, world.vae, clip)
    pipe = StructMARPipeline.from_checkpoint(weights, world.vae, clip, allow_other_frozen=True)
    with pytest.raises(ValueError, match="the pipeline's text encoder has id"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_components_alone_are_no_pipeline(pipe):
    assert set(pipe.components) == {"transformer", "vae", "text_encoder", "tokenizer"}
    with pytest.raises(ValueError, match="make a pipeline by from_pretrained, from_checkpoint or from_parts"):
        StructMARPipeline(**pipe.components)


def test_weights_without_options_have_the_defaults(world):
    pipe = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    assert pipe.own_sampling == SamplingConfig() != replace(OWN)
