"""Proposals on their way to the sampler: whose categories, whose randomness, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.data.scenes import KnownLabels, text_scene
from engine.plan.propose import LayoutPlanner, layout_generators
from engine.sample.generate import image_generator
from models.frozen.text import ClipTextEncoder
from tests.helpers.planners import write_planner
from tests.helpers.tiny import CATEGORIES, World, write_world
from util.types import Category

KNOWN = KnownLabels((*CATEGORIES[::-1], Category(99, "kite")), max_objects=4)
"""In another order than the planner's, with one more."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def planner(world: World) -> LayoutPlanner:
    return LayoutPlanner.load(write_planner(world.root / "planner.safetensors", world))


@pytest.fixture(scope="module")
def encoder(world: World) -> ClipTextEncoder:
    return ClipTextEncoder.load(world.clip)


def draws(*seeds: int) -> list[torch.Generator]:
    return layout_generators([image_generator(seed) for seed in seeds])


def test_scenes_have_the_models_categories_by_name(planner: LayoutPlanner, encoder: ClipTextEncoder) -> None:
    scenes = [replace(text_scene("a red dog"), size=(32, 64))] * 20
    planned = planner.scenes(scenes, KNOWN, encoder, draws(*range(20)))
    own = planner.layouts(["a red dog"] * 20, encoder, draws(*range(20)), max_objects=4)
    assert {scene.size for scene in planned} == {(32, 64)} and any(scene.names for scene in planned)
    for scene, layout in zip(planned, own, strict=True):
        assert scene.names == [CATEGORIES[index].name for index in layout.categories.tolist()]
        assert [KNOWN.categories[index].name for index in scene.layout.categories.tolist()] == scene.names
        assert len(scene.names) <= KNOWN.max_objects  # the planner itself would place six


def test_scenes_that_are_not_asked_for_stay(planner: LayoutPlanner, encoder: ClipTextEncoder) -> None:
    scenes = [text_scene("a dog"), text_scene(""), text_scene("a cat")]
    planned = planner.scenes(scenes, KNOWN, encoder, draws(1, 2, 3), is_asked=[True, False, True])
    assert planned[1] is scenes[1]
    assert planned[0].to_dict() == planner.scenes(scenes[:1], KNOWN, encoder, draws(1))[0].to_dict()


def test_a_layout_depends_on_its_seed_and_leaves_the_images_draws_alone() -> None:
    images = [image_generator(4), image_generator(5)]
    made = layout_generators(images)
    assert torch.equal(torch.rand(3, generator=made[1]), torch.rand(3, generator=draws(5)[0]))
    assert torch.equal(images[0].get_state(), image_generator(4).get_state())


def test_images_that_share_a_generator_get_layouts_of_their_own() -> None:
    shared = torch.Generator().manual_seed(3)
    first, second = (torch.rand(3, generator=each) for each in layout_generators([shared, shared]))
    assert not torch.equal(first, second)


def test_what_does_not_fit_the_weights_is_named(world: World, planner: LayoutPlanner, encoder: ClipTextEncoder) -> None:
    planner.require_fitting(KNOWN, encoder.id)
    with pytest.raises(ValueError, match="places 'person', which these weights do not know; 2 of its 3"):
        planner.require_fitting(KnownLabels(CATEGORIES[1:2], 4), encoder.id)
    with pytest.raises(ValueError, match="reads captions by the text encoder"):
        planner.require_fitting(KNOWN, "another")
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        planner.layouts(["a dog", " "], encoder, draws(0, 1))


def test_a_planner_may_lie_in_its_run_folder(world: World) -> None:
    folder = world.root / "run_of_planner"
    folder.mkdir()
    write_planner(Path(folder) / "planner.safetensors", world)
    assert LayoutPlanner.load(folder).identity.categories == CATEGORIES
