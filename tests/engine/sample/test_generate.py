"""From scenes to images: what an image depends on, how guidance and precision are wired."""

import numpy as np
import pytest
import torch

import engine.sample.generate
from engine.checkpoint.load import load_mar_for_sampling
from engine.data.scenes import KnownLabels, Scene, read_layout_file, text_scene
from engine.sample.generate import encode_prompts, num_iterations
from engine.sample.pipeline import StructMARPipeline
from models.frozen.vae import LatentCodec
from models.sampling.config import SamplingConfig
from tests.helpers.tiny import CATEGORIES, MAR_CONFIG, World, write_world
from util.types import Layout

CONFIG = SamplingConfig(num_iter=6, num_sampling_steps=5, cfg_text=2.0, cfg_layout=3.0, clip_x0=3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world) -> StructMARPipeline:
    return StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)


@pytest.fixture(scope="module")
def scenes(world) -> list[Scene]:
    written = read_layout_file(world.layout, KnownLabels(CATEGORIES, 4))
    return [*written, text_scene(""), text_scene("a much longer prompt than these")]


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_images_are_pictures_of_the_models_size(pipe, scenes):
    images = pipe.draw(scenes, CONFIG, [0, 1, 2, 3])
    assert len(images) == 4
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images)
    assert all(image.std() > 5 for image in images)  # not a constant: the tests below would pass trivially


def test_image_depends_on_its_seed_not_on_its_batch(pipe, scenes):
    seeds = [11, 12, 13, 14]
    together = pipe.draw(scenes, CONFIG, seeds, batch_size=4)
    for batch_size in (1, 3):
        apart = pipe.draw(scenes, CONFIG, seeds, batch_size=batch_size)
        assert max(map(difference, together, apart)) <= 1
    reverse = pipe.draw(scenes[::-1], CONFIG, seeds[::-1], batch_size=4)[::-1]
    assert max(map(difference, together, reverse)) <= 1


def test_same_seed_same_image_other_seed_other_image(pipe, scenes):
    first, again, other = (pipe.draw(scenes[:1], CONFIG, [seed])[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert difference(first, other) > 20


def test_prompt_and_boxes_matter(pipe, scenes):
    scene = scenes[0]
    moved = Scene(scene.prompt, Layout(scene.layout.boxes_xyxy.flip(0), scene.layout.categories), scene.names)
    retold = Scene("a red dog", scene.layout, scene.names)
    images = [pipe.draw([each], CONFIG, [5])[0] for each in (scene, moved, retold)]
    assert difference(images[0], images[1]) > 5
    assert difference(images[0], images[2]) > 5


def test_an_empty_prompt_is_no_text(pipe):
    context = encode_prompts(pipe.caption_encoder, ["a dog", ""])
    assert context.valid[0].any() and not context.valid[1].any()
    assert context.pooled[1].abs().max() == 0


@pytest.mark.parametrize("changes", [{"cfg_text": 1.0}, {"cfg_layout": 1.0}, {"cfg_schedule": "constant"}])
def test_guidance_reaches_the_sampler(pipe, scenes, changes):
    plain = pipe.draw(scenes[:1], CONFIG, [5])[0]
    changed = pipe.draw(scenes[:1], SamplingConfig(**vars(CONFIG) | changes), [5])[0]
    assert difference(plain, changed) > 3


def test_bf16_is_close_and_another_precision_is_refused(pipe, scenes, monkeypatch):
    seen = []
    original = engine.sample.generate.sample

    def spy(*args, **kwargs):
        seen.append(kwargs["dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.sample.generate, "sample", spy)
    full = pipe.draw(scenes[:1], CONFIG, [5])[0].astype(float)
    half = pipe.draw(scenes[:1], CONFIG, [5], precision="bf16")[0].astype(float)
    assert seen == [torch.float32, torch.bfloat16]
    assert np.abs(full - half).mean() < 20
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'fp16'"):
        pipe.draw(scenes[:1], CONFIG, [5], precision="fp16")


def test_the_models_mode_is_put_back(pipe, scenes):
    model = pipe.model
    model.train()
    try:
        pipe.draw(scenes[:1], CONFIG, [5])
        assert model.training
    finally:
        model.eval()


def test_progress_is_called_as_often_as_announced(pipe, scenes):
    calls = []
    pipe.draw(scenes, CONFIG, [1, 2, 3, 4], batch_size=3, progress=lambda: calls.append(1))
    assert len(calls) == num_iterations(4, 3, CONFIG) == 12


def test_wrong_numbers_of_seeds_and_sizes(pipe, scenes):
    with pytest.raises(ValueError, match="4 scenes and 1 seeds"):
        pipe.draw(scenes, CONFIG, [1])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pipe.draw(scenes[:1], CONFIG, [1], batch_size=0)


def test_class_images(world):
    model = load_mar_for_sampling(world.mar, MAR_CONFIG)
    pipe = StructMARPipeline.from_parts(model, LatentCodec.load(world.vae, latent_scale=0.5), None)
    images = pipe.draw_classes([0, 4, 4], CONFIG, [7, 7, 8], batch_size=2)
    assert all(image.shape == (32, 32, 3) for image in images)
    assert difference(images[0], images[1]) > 3  # the class matters
    assert difference(images[1], images[2]) > 20  # so does the seed
    alone = pipe.draw_classes([4], CONFIG, [7])[0]
    assert difference(alone, images[1]) <= 1
    with pytest.raises(ValueError, match=r"class label 5 is outside 0 \.\.\. 4"):
        pipe.draw_classes([5], CONFIG, [7])
    with pytest.raises(ValueError, match="1 labels and 2 seeds"):
        pipe.draw_classes([1], CONFIG, [7, 8])
    with pytest.raises(ValueError, match="MAR's own weights, which know classes instead of captions"):
        pipe.draw([text_scene("a dog")], CONFIG, [7])
