"""What MARS is trained on: whose caption is drawn, in which language, and that none of it depends on the batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.data.coco import Batch, CocoLayoutDataset, DataConfig, collate
from engine.data.pairs import PairInputs, pairs_of
from engine.data.translations import Translations, translations_path
from models.frozen.causal_lm import open_tokenizer
from models.frozen.codec import load_codec
from models.frozen.codes import CodeCodec
from models.mars.words import CaptionWords
from tests.helpers.coco_fixture import write_coco
from tests.helpers.lm_files import tiny_lm
from tests.helpers.mars_run import SIDE, write_mars_world
from util.coco import CocoIndex

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mars_world(tmp_path_factory.mktemp("pairs") / "world")


@pytest.fixture(scope="module")
def dataset(world: Path) -> CocoLayoutDataset:
    config = DataConfig(str(world / "coco"), "train2014", SIDE)
    return CocoLayoutDataset.from_config(config)


@pytest.fixture(scope="module")
def inputs(world: Path, dataset: CocoLayoutDataset) -> PairInputs:
    codec = load_codec(world / "vq.pt")
    assert isinstance(codec, CodeCodec)
    words = CaptionWords(open_tokenizer(world / "lm", tiny_lm()), 30)
    return PairInputs(codec, words, Translations.find(dataset.index), 0.0, seed=3, device=CPU)


def batch_of(dataset: CocoLayoutDataset, *items: int) -> Batch:
    return collate(1)([dataset[item] for item in items])


def told(inputs: PairInputs, batch: Batch, epoch: int) -> list[str]:
    """The captions that are to be learned."""
    pairs = inputs(batch, epoch, torch.Generator().manual_seed(0))
    return [inputs.words.text(row) for row in pairs.answer.ids.masked_fill(~pairs.answer.shown(), 1).tolist()]


def test_codes_and_both_sides_of_a_caption(dataset: CocoLayoutDataset, inputs: PairInputs) -> None:
    batch = batch_of(dataset, 0, 1, 2)
    pairs = replace(inputs, translations=None)(batch, 0, torch.Generator().manual_seed(0))
    assert batch.pixels is not None
    assert torch.equal(pairs.codes, inputs.codec.encode(batch.pixels)[:, 0].flatten(1).long())
    words = inputs.words
    for row, caption in enumerate(batch.captions):
        ids = words.ids([caption])[0]
        assert pairs.prompt.ids[row][pairs.prompt.shown()[row]].tolist() == [words.first_token, *ids]
        assert pairs.answer.ids[row][pairs.answer.shown()[row]].tolist() == [*ids, words.end_token]
    assert pairs.has_caption.all() and pairs.opening.tolist() == [words.first_token]


def test_small_pictures_are_the_same_ones_shrunk(world: Path, dataset: CocoLayoutDataset, inputs: PairInputs) -> None:
    large = CocoLayoutDataset.from_config(DataConfig(str(world / "coco"), "train2014", 2 * SIDE))
    some = replace(inputs, low_size=(SIDE, SIDE))
    batch = batch_of(large, 0, 1, 2)
    pairs = some(batch, 0, torch.Generator().manual_seed(0))
    assert batch.pixels is not None and pairs.low is not None
    small = batch.pixels.unflatten(3, (SIDE, 2)).unflatten(2, (SIDE, 2)).mean((3, 5))
    assert torch.equal(pairs.low, inputs.codec.encode(small)[:, 0].flatten(1).long())
    alone = some(batch_of(large, 1), 0, torch.Generator().manual_seed(0))
    assert alone.low is not None and torch.equal(alone.low[0], pairs.low[1])


def test_a_dropped_caption_is_still_told(dataset: CocoLayoutDataset, inputs: PairInputs) -> None:
    batch = batch_of(dataset, 0, 1, 2)
    kept, dropped = (
        replace(inputs, drop_prob=prob)(batch, 0, torch.Generator().manual_seed(0)) for prob in (0.0, 1.0)
    )
    assert not dropped.has_caption.any() and dropped.prompt.ids.tolist() == [[inputs.words.first_token]] * 3
    assert torch.equal(dropped.answer.ids, kept.answer.ids)


def test_a_caption_that_was_cut_neither_ends_nor_begins_an_image(inputs: PairInputs) -> None:
    words = CaptionWords(inputs.words.tokenizer, 4)
    pairs = pairs_of(torch.zeros(2, 4, dtype=torch.int64), ["a red dog", "a red dog in the snow"], words)
    (whole, start) = words.ids(["a red dog", "a red dog in the snow"])
    assert len(whole) == len(start) == 3 and pairs.has_caption.tolist() == [True, False]
    told = [ids[shown].tolist() for ids, shown in zip(pairs.answer.ids, pairs.answer.shown(), strict=True)]
    assert told == [[*whole, words.end_token], start]


def test_the_language_is_drawn_for_each_image_and_epoch(dataset: CocoLayoutDataset, inputs: PairInputs) -> None:
    batch = batch_of(dataset, *range(9))
    found = [told(inputs, batch, epoch) for epoch in range(12)]
    assert told(inputs, batch, 4) == found[4]
    alone = [told(inputs, batch_of(dataset, item), 4)[0] for item in range(9)]
    assert alone == found[4]
    is_english = [text in batch.captions for texts in found for text in texts]
    assert 0.35 < sum(is_english) / len(is_english) < 0.65
    assert inputs.translations is not None
    for texts in found:
        for image_id, caption, text in zip(batch.image_ids, batch.captions, texts, strict=True):
            assert text in (caption, inputs.translations.of(image_id, caption))


def test_a_split_without_translations_has_one_language(world: Path, dataset: CocoLayoutDataset) -> None:
    found = Translations.find(dataset.index)
    assert found is not None and [path.name for path in found.paths] == ["captions_train2014.zh.json"]
    assert found.of(0, "unknown") == "unknown"
    assert Translations.find(replace(dataset.index, root=world / "nowhere")) is None


def write_captions(root: Path, texts: Sequence[tuple[str, str]]) -> CocoIndex:
    """The first image with these captions and translations."""
    write_coco(root)
    english = root / "annotations" / "captions_train2017.json"
    content = json.loads(english.read_text())
    image_id = content["annotations"][0]["image_id"]
    for path, place in ((english, 0), (translations_path(root, "train2017"), 1)):
        entries = [{"id": id_, "image_id": image_id, "caption": each[place]} for id_, each in enumerate(texts)]
        path.write_text(json.dumps(content | {"annotations": entries}))
    return DataConfig(str(root), "train2017", SIDE).load_index()


def test_of_equal_captions_the_first_ones_translation_stands_for_all(tmp_path: Path) -> None:
    index = write_captions(tmp_path, [("a dog", "一只狗"), ("a cat", "一只猫"), ("a dog", "有一只狗")])
    found, image = Translations.find(index), index.images[0]
    assert found is not None
    assert [found.of(image.id, caption) for caption in image.captions] == ["一只狗", "一只猫", "一只狗"]


def test_no_picture_is_mirrored_whose_translation_alone_names_a_side(tmp_path: Path) -> None:
    index = write_captions(tmp_path, [("a dog", "左边有一只狗"), ("a dog left of a cat", "狗和猫"), ("a cat", "一只猫")])
    config = DataConfig(str(tmp_path), "train2017", SIDE, hflip_prob=1.0, caption_mode="all")
    translations = Translations.find(index)
    assert translations is not None
    for sided, expected in ((translations.sided(), [False, False, True]), ((), [True, False, True])):
        dataset = CocoLayoutDataset(index, config, sided=sided)
        assert [dataset[item].is_flipped for item in range(3)] == expected
