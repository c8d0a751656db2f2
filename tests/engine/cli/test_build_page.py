"""What the page begins with, made of the command's flags."""

from __future__ import annotations

from pathlib import Path

import pytest

import scripts.page
from engine.cli.build_page import make_studio, page_speeds
from engine.cli.sampling import parse_sampling_args
from engine.page.studio import Studio
from models.sampling.config import SamplingConfig, default_sampling
from tests.helpers.page_world import SCENE, pictures_of, pixels_of
from tests.helpers.planners import write_planner
from tests.helpers.tiny import World, write_world
from tests.helpers.tiny_codes import write_codes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def studio_of(*words: str) -> Studio:
    args, _ = parse_sampling_args(scripts.page.get_parser(), [*words, "--device", "cpu"], scripts.page.check_args)
    return make_studio(args)


def test_speeds_say_what_they_set_and_exact_is_what_the_page_begins_with() -> None:
    config = SamplingConfig(num_iter=48, num_sampling_steps=25)
    assert page_speeds(config, "fp32") == {
        "exact": {"num_iter": 48, "num_sampling_steps": 25, "num_sampling_steps_last": None, "precision": "fp32",
                  "uncond_refresh": 1},
        "fast": {"num_iter": 48, "num_sampling_steps": 25, "num_sampling_steps_last": 5, "precision": "bf16",
                 "uncond_refresh": 4},
        "faster": {"num_iter": 32, "num_sampling_steps": 25, "num_sampling_steps_last": 5, "precision": "bf16",
                   "uncond_refresh": 4},
    }  # fmt: skip
    codes = page_speeds(default_sampling("discrete"), "fp32")
    assert list(codes) == ["exact", "fast"] and codes["fast"].keys() == {"num_iter", "precision", "uncond_refresh"}


def test_flags_are_what_the_page_begins_with(world: World, tmp_path: Path) -> None:
    words = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--num_iter", "5", "--cfg", "2", "--no-ema"]
    words += ["--examples", str(world.layout), "--planner_path", str(write_planner(tmp_path / "p.safetensors", world))]
    studio = studio_of(*words, "--precision", "bf16")
    facts = studio.facts()
    assert (facts["options"]["num_iter"], facts["options"]["cfg_layout"], facts["precision"]) == (5, 2.0, "bf16")
    assert facts["has_planner"] and len(facts["examples"]) == 2 and "--no-ema" in studio.command


def test_models_of_codes_are_drawn_and_grow_too(world: World) -> None:
    checkpoint, vq = write_codes(world)
    words = ("--resume", str(checkpoint), "--vae_path", str(vq), "--clip_path", str(world.clip), "--num_iter", "3")
    studio = studio_of(*words)
    assert studio.facts()["head"] == "discrete"
    events: list[dict] = []
    studio.draw(studio.read({"scene": SCENE}), events.append, lambda: False)
    shown = [(pixels_of(event["picture"])[..., 3] == 255).mean() for event in events if event.get("picture")]
    assert shown == sorted(shown) and pixels_of(pictures_of(events)[0]["png"]).shape == (32, 32, 3)
