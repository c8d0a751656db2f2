"""The mini world's speech recogniser: voices, word errors, its tokenizer and batches; its trainer survives a kill."""

from __future__ import annotations

import json
import shutil
from itertools import groupby, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SeamlessM4TFeatureExtractor

from models.frozen.speech import PipelineTranscriber
from scripts.mini import recogniser_training, spoken, train_recogniser
from scripts.mini.recogniser_training import (
    POOL,
    RATE,
    Said,
    alike_in_length,
    batch_of,
    build_tokenizer,
    mel_features,
)
from scripts.mini.spoken import HELD_OUT, Voice, draw_voice, speak, word_error_rate, word_errors, words_of
from tests.helpers.killed import run_killed_and_again
from tests.helpers.speech_files import tones
from util.wav import Sound

CAPTIONS = ["a red kite, two oranges and a clock", "two objects: a vase and an apple", "a zebra", "three red kites"]


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [("a b c", "a b c", 0), ("a c", "a b c", 1), ("a x b c", "a b c", 1), ("a x c", "a b c", 1), ("", "a b", 2),
     ("c b a", "a b c", 2), ("b c a", "a b c", 2), ("x y z", "", 3)],
)  # fmt: skip
def test_word_errors_by_hand_and_in_either_direction(heard: str, said: str, errors: int) -> None:
    assert word_errors(heard.split(), said.split()) == word_errors(said.split(), heard.split()) == errors


def test_the_rate_counts_words_of_all_texts_and_no_marks() -> None:
    assert words_of("Two objects: a vase,and an apple.") == ["two", "objects", "a", "vase", "and", "an", "apple"]
    assert word_error_rate(["a red kite", ""], ["A red kite,", "a"]) == 0.25
    with pytest.raises(ValueError, match="got none in 1 texts"):
        word_error_rate([""], [","])


def test_no_voice_to_train_on_has_a_held_out_timbre_or_accent() -> None:
    voices = [draw_voice(np.random.default_rng(index)) for index in range(300)]
    assert len({voice.name for voice in voices}) == len([*product(spoken.LANGUAGES, spoken.TIMBRES)])
    for voice in HELD_OUT.values():
        language, _, timbre = voice.name.partition("+")
        assert language not in spoken.LANGUAGES or f"+{timbre}" not in spoken.TIMBRES


