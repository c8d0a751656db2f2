"""Where sampling options come from: command line > YAML file > the weights > the parser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import scripts.evaluate_layout
import scripts.sample
from engine.checkpoint.load import export_weights
from engine.cli.sampling import parse_sampling_args, sampling_config
from models.sampling.config import SamplingConfig
from tests.helpers.tiny import write_world
from util.config import given_options

OWN = SamplingConfig(
    num_iter=16, num_sampling_steps=25, cfg_text=6.0, cfg_layout=4.0, cfg_schedule="constant", temperature=0.9,
    clip_x0=5.0, guidance_interval=(0.0, 0.9),
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Files without and with options: a training checkpoint and an exported file."""
    world = write_world(tmp_path_factory.mktemp("world"))
    path = world.root / "weights.safetensors"
    export_weights(world.checkpoint, path, sampling=OWN)
    return {"without": world.checkpoint, "with": path}


@pytest.fixture(params=[scripts.sample, scripts.evaluate_layout], ids=["sample", "evaluate"])
def parsed(request, weights, tmp_path):
    def parse(*flags: str, yaml: str = "{}", kind: str = "with") -> tuple[dict[str, Any], str | None]:
        (tmp_path / "config.yaml").write_text(yaml)
        words = ["--resume", str(weights[kind]), "--config", str(tmp_path / "config.yaml"), *flags]
        if request.param is scripts.evaluate_layout:
            words += ["--profile", "mini"]
        args, note = parse_sampling_args(request.param.get_parser(), words)
        return asdict(sampling_config(args)), note

    return parse


def test_the_weights_are_the_default(parsed):
    found, note = parsed()
    assert found == asdict(OWN)
    assert note == (
        "sampling options from the weights: num_iter 16, num_sampling_steps 25, cfg_text 6.0, cfg_layout 4.0, "
        "cfg_schedule constant, temperature 0.9, clip_x0 5.0, guidance_interval [0.0, 0.9]"
    )


def test_without_options_the_parser_is(parsed):
    assert parsed(kind="without") == (asdict(SamplingConfig()), None)


def test_the_yaml_and_the_command_line_win(parsed):
    found, note = parsed("--num_iter", "8", yaml="num_iter: 12\nclip_x0: null\ntemperature: 1.0\n")
    assert found == asdict(OWN) | {"num_iter": 8, "clip_x0": None, "temperature": 1.0}
    assert note is not None and not any(name in note for name in ("num_iter", "clip_x0", "temperature"))


def test_a_flag_at_the_parsers_default_counts_as_said(parsed):
    assert parsed("--num_iter", "64")[0]["num_iter"] == 64


@pytest.mark.parametrize(
    ("flags", "yaml", "scales"),
    [
        (("--cfg", "3"), "{}", (3, 3)),
        ((), "cfg: 3.0", (3, 3)),
        (("--cfg", "3", "--cfg_layout", "5"), "{}", (3, 5)),
        (("--cfg_text", "2"), "{}", (2, 4)),
    ],
)
def test_cfg_stands_for_both_scales(parsed, flags, yaml, scales):
    found, _ = parsed(*flags, yaml=yaml)
    assert (found["cfg_text"], found["cfg_layout"]) == scales


def test_presets_stand_on_the_weights_values(parsed):
    """They lower numbers that stand and yield to flags beside them."""
    found, _ = parsed("--speed", "faster")
    assert (found["num_iter"], found["num_sampling_steps"], found["num_sampling_steps_last"]) == (16, 25, 5)
    assert (found["uncond_refresh"], found["cfg_text"]) == (4, 6.0)
    found, _ = parsed("--speed", "faster", "--num_sampling_steps", "70", "--uncond_refresh", "1")
    assert (found["num_sampling_steps"], found["uncond_refresh"]) == (70, 1)
    found, _ = parsed(yaml="speed: fast\nnum_sampling_steps: 60\n")
    assert (found["num_sampling_steps"], found["num_sampling_steps_last"]) == (60, 5)


def test_given_options(tmp_path):
    (tmp_path / "a.yaml").write_text("cfg: 1.0\nnum_iter: 64\n")
    words = ["--config", str(tmp_path / "a.yaml"), "--resume", "x", "--speed", "fast", "--no-compile"]
    given = given_options(scripts.sample.get_parser(), words)
    assert given == {"config", "resume", "speed", "compile", "cfg", "num_iter"}


def test_weights_that_cannot_be_read_are_left_to_the_loader(tmp_path):
    args, note = parse_sampling_args(scripts.sample.get_parser(), ["--resume", str(tmp_path / "none.pth")])
    assert note is None and args.num_iter is None and sampling_config(args).num_iter == 64


def test_flags_that_lean_on_the_weights_options_are_checked_beside_these(weights):
    """Guidance that the weights name makes a negative prompt right; their 16 iterations end before the 20th."""

    def asked(kind: str, *flags: str) -> SamplingConfig:
        words = ["--resume", str(weights[kind]), "--prompt", "a dog", *flags]
        args, _ = parse_sampling_args(scripts.sample.get_parser(), words, scripts.sample.check_args)
        return sampling_config(args)

    negative, masks = ("--negative_prompt", "a cat"), ("--mask_threshold", "0.5", "--start_step")
    assert asked("with", *negative).cfg_text == 6 and asked("without", *negative, "--cfg", "2").cfg_text == 2
    assert asked("with", *masks, "15").start_step == 15 and asked("without", *masks, "20").start_step == 20
    for kind, flags, message in (
        ("without", negative, "--cfg_text other than 1"),
        ("with", (*negative, "--cfg", "1"), "--cfg_text other than 1"),
        ("with", (*masks, "20"), "from 1 to --num_iter - 1 = 15, got 20"),
        ("with", ("--start_step", "3"), "needs --mask_threshold"),
        (
            "with",
            (*masks, "3", "--compile"),
            "--mask_threshold 0.5 looks into the decoder's blocks, which --compile hides",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            asked(kind, *flags)
