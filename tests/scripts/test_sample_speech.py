"""scripts/sample.py --speech: what is said becomes the caption, mistakes are found before image weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine.cli.build_sample
import scripts.sample
from engine.sample.speech import PARTS
from tests.helpers.speech_files import tones, write_recogniser, write_wav
from tests.helpers.tiny import World, write_world

FAST = ["--num_iter", "4", "--num_sampling_steps", "4", "--clip_x0", "3", "--device", "cpu", "--num_images", "2"]
Sample = Callable[..., Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The flags of a sound in which the recogniser hears one letter, and other files."""
    root = tmp_path_factory.mktemp("speech")
    write_wav(root / "none.wav", tones(0.01, 22050)[:0])
    speech = write_wav(root / "a.wav", tones(0.5, 22050), 22050)
    hearing, deaf = write_recogniser(root / "asr", always="k"), write_recogniser(root / "deaf", always="<pad>")
    files = {"speech": speech, "asr": hearing, "deaf": deaf, "silent": root / "none.wav", "root": root}
    return {name: str(path) for name, path in files.items()}


@pytest.fixture
def sample(world: World, tmp_path: Path) -> Sample:
    def run(*flags: str) -> Path:
        frozen = ["--resume", str(world.checkpoint), *world.frozen_flags()]
        scripts.sample.main([*frozen, *FAST, "--output_dir", str(tmp_path / "out"), *flags])
        return tmp_path / "out"

    return run


def images_of(folder: Path) -> list[dict[str, object]]:
    images: list[dict[str, object]] = json.loads((folder / "samples.json").read_text())["images"]
    return images


def table_of(said: str) -> list[str]:
    """The first words of the report's lines."""
    return [line.split()[0] for line in said.splitlines() if line.startswith("  ")]


def test_what_is_said_is_drawn(
    sample: Sample, world: World, spoken: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = sample("--speech", spoken["speech"], "--asr_path", spoken["asr"], "--speech_repeats", "2")
    assert [(image["prompt"], image["objects"]) for image in images_of(out)] == [("k", [])] * 2
    said = capsys.readouterr().out
    assert "from speech to 2 images on cpu, seconds, median of 2 warm runs:" in said
    assert table_of(said) == [*PARTS, "total"]
    spoken_picture = np.asarray(Image.open(out / "0001.png"))
    assert np.array_equal(spoken_picture, np.asarray(Image.open(sample("--prompt", "k") / "0001.png")))
    assert table_of(capsys.readouterr().out) == []


def test_with_a_layout_it_replaces_the_captions(
    sample: Sample, world: World, spoken: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--speech", spoken["speech"], "--asr_path", spoken["asr"], "--speech_repeats", "0"]
    images = images_of(sample(*flags, "--layout", str(world.layout), "--num_images", "1"))
    assert [image["prompt"] for image in images] == ["k", "k"]
    assert [len(image["objects"]) for image in images] == [2, 0]  # type: ignore[arg-type]
    assert table_of(capsys.readouterr().out) == []


MISTAKES = {
    "with a prompt": (
        ["--asr_path", "asr", "--prompt", "a dog"],
        r"--speech .*a\.wav says the caption.*--prompt 'a dog'",
    ),
    "with a dataset": (["--asr_path", "asr", "--coco_root", "x"], "got --layout/--prompt/--speech, --coco_root"),
    "no recogniser": ([], r"a\.wav needs --asr_path, the directory of a recogniser"),
    "missing recogniser": (["--asr_path", "none"], r"recogniser directory not found: none \(--asr_path\)"),
    "another folder": (["--asr_path", "root"], "the recogniser directory .* has no config.json"),
    "missing sound": (["--asr_path", "asr", "--speech", "none.wav"], r"speech file none\.wav does not exist"),
    "no samples": (["--asr_path", "asr", "--speech", "silent"], r"speech file .*none\.wav holds 0 samples"),
    "no words": (["--asr_path", "deaf"], r"no words were heard in the 0\.50 s of speech file .*a\.wav"),
    "repeats": (["--asr_path", "asr", "--speech_repeats", "-1"], "--speech_repeats must not be negative, got -1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_the_image_weights_are_read(
    sample: Sample, spoken: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the image weights are read")

    monkeypatch.setattr(engine.cli.build_sample, "prepare_scenes", refuse)
    flags, message = MISTAKES[case]
    with pytest.raises(SystemExit, match=message):
        sample("--speech", spoken["speech"], *(spoken.get(flag, flag) for flag in flags))
    assert not (tmp_path / "out").exists()


def test_an_empty_text_takes_the_speech_of_a_file_of_flags_away(
    sample: Sample, spoken: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sample.yaml").write_text(f"speech: {spoken['speech']}\nasr_path: {spoken['asr']}\n")
    images = images_of(sample("--config", str(tmp_path / "sample.yaml"), "--speech", "", "--prompt", "a red dog"))
    assert [image["prompt"] for image in images] == ["a red dog"] * 2
