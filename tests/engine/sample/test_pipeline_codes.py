"""A pipeline whose model draws codes and whose tokenizer decodes them: from a checkpoint, from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.sample.pipeline import StructMARPipeline
from models.frozen.codes import CodeCodec
from models.frozen.vq import VqConfig
from models.sampling.config import default_sampling
from tests.helpers.tiny import World, write_world
from tests.helpers.tiny_codes import write_codes
from tests.helpers.vq_file import write_vq


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def paths(world) -> tuple[Path, Path]:
    return write_codes(world)


def draw(pipe: StructMARPipeline, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a dog", boxes=[[0.1, 0.3, 0.5, 0.9]], phrases=["dog"], seed=3, **options).images


def test_it_draws_codes_and_decodes_them(world, paths):
    pipe = StructMARPipeline.from_checkpoint(*paths, world.clip)
    assert isinstance(pipe.codec, CodeCodec)
    codes = draw(pipe, output_type="latent")
    assert codes.shape == (1, 1, 8, 8) and torch.equal(codes, codes.round()) and len(codes.unique()) > 1
    expected = pipe.codec.decode(codes) / 2 + 0.5
    torch.testing.assert_close(draw(pipe, output_type="pt"), expected)


def test_a_folder_draws_the_same(world, paths, tmp_path):
    pipe = StructMARPipeline.from_checkpoint(*paths, world.clip)
    pipe.save_pretrained(tmp_path / "folder")
    again = StructMARPipeline.from_pretrained(tmp_path / "folder")
    assert torch.equal(draw(pipe, output_type="latent"), draw(again, output_type="latent"))
    torch.testing.assert_close(draw(pipe, output_type="pt"), draw(again, output_type="pt"))


def test_tokenizers_of_another_kind_or_codebook_are_refused(world, paths, tmp_path):
    checkpoint, _ = paths
    with pytest.raises(ValueError, match="made for 0.5|has id"):
        StructMARPipeline.from_checkpoint(checkpoint, world.vae, world.clip)
    other = write_vq(tmp_path / "other.pt", VqConfig((8, 16, 16), 1, 8, 24, 4, norm_num_groups=4))
    with pytest.raises(ValueError, match=r"the model has codebook_size 20, but the VAE .*other\.pt has 24"):
        StructMARPipeline.from_checkpoint(checkpoint, other, world.clip, allow_other_frozen=True)
    with pytest.raises(ValueError, match=r"asked for latent_scale 0\.5, but .*other\.pt makes codes"):
        StructMARPipeline.from_checkpoint(world.checkpoint, other, world.clip)


def test_options_of_a_call_are_its_heads(world, paths):
    """A prefix, another order and schedule, fewer codes to draw from; nothing of reverse processes."""
    pipe = StructMARPipeline.from_checkpoint(*paths, world.clip)
    assert pipe.own_sampling == default_sampling("discrete")
    plain = draw(pipe, output_type="latent")
    every = ({"top_k": 3}, {"top_p": 0.5}, {"order": "raster"}, {"schedule": "root"}, {"choice_temperature": 100.0})
    for options in (
        *every,
        {"prefix_k": 5},
        {"temperature": 3.0},
        {"cfg_schedule": "step_linear", "guidance_scale": 3},
    ):
        assert not torch.equal(draw(pipe, output_type="latent", **options), plain), options
    assert torch.equal(draw(pipe, output_type="latent", top_k="none"), plain)
    for name, value in (("num_diffusion_steps", 100), ("clip_x0", 3.0), ("t_max", 900)):
        with pytest.raises(ValueError, match=f"{name} is an option of the diffusion head, but the head is discrete"):
            draw(pipe, **{name: value})
    with pytest.raises(TypeError, match="a call takes no argument codebook_size"):
        draw(pipe, codebook_size=5)


def test_a_part_of_a_picture_stays(world, paths):
    pipe = StructMARPipeline.from_checkpoint(*paths, world.clip)
    own = np.arange(32 * 32 * 3, dtype=np.int64).reshape(32, 32, 3).astype(np.uint8)
    hole = np.zeros((32, 32), dtype=bool)
    hole[20:, 20:] = True
    found = np.asarray(draw(pipe, image=own, mask=hole)[0])
    assert np.array_equal(found[~hole], own[~hole]) and not np.array_equal(found[hole], own[hole])
