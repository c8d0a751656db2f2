"""Sampling flags of a head: its defaults on every command, and another head's flags refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scripts.evaluate_layout
import scripts.sample
from engine.checkpoint.identity import Identity
from engine.cli.arguments import train_parser
from engine.cli.sampling import parse_sampling_args, sampling_config
from models.sampling.config import SamplingConfig, default_sampling
from scripts.export_weights import read_sampling_config
from tests.helpers.plain_maskgil import PlainMaskGIL
from util.checkpoint import save_safetensors_atomic

OWN = default_sampling("discrete", num_iter=12, top_k=50, cfg_text=2.0)


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    """Files that say nothing, or something, about sampling a discrete head."""
    identity = Identity(PlainMaskGIL().config, "vae", 1.0, "", ())
    paths = {"without": tmp_path / "without.safetensors", "with": tmp_path / "with.safetensors"}
    for name, sampling in (("without", None), ("with", OWN)):
        metadata = replace(identity, sampling=sampling).to_metadata()
        save_safetensors_atomic({"weight": torch.zeros(1)}, paths[name], metadata)
    return paths


@pytest.fixture(params=[scripts.sample, scripts.evaluate_layout], ids=["sample", "evaluate"])
def parsed(request, weights):
    def parse(*flags: str, kind: str = "without") -> SamplingConfig:
        words = ["--resume", str(weights[kind]), *flags]
        if request.param is scripts.evaluate_layout:
            words += ["--profile", "mini"]
        args, _ = parse_sampling_args(request.param.get_parser(), words)
        return sampling_config(args)

    return parse


def test_the_heads_defaults_or_the_weights_options(parsed):
    assert parsed() == default_sampling("discrete")
    assert parsed(kind="with") == OWN
    assert parsed("--order", "halton", "--num_iter", "3") == default_sampling("discrete", order="halton", num_iter=3)
    assert parsed("--top_k", "none", "--cfg", "3", kind="with") == replace(OWN, top_k=None, cfg_text=3, cfg_layout=3)


@pytest.mark.parametrize("kind", ["with", "without"])
def test_flags_of_the_other_head_are_refused(parsed, kind):
    for flags in (["--num_sampling_steps", "100"], ["--clip_x0", "3"], ["--t_max", "900"]):
        with pytest.raises(ValueError, match=f"{flags[0]} is an option of the diffusion head, but the head is"):
            parsed(*flags, kind=kind)


def test_a_speed_preset_sets_no_flags_of_the_other_head(parsed):
    found = parsed("--speed", "faster", "--top_p", "0.9")
    assert found == default_sampling("discrete", top_p=0.9, uncond_refresh=4)


def test_flags_of_two_heads(parsed):
    with pytest.raises(ValueError, match="num_sampling_steps is an option of the diffusion head, but the head is disc"):
        parsed("--num_sampling_steps", "100", "--top_k", "5")


def test_a_new_models_head_is_what_its_flags_say():
    """A file for another head says nothing about how to sample it."""
    for head, expected in (("diffusion", SamplingConfig()), ("discrete", default_sampling("discrete"))):
        args, note = parse_sampling_args(train_parser(), [], head_of=lambda _, head=head: head)
        assert sampling_config(args) == expected and note is None
        assert (args.num_iter, args.order, args.schedule) == (expected.num_iter, expected.order, expected.schedule)


def test_confidence_is_told_as_what_does_not_fit_a_diffusion_head():
    """And not the weights' own options, which nobody gave."""
    with pytest.raises(ValueError, match="--order confidence is an option of the discrete head, but the head is diff"):
        parse_sampling_args(train_parser(), ["--order", "confidence"], head_of=lambda _: "diffusion")


def test_a_file_of_sampling_flags_is_for_the_weights_head(tmp_path):
    (tmp_path / "sampling.yaml").write_text("cfg: 2.0\norder: halton\n")
    found = read_sampling_config(str(tmp_path / "sampling.yaml"), "discrete")
    assert found == default_sampling("discrete", cfg_text=2.0, cfg_layout=2.0, order="halton")
    (tmp_path / "sampling.yaml").write_text("top_k: 5\n")
    with pytest.raises(ValueError, match="yaml: top_k is an option of the discrete head, but the head is diffusion"):
        read_sampling_config(str(tmp_path / "sampling.yaml"), "diffusion")


def test_options_of_another_head_than_the_models():
    with pytest.raises(ValueError, match="options of the discrete head, the model has the diffusion head"):
        Identity(replace(PlainMaskGIL().config, head="diffusion", codebook_size=0), "vae", 1.0, "", (), sampling=OWN)


@pytest.mark.parametrize(("model", "head"), [("maskgil_base", "discrete"), ("mar_base", "diffusion")])
def test_published_weights_have_the_head_of_their_size(model, head, tmp_path):
    """Their files do not say it."""
    path = tmp_path / "weights.safetensors"
    save_safetensors_atomic({"weight": torch.zeros(1)}, path, {})
    words = ["--resume", str(path), "--class_label", "1", "--model", model]
    options = {"backbone_head": scripts.sample.backbone_head}
    args, _ = parse_sampling_args(scripts.sample.get_parser(), words, scripts.sample.check_args, **options)
    assert sampling_config(args) == default_sampling(head)
