"""What MARS weights were made for, and captions as ids."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from models.frozen.causal_lm import open_tokenizer
from models.mars.identity import MarsIdentity, require_same_mars
from models.mars.model import MarsConfig
from models.mars.words import CaptionWords
from tests.helpers.lm_files import tiny_lm, write_lm

IDENTITY = MarsIdentity("a" * 64, "qwen2", MarsConfig(8, (2, 4), copied_norms=True), "b" * 64, 20, "joint")
OTHERS = {"base_id": "c", "base_type": "llama", "config": MarsConfig(9, (2, 4)), "codec_id": "d", "max_tokens": 3}


def test_it_goes_into_a_file_and_back() -> None:
    assert MarsIdentity.of(json.loads(json.dumps(IDENTITY.as_dict())), "a.pth") == IDENTITY


def test_another_one_is_refused_by_the_first_field() -> None:
    require_same_mars(IDENTITY, replace(IDENTITY, stage="refine"), "a.pth")
    for name, value in OTHERS.items():
        with pytest.raises(ValueError, match=f"a.pth was made with {name} .*, here it is "):
            require_same_mars(IDENTITY, replace(IDENTITY, **{name: value}), "a.pth")
        require_same_mars(IDENTITY, replace(IDENTITY, **{name: value}), "a.pth", skipped=(name, "stage"))


@pytest.mark.parametrize("name", [*IDENTITY.as_dict(), "num_codes", "more", "odd grid", "odd stage"])
def test_a_broken_record_is_refused(name: str) -> None:
    entries = IDENTITY.as_dict()
    if name == "num_codes":
        del entries["config"][name]
    elif name == "odd grid":
        entries["config"]["grid"] = [1]
    elif name.startswith("odd"):
        entries["stage"] = "other"
    else:
        entries[name] = None
    with pytest.raises(ValueError, match=f"a.pth: .*{name.removeprefix('odd ')}"):
        MarsIdentity.of(entries, "a.pth")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> CaptionWords:
    directory = write_lm(tmp_path_factory.mktemp("lm"))
    return CaptionWords(open_tokenizer(directory, tiny_lm()), max_tokens=5)


def test_captions_come_back(words: CaptionWords) -> None:
    for caption in ("a red dog", "两个苹果", ""):
        ids = words.ids([caption])[0]
        assert words.prompts([caption]) == [[words.first_token, *ids]]
        assert words.text([words.first_token, *ids, words.end_token]) == caption
    assert words.prompts([""]) == [words.opening] and words.ids([]) == []


def test_long_captions_are_cut_and_said_once(words: CaptionWords, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = [words.prompts(["red " * 20, "a dog"]) for _ in range(2)]
    assert [len(row) for row in rows[0]] == [5, 3] and rows[0] == rows[1]
    assert caplog.text.count("captions that exceed 5 tokens are cut") == 1


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_lm(tmp_path), tiny_lm())
    with pytest.raises(ValueError, match="at least 2, BOS and a word, got 1"):
        CaptionWords(tokenizer, 1)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        CaptionWords(tokenizer)
