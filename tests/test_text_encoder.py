"""A language model instead of CLIP in every program: its flag and the flag's older name, caches, training, pictures."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

import main_mar
import scripts.evaluate_layout
import scripts.sample
from engine.cli import build_cache
from engine.cli.build_cache import text_cache_size
from engine.data.cache import TextCache, TextCacheKey
from engine.sample.pipeline import StructMARPipeline
from models.frozen.encoder import load_text_encoder
from models.frozen.lm import LmEncoder
from scripts import cache_latents
from scripts.export_weights import main as export_weights
from tests.helpers.eval_world import write_detector, write_profile
from tests.helpers.lm_files import MAX_POSITIONS, WIDTH, write_lm
from tests.helpers.programs import PROGRAMS
from tests.helpers.tiny_run import argv, load_checkpoint, read_metrics, write_world
from util.coco import CocoIndex
from util.config import parse_args

FLAG, OLD = "--text_encoder", "--clip_path"
QUICK = ["--num_iter", "2", "--num_sampling_steps", "2", "--device", "cpu"]


class Caught(BaseException):
    """Ends a program where it parses its command line."""


def parser_of(module: str) -> argparse.ArgumentParser:
    found: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser, *_: Any) -> None:
        found.append(self)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module])
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught):
            importlib.import_module(module).main()
    return found[0]


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_program_takes_the_flag_under_both_names(module: str, tmp_path: Path) -> None:
    """No program reads a text encoder by the older name alone, and both fill one field, in files too."""
    parser = parser_of(module)
    named = {option: action for action in parser._actions for option in action.option_strings}
    assert (FLAG in named) == (OLD in named) == ("--max_text_tokens" in named)
    if FLAG not in named:
        return
    needed = [
        w
        for each in parser._actions
        if each.required and each is not named[FLAG]
        for w in (each.option_strings[0], "x")
    ]
    for flag in (FLAG, OLD):
        assert parse_args(parser, [*needed, flag, "there"]).clip_path == "there"
    if "--config" in named:
        config = tmp_path / "config.yaml"
        for names in (["text_encoder"], ["clip_path"]):
            config.write_text(yaml.safe_dump(dict.fromkeys(names, "there")))
            assert parse_args(parser, [*needed, "--config", str(config)]).clip_path == "there"
            assert parse_args(parser, [*needed, "--config", str(config), OLD, "here"]).clip_path == "here"


def test_both_names_in_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("clip_path: a\ntext_encoder: b\n")
    with pytest.raises(SystemExit):
        parse_args(parser_of("scripts.sample"), ["--config", str(config)])
    assert "text_encoder is another name of clip_path, which is there too" in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose captions a language model reads, and a trained run in it."""
    world = write_world(tmp_path_factory.mktemp("world"))
    write_lm(world / "lm")
    main_mar.main(argv(world, "run", **encoder(world), epochs=1))
    return world


def encoder(world: Path, name: str = "lm") -> dict[str, object]:
    """Flags of a run: the language model under the flag's own name."""
    return {"clip_path": None, "text_encoder": world / name}


def frozen(world: Path, name: str = "lm") -> list[str]:
    return ["--vae_path", str(world / "vae.ckpt"), FLAG, str(world / name)]


def cache(world: Path, output: str, *words: str, name: str = "lm") -> None:
    data = ["--coco_root", str(world / "coco"), "--coco_split", "train2014", "--img_size", "32", "--num_workers", "0"]
    cache_latents.main([*frozen(world, name), *data, "--cached_path", str(world / output), "--device", "cpu", *words])


def all_states(cached: TextCache, world: Path) -> list[Tensor]:
    captions = CocoIndex.load(world / "coco", "train2014").captions()
    return [cached.states(caption_id, caption) for caption_id, caption in captions.items()]


def test_its_width_is_the_models(world: Path) -> None:
    found = load_checkpoint(world)
    assert found["config"]["text_dim"] == WIDTH
    assert found["text_encoder"]["id"] == LmEncoder.load(world / "lm").id
    assert yaml.safe_load((world / "run" / "args.yaml").read_text())["clip_path"] == str(world / "lm")


