"""models/frozen/speech.py: what the pipeline hears is the model's greedy text; a wrong directory is one clear error."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.frozen.speech import PipelineTranscriber
from tests.helpers.speech_files import LETTERS, tones, write_recogniser, write_whisper
from util.wav import Sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recogniser(tmp_path_factory.mktemp("asr") / "random")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Of the directory, to spoil."""
    shutil.copytree(folder, tmp_path / "asr")
    return tmp_path / "asr"


def sound_of(seconds: float, rate: int = 16000) -> Sound:
    return Sound(tones(seconds, rate).astype(np.float32), rate)


def test_it_hears_the_likeliest_token_of_every_instant(folder: Path) -> None:
    sound, transcriber = sound_of(1.0), PipelineTranscriber.load(folder)
    heard = transcriber.transcribe(sound)
    samples = torch.from_numpy((sound.samples - sound.samples.mean()) / np.sqrt(sound.samples.var() + 1e-7))
    logits = transcriber.recogniser.model(samples[None]).logits[0]  # [t, vocabulary]
    runs = [token for token, _ in groupby(logits.argmax(-1).tolist())]
    tokens = ["", "<s>", "</s>", "<unk>", " ", *LETTERS]
    assert heard == " ".join("".join(tokens[token] for token in runs).split())
    assert len(set(heard)) > 2
    assert heard == transcriber.transcribe(sound), "the same sound gives the same words"


def test_whisper_is_read_too(tmp_path: Path) -> None:
    sound, transcriber = sound_of(1.0), PipelineTranscriber.load(write_whisper(tmp_path / "asr"))
    parts = transcriber.recogniser
    features = parts.feature_extractor(sound.samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    tokens = parts.model.generate(features, num_beams=5)  # as the pipeline does
    assert transcriber.transcribe(sound) == parts.tokenizer.decode(tokens[0], skip_special_tokens=True) != ""


def test_it_is_frozen_and_draws_nothing(folder: Path) -> None:
    state = torch.get_rng_state()
    model = PipelineTranscriber.load(folder).recogniser.model
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_silence_may_be_no_words(tmp_path: Path) -> None:
    transcriber = PipelineTranscriber.load(write_recogniser(tmp_path / "asr", always="<pad>"))
    assert transcriber.transcribe(Sound(np.zeros(8000, np.float32), 16000)) == ""


def test_sounds_that_it_cannot_take(folder: Path) -> None:
    transcriber = PipelineTranscriber.load(folder)
    with pytest.raises(ValueError, match="takes 16000 samples a second, got 8000"):
        transcriber.transcribe(sound_of(1, 8000))
    for seconds in (0.05, 31):
        with pytest.raises(ValueError, match=rf"lasts 0\.1 \.\.\. 30\.0 s, got {seconds:.2f} s"):
            transcriber.transcribe(sound_of(seconds))


def test_a_missing_directory_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recogniser directory not found: .*none\. Get one from"):
        PipelineTranscriber.load(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    for other in ("processor_config.json", "tokenizer.json"):
        (copy / other).unlink(missing_ok=True)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{copy} has no .*{name}"):
        PipelineTranscriber.load(copy)


@pytest.mark.parametrize("architectures", [["BertModel"], [], None, "LlamaForCausalLM"])
def test_another_kind_of_model_is_refused(copy: Path, architectures: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match=r"holds no recogniser: architectures must name Whisper.*, got "):
        PipelineTranscriber.load(copy)


def test_no_weight_stays_as_initialised(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "lm_head.bias"}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: missing lm_head\.bias"):
        PipelineTranscriber.load(copy)
    unused = {name: value for name, value in weights.items() if not name.endswith("masked_spec_embed")}
    assert len(unused) == len(weights) - 1
    save_file(unused, path, {"format": "pt"})
    PipelineTranscriber.load(copy)


@pytest.mark.parametrize("damage", ["weights", "shapes", "config", "tokenizer"])
def test_damaged_directories_are_named(copy: Path, damage: str) -> None:
    if damage == "weights":
        (copy / "model.safetensors").write_bytes(b"no weights")
    elif damage == "config":
        (copy / "config.json").write_text("{")
    elif damage == "tokenizer":
        tokens = json.loads((copy / "vocab.json").read_text())
        (copy / "vocab.json").write_text(json.dumps({**tokens, "1": len(tokens), "2": len(tokens) + 1}))
    else:
        weights = load_file(copy / "model.safetensors")
        save_file({**weights, "lm_head.bias": torch.zeros(3)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=str(copy)):
        PipelineTranscriber.load(copy)