def test_a_missing_voice_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SystemExit, match="the program espeak-ng, which is not there; install it: apt-get install espeak-ng"
    ):
        train_recogniser.main(["--output", str(tmp_path / "asr"), "--data", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng: apt-get install espeak-ng")
def test_the_voice_speaks_and_says_what_it_cannot() -> None:
    slow, fast = (speak("a red kite", Voice("en-us+m1", speed=speed)) for speed in (130, 190))
    assert 0.5 < fast.seconds < slow.seconds < 3 and np.abs(slow.samples).max() > 0.1
    with pytest.raises(ValueError, match="espeak-ng cannot say 'a' with Voice.*qq.*does not exist"):
        speak("a", Voice("qq"))
    names = [f"en-us{timbre}" for timbre in spoken.TIMBRES] + [voice.name for voice in HELD_OUT.values()]
    sounds = {speak("a kite", Voice(name)).samples.tobytes() for name in names}
    assert len(sounds) == len(names), "espeak-ng says nothing of a timbre that it does not know"


def test_every_caption_is_spelled_and_read_back(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(CAPTIONS, tmp_path)
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        frames = [frame for key, run in groupby(ids) for frame in [key, tokenizer.pad_token_id] * len([*run])]
        assert tokenizer.decode(frames) == caption, "each letter for a frame, a blank after it"


def test_batches_hide_stretches_and_pad_the_rest() -> None:
    items = [Said(torch.ones(frames, 160).half(), torch.arange(1, 1 + frames // 10)) for frames in (40, 90)]
    batch = batch_of(items, torch.Generator().manual_seed(0))
    again = batch_of(items, torch.Generator().manual_seed(0))
    assert torch.equal(batch.features, again.features)
    assert batch.valid.sum(1).tolist() == [40, 90] and batch.labels.tolist()[0] == [1, 2, 3, 4] + [-100] * 5
    assert not batch.features[0, 40:].any() and batch.features.unique().tolist() == [0, 1]
    shown = batch.features[1] == 1  # [90, 160]
    assert torch.equal(shown, shown.any(1)[:, None] & shown.any(0)[None]), "whole frames and whole bands"
    assert torch.equal(shown[:, :80], shown[:, 80:]), "a band is hidden in both halves of a frame"
    assert 90 - 24 <= shown.any(1).sum() < 90


@pytest.mark.parametrize(("captions", "batch_size"), [(64, 4), (70, 4), (10, 4), (4, 4)])
def test_steps_of_a_pool_share_out_captions_by_length(captions: int, batch_size: int) -> None:
    lengths = torch.randperm(captions, generator=torch.Generator().manual_seed(1)) + 1
    said = [Said(torch.zeros(int(length), 160), torch.zeros(1)) for length in lengths]
    steps = min(POOL, captions // batch_size)
    batches = [alike_in_length(step, said, batch_size, seed=0) for step in range(steps)]
    chosen = [index for batch in batches for index in batch]
    assert len(set(chosen)) == len(chosen) == steps * batch_size
    assert [int(lengths[index]) for index in chosen] == sorted(int(lengths[index]) for index in chosen)
    assert alike_in_length(0, said, batch_size, seed=0) == batches[0] != [] and (
        captions == batch_size or alike_in_length(0, said, batch_size, seed=1) != batches[0]
    )


def test_features_are_those_of_the_pipeline() -> None:
    extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, sampling_rate=RATE)
    features = mel_features(extractor, tones(1.0, RATE).astype(np.float32))
    assert features.shape == (49, 160)
    assert features.view(-1, 80).mean(0).abs().max() < 0.05


def spell(text: str, voice: Voice) -> Sound:
    """Another tone for each letter, in place of espeak-ng."""
    letters = [tones(0.06, RATE, (200.0 + 100 * (ord(letter) % 32), 50.0 + voice.pitch)) for letter in text]
    return Sound(np.concatenate(letters).astype(np.float32), RATE)


def test_the_trainer_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotations").mkdir()
    for split, captions in (("train2017", CAPTIONS), ("val2017", ["a red zebra", "three red kites"])):
        content = {"annotations": [{"image_id": 0, "caption": caption} for caption in captions]}
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    monkeypatch.setattr(recogniser_training, "speak", spell)
    monkeypatch.setattr(recogniser_training, "require_espeak", lambda: None)
    small = ["--width", "16", "--depth", "1", "--batch_size", "2", "--num_spoken", "3", "--num_held_out", "2"]
    arguments = ["--data", str(tmp_path), "--steps", "4", "--save_freq", "2", *small]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_recogniser.main([*arguments, "--output", str(straight)])
    run_killed_and_again(train_recogniser, recogniser_training, [*arguments, "--output", str(broken)], monkeypatch)
    first, second = (load_file(folder / "model.safetensors") for folder in (straight, broken))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not [*tmp_path.glob("*.tmp"), *tmp_path.glob("*.state.pth")]
    results = json.loads((straight / "word_errors.json").read_text())
    assert results.keys() == HELD_OUT.keys() and all(each["captions"] == 2 for each in results.values())
    assert isinstance(PipelineTranscriber.load(straight).transcribe(spell("a zebra", Voice("any"))), str)
    with pytest.raises(SystemExit, match=r"4 captions were asked for, the dataset has 3 different ones \(training\)"):
        train_recogniser.main([*arguments, "--num_spoken", "4", "--output", str(tmp_path / "more")])
