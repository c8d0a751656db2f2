"""Phrases of boxes in the data: where they come from, how often a box has one, what the text encoder makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.data.coco import CocoLayoutDataset, DataConfig, collate
from engine.data.phrases import PhraseEncoder, draw_phrases
from tests.helpers.coco_fixture import annotation_path, write_coco
from util.coco import read_split
from util.types import UNKNOWN, Layout, LayoutBatch, TextContext

NAMES = {90: "lemon", 1: "tomato", 44: "plum", 3: "leaf"}


def with_phrases(root: Path, phrase_of: Callable[[dict], object]) -> Path:
    """The fixture with phrases; `phrase_of` gets an annotation, None leaves it without."""
    path = annotation_path(write_coco(root), "instances")
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if (phrase := phrase_of(annotation)) is not None:
            annotation["phrase"] = phrase
    path.write_text(json.dumps(content))
    return root


def dataset(root: Path, prob: float, **settings: object) -> CocoLayoutDataset:
    config = DataConfig(str(root), "train2017", 64, min_visibility=0.05, phrase_prob=prob, **settings)  # type: ignore[arg-type]
    return CocoLayoutDataset.from_config(config)


def ripe(annotation: dict) -> str | None:
    """Of two classes; the others have no phrase of their own."""
    return f"ripe {NAMES[annotation['category_id']]}" if annotation["category_id"] in (1, 90) else None


def test_phrases_are_read_with_the_boxes_that_stay(tmp_path: Path) -> None:
    images = read_split(with_phrases(tmp_path, ripe), "train2017").images
    assert [image.phrases for image in images] == [("ripe tomato", ""), (), ("ripe lemon", "ripe tomato"), (), ()]
    assert read_split(with_phrases(tmp_path / "b", lambda _: "  a \n b "), "train2017").images[0].phrases[0] == "a b"


@pytest.mark.parametrize("phrase", [3, ["a"], "\ud800"])
def test_a_phrase_that_is_no_text_is_refused_by_name(tmp_path: Path, phrase: object) -> None:
    with pytest.raises(ValueError, match=r"annotations\[0\] \(annotation 1000\): phrase"):
        read_split(with_phrases(tmp_path, lambda _: phrase), "train2017")


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_box_keeps_its_own_phrase_through_crop_and_filters(tmp_path: Path, flip: float) -> None:
    """With certainty told; a box without a phrase goes by its class's name. The largest boxes come first."""
    data = dataset(with_phrases(tmp_path, ripe), 1.0, hflip_prob=flip)
    for item in range(len(data)):
        plain = dataset(tmp_path, 0.0, hflip_prob=flip)[item].layout
        layout = data[item].layout
        assert torch.equal(layout.boxes_xyxy, plain.boxes_xyxy) and plain.phrases == ()
        names = [data.index.categories[category].name for category in plain.categories]
        assert layout.phrases == tuple(f"ripe {name}" if name in ("tomato", "lemon") else name for name in names)
        assert all(own in (UNKNOWN, was) for own, was in zip(layout.categories, plain.categories, strict=True))


def test_half_of_the_boxes_that_are_told_by_phrase_have_no_class() -> None:
    """Shares by their binomial deviation over 20,000 boxes: 0.0035."""
    layout = Layout(torch.tensor([[0.0, 0, 1, 1]]).expand(20000, -1), torch.ones(20000, dtype=torch.int64), ("a",) * 20000)
    drawn = draw_phrases(layout, 0.6, torch.Generator().manual_seed(0))
    told = [bool(phrase) for phrase in drawn.phrases]
    classless = (drawn.categories == UNKNOWN).tolist()
    counts = Counter(zip(told, classless, strict=True))
    shares = {key: count / 20000 for key, count in counts.items()}
    assert shares == pytest.approx({(False, False): 0.4, (True, False): 0.3, (True, True): 0.3}, abs=0.014)


def test_what_is_drawn_depends_on_the_image_and_epoch_alone(tmp_path: Path) -> None:
    root = with_phrases(tmp_path, ripe)
    first, second = dataset(root, 0.5), dataset(root, 0.5)
    _ = [second[item] for item in (4, 0, 2)]

    def seen(data: CocoLayoutDataset) -> list[tuple]:
        return [(each.layout.phrases, each.layout.categories.tolist()) for each in map(data.__getitem__, range(5))]

    assert seen(first) == seen(second)
    by_epoch = []
    for epoch in range(6):
        first.set_epoch(epoch)
        by_epoch.append(str(seen(first)))
    assert len(set(by_epoch)) > 1


def test_an_image_is_not_mirrored_against_what_a_phrase_says(tmp_path: Path) -> None:
    root = with_phrases(tmp_path, lambda each: "the left one" if each["image_id"] == 1 else "a thing")
    data = dataset(root, 0.5, hflip_prob=1.0)
    assert [data[item].is_flipped for item in range(3)] == [False, True, True]
    assert dataset(root, 0.0, hflip_prob=1.0)[0].is_flipped  # nobody is told


def test_phrases_travel_with_their_batch(tmp_path: Path) -> None:
    data = dataset(with_phrases(tmp_path, ripe), 1.0)
    batch = collate(4)([data[0], data[3]])
    assert batch.phrases == (data[0].layout.phrases, ()) == batch.to("cpu").phrases
    assert batch.layout.phrases is None


class CountingEncoder:
    """States of a text are its letters. dim: 3."""

    id, max_tokens, dim, device = "letters", 77, 3, torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        return [torch.tensor([[float(ord(letter))] * 3 for letter in caption]) for caption in captions]

    def context(self, captions: Sequence[str]) -> TextContext:
        self.asked += captions
        return TextContext.collate(self.encode(captions))

    def phrase_tokens(self, caption: str, phrase: str) -> range:
        raise NotImplementedError


def test_each_phrase_is_encoded_once_and_stands_in_its_boxs_slot() -> None:
    encoder = CountingEncoder()
    phrases = PhraseEncoder(encoder)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    layouts = [Layout(box.repeat(3, 1), torch.tensor([0, 1, 2])), Layout(box, torch.tensor([1])), Layout(box, torch.tensor([1]))]
    batch = LayoutBatch.collate(layouts, 4)
    filled = phrases.fill(batch, [("ab", "", "b"), ("b",), ()]).phrases
    assert filled is not None and filled.shape == (3, 4, 3) and filled.dtype == torch.float32
    wanted = torch.zeros(3, 4)
    wanted[0, 0], wanted[0, 2], wanted[1, 0] = (ord("a") + ord("b")) / 2, ord("b"), ord("b")
    assert torch.equal(filled, wanted[..., None].expand(-1, -1, 3))
    phrases.fill(batch, [("b",), ("ab",), ("c",)])
    assert encoder.asked == ["ab", "b", "c"]
    assert not phrases.fill(batch, [(), (), ()]).phrases.any()
    assert replace(batch, phrases=None) == batch