def test_cached_training_is_training_on_the_fly(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        cache(world, "cache")
    assert "27 captions of 4 tokens by 24 channels: 1e-05 GB of text states" in caplog.text
    main_mar.main(argv(world, "cached", **encoder(world), epochs=1, use_cached=True, cached_path=world / "cache"))
    found, expected = ([line["loss"] for line in read_metrics(world, name)] for name in ("cached", "run"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_cache_knows_where_captions_were_cut(world: Path) -> None:
    cache(world, "cut", "--no-latents", "--max_text_tokens", "3")
    own = LmEncoder.load(world / "lm")
    cached = TextCache(world / "cut/text", TextCacheKey(own.id, "train2014", 3))
    assert len(cached) == 27 and {len(state) for state in all_states(cached, world)} <= {2, 3}
    for key in (TextCacheKey(own.id, "train2014", 128), TextCacheKey(own.id, "train2014")):
        with pytest.raises(ValueError, match=r"made with max_text_tokens 3, but (128|None) is asked for"):
            TextCache(world / "cut/text", key)
    cache(world, "clip", "--no-latents", name="clip")
    assert "max_text_tokens" not in json.loads((world / "clip/text/manifest.json").read_text())


def test_wide_states_are_not_cached(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_cache_size(LmEncoder.load(world / "lm"), "lm", ["a red dog"] * 10**4) == (
        "10000 captions of 4 tokens by 24 channels: 0.0038 GB of text states"
    )
    monkeypatch.setattr(build_cache, "MAX_CACHED_CHANNELS", WIDTH - 1)
    with pytest.raises(SystemExit, match=r"--text_encoder .*lm: .* GB .*Up to 23 channels are cached; with --no-text"):
        cache(world, "wide")
    assert not (world / "wide" / "latents").exists()
    cache(world, "wide", "--no-text")
    assert not (world / "wide" / "text").exists()
    main_mar.main(argv(world, "wide_run", **encoder(world), epochs=1, use_cached=True, cached_path=world / "wide"))
    found, expected = ([line["loss"] for line in read_metrics(world, name)] for name in ("wide_run", "run"))
    assert found == pytest.approx(expected, rel=1e-4)


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_it_samples_and_goes_into_a_folder(world: Path, tmp_path: Path) -> None:
    """From the checkpoint, from exported weights, and from a pipeline's folder: the same picture, and the same cuts."""
    checkpoint, exported = world / "run" / "checkpoint-last.pth", tmp_path / "weights.safetensors"
    export_weights(["--resume", str(checkpoint), "--output", str(exported)])
    for name, weights in (("run", checkpoint), ("exported", exported)):
        words = ["--resume", str(weights), *frozen(world), *QUICK, "--prompt", "a red dog", "--num_images", "1"]
        scripts.sample.main([*words, "--output_dir", str(tmp_path / name)])
    (first,), (second,) = pictures(tmp_path / "run"), pictures(tmp_path / "exported")
    assert np.array_equal(first, second)
    options = {"max_text_tokens": MAX_POSITIONS}
    pipe = StructMARPipeline.from_checkpoint(exported, world / "vae.ckpt", world / "lm", **options)
    pipe.save_pretrained(tmp_path / "folder")
    again = StructMARPipeline.from_pretrained(tmp_path / "folder")
    assert again.caption_encoder.max_tokens == MAX_POSITIONS and again.caption_encoder.id == pipe.caption_encoder.id
    calls = [each("a red dog", seed=0, num_inference_steps=2).images[0] for each in (pipe, again)]
    assert np.array_equal(*map(np.asarray, calls))
    with pytest.raises(SystemExit, match="text encoder"):
        scripts.sample.main(["--resume", str(exported), *frozen(world, "clip"), *QUICK, "--prompt", "a",
                             "--output_dir", str(tmp_path / "other")])  # fmt: skip


def test_it_is_evaluated(world: Path, tmp_path: Path) -> None:
    categories = CocoIndex.load(world / "coco", "val2014").categories
    detector, profile = write_detector(tmp_path / "detector.pth", categories), write_profile(tmp_path / "tiny.yaml")
    words = ["--resume", str(world / "run"), *frozen(world), *QUICK, "--coco_root", str(world / "coco")]
    words += ["--coco_split", "val2014", "--detector", str(detector), "--profile", str(profile)]
    words += ["--output_dir", str(tmp_path / "out"), "--max_images", "2", "--num_resamples", "2"]
    scripts.evaluate_layout.main(words)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert "StructMAR, text_layout" in {row["name"] for row in rows}


def test_the_encoder_is_a_text_encoder(world: Path) -> None:
    for name in ("lm", "clip"):
        found = load_text_encoder(world / name, max_tokens=4)
        assert found.stated_cut == found.max_tokens == 4 and found.dim == found.encode(["a dog"])[0].shape[1]
