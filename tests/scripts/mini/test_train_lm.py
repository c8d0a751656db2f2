"""The mini world in Chinese, and the language model of both languages: captions, tokenizer, a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.frozen.lm import LmEncoder
from scripts.mini import chinese, lm_training, make_dataset, train_lm
from scripts.mini.backgrounds import BACKGROUNDS
from scripts.mini.captions import NUM_CAPTIONS, Named, write_captions
from scripts.mini.drawing import CLASSES
from scripts.mini.drawing import COLOURS as DRAWN

SMALL = ["--num_train", "12", "--num_val", "3", "--size", "16", "--num_workers", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "coco"
    make_dataset.main(["--output_dir", str(root), *SMALL])
    before = read(root, "captions_train2017")
    make_dataset.main(["--output_dir", str(root), *SMALL, "--chinese"])  # to a finished dataset
    assert read(root, "captions_train2017") == before
    return root


def read(root: Path, name: str) -> dict:
    return json.loads((root / "annotations" / f"{name}.json").read_text(encoding="utf-8"))


def objects_of(count: int, draws: np.random.Generator) -> list[Named]:
    kinds = [CLASSES[int(draws.integers(len(CLASSES)))] for _ in range(count)]
    centres = [(float(draws.random()), float(draws.random())) for _ in kinds]
    colours = [kind.colours[int(draws.integers(len(kind.colours)))] if kind.is_colour_named else None for kind in kinds]
    parts = zip(kinds, colours, centres, strict=True)
    return [Named(kind.name, colour, centre, float(draws.random())) for kind, colour, centre in parts]


def test_every_word_of_a_scene_is_known() -> None:
    assert chinese.NOUNS.keys() == {each.name for each in CLASSES}
    assert chinese.COLOURS.keys() == DRAWN.keys()
    assert chinese.PLACES.keys() == {each.phrase for each in BACKGROUNDS}
    for words in (chinese.NOUNS, chinese.COLOURS, chinese.PLACES):
        assert len(set(words.values())) == len(words)


def test_a_caption_says_what_is_where() -> None:
    kites = [Named("umbrella", "red", (0.2, 0.5), 0.6), Named("kite", "yellow", (0.8, 0.5), 0.4)]
    captions = chinese.write_chinese(kites, "on a beach", np.random.default_rng(0))
    assert captions[0] == "沙滩上有一个红色的雨伞和一个黄色的风筝"
    assert chinese.listed([kites[1], kites[1], kites[0]]) == "两个黄色的风筝和一个红色的雨伞"
    assert chinese.words(kites[0], has_size=True) == "红色的大雨伞"
    assert captions[4] in (
        "沙滩上，一个红色的雨伞在一个黄色的风筝的左边",
        "沙滩上，一个黄色的风筝在一个红色的雨伞的右边",
    )


def test_both_languages_name_the_same_things() -> None:
    draws = np.random.default_rng(1)
    for count in [1, 2, 3, 4, 5] * 20:
        objects = objects_of(count, draws)
        english = write_captions(objects, "in the sky", np.random.default_rng(2))
        captions = chinese.write_chinese(objects, "in the sky", np.random.default_rng(2))
        assert len(captions) == len(english) == NUM_CAPTIONS
        assert all(chinese.words(item) in captions[0] and chinese.words(item) in captions[1] for item in objects)
        assert all(side not in caption for caption in captions[:3] for side in ("左边", "右边"))
        assert all(not letter.isascii() for caption in captions for letter in caption)


def test_chinese_captions_have_the_ids_of_the_english_ones(root: Path) -> None:
    for split in ("train2017", "val2017"):
        english, other = read(root, f"captions_{split}"), read(root, f"captions_{split}.zh")
        assert english["images"] == other["images"] and len(other["annotations"]) == len(english["annotations"])
        for first, second in zip(english["annotations"], other["annotations"], strict=True):
            assert first | {"caption": ""} == second | {"caption": ""}
        names = {annotation["image_id"]: [] for annotation in read(root, f"instances_{split}")["annotations"]}
        for annotation in read(root, f"instances_{split}")["annotations"]:
            noun = next(each.name for each in CLASSES if each.id == annotation["category_id"])
            names[annotation["image_id"]].append(chinese.NOUNS[noun])
        firsts = {each["image_id"]: each["caption"] for each in reversed(other["annotations"])}
        assert all(noun in firsts[image_id] for image_id, nouns in names.items() for noun in nouns)


def train(root: Path, output: Path, *flags: str) -> LmEncoder:
    sizes = ["--width", "16", "--depth", "1", "--batch_size", "4", "--warmup", "1", "--vocab_size", "300"]
    train_lm.main(["--data", str(root), "--output", str(output), *sizes, "--save_freq", "2", "--log_freq", "1", *flags])
    return LmEncoder.load(output)


def test_chinese_characters_stand_alone(root: Path, tmp_path: Path) -> None:
    images = [lm_training.load_captions(root, "train2017", language, None) for language in lm_training.LANGUAGES]
    every = [caption for captions in images for each in captions for caption in each]
    model = lm_training.Qwen2ForCausalLM(lm_training.lm_config(600, 16, 1))
    lm_training.save(model, lm_training.build_tokenizer(every, 600), tmp_path / "lm")
    tokenizer = LmEncoder.load(tmp_path / "lm").tokenizer
    text = "一个红色的苹果，a red kite"
    pieces = [tokenizer.decode([index]) for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert {"红", "色", "的"} <= set(pieces) and max(len(piece.strip()) for piece in pieces if not piece.isascii()) == 1
    assert "".join(pieces).count(" red") == 1 and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(root, tmp_path / "whole", "--steps", "5", "--lr", "1e-2")
    said = capsys.readouterr().out
    losses = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step ")]
    assert losses[0] == pytest.approx(np.log(300), abs=0.3) and losses[-1] < losses[0]
    assert "English:" in said and "Chinese:" in said
    saved = lm_training.save_state

    def killed(*args, **parts) -> None:
        saved(*args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_training, "save_state", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(root, tmp_path / "cut", "--steps", "5", "--lr", "1e-2")
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    found = train(root, tmp_path / "cut", "--steps", "5", "--lr", "1e-2")
    assert all(torch.equal(tensor, found.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    assert found.id == whole.id
    train(root, tmp_path / "cut", "--steps", "5")
    assert "is there already" in capsys.readouterr().out


def test_the_mini_models_size() -> None:
    model = lm_training.Qwen2ForCausalLM(lm_training.lm_config(1000, 128, 4))
    assert sum(parameter.numel() for parameter in model.parameters()) == 916_608


def test_without_chinese_captions_it_says_how_to_make_them(root: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(read(root, "captions_train2017")))
    with pytest.raises(SystemExit, match=r"captions_train2017\.zh\.json: make them with .*make_dataset --chinese"):
        train(tmp_path, tmp_path / "lm")
