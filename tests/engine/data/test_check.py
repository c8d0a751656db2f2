"""What a run reads is looked at before its first step; caches know what they were made of."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine.data.check as check_module
from engine.data.cache import LatentCache, TextCache
from engine.data.cache_write import Share
from engine.data.check import NOTE_NAME, DataCheck, check_cache, check_dataset, check_pictures, check_sources
from engine.data.coco import CocoLayoutDataset, DataConfig
from engine.data.shards import MANIFEST, shard_path
from engine.data.sources import Photograph, photographs_of
from tests.helpers.caches import (
    CAPTIONS,
    IDS,
    LATENT_KEY,
    TEXT_KEY,
    fake_moments,
    fake_states,
    photographs_in,
    write_latents,
    write_texts,
)
from tests.helpers.coco_fixture import write_coco


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def compared(folder: Path, **sizes: tuple[int, int]) -> str:
    photographs = [
        Photograph(one.id, one.path, sizes.get(f"image{one.id}", one.size))
        for one in photographs_in(folder / "pictures", IDS)
    ]
    return check_sources(LatentCache(folder / "cache", LATENT_KEY), photographs)


def test_a_replaced_picture_is_refused_and_alone_encoded_again(tmp_path):
    write_latents(tmp_path / "cache")
    path = tmp_path / "pictures" / "42.png"
    path.write_bytes(bytes([9]) * 7)
    with pytest.raises(ValueError, match=r"image .*pictures/42\.png is not what the cache .*cache was made of: 1 bytes "
                                         r"with digest \w{12} when it was cached, 7 with \w{12} now.*run the same"):  # fmt: skip
        compared(tmp_path)
    encoded: list[int] = []
    write_latents(tmp_path / "cache", encode=lambda pixels: encoded.append(len(pixels)) or fake_moments(pixels))
    assert encoded == [1, 1]  # one image, both flips
    compared(tmp_path)
    write_latents(tmp_path / "new")
    assert contents(tmp_path / "cache") == contents(tmp_path / "new")


def test_a_replaced_picture_of_the_same_length_is_noticed_by_its_content(tmp_path):
    write_latents(tmp_path / "cache")
    (tmp_path / "pictures" / "3.png").write_bytes(bytes([200]))
    with pytest.raises(ValueError, match=r"pictures/3\.png is not what the cache"):
        compared(tmp_path)


def test_copied_pictures_are_the_same(tmp_path):
    """Their times are others, their content is not: nothing is refused, nothing encoded again."""
    write_latents(tmp_path / "cache")
    before = contents(tmp_path / "cache")
    for path in (tmp_path / "pictures").iterdir():
        os.utime(path)
    assert compared(tmp_path).endswith("5 of 5 pictures are here, and those it was made of")
    write_latents(tmp_path / "cache", encode=None)
    assert contents(tmp_path / "cache") == before


def test_without_the_pictures_a_cache_can_be_used_and_that_is_said(tmp_path, caplog):
    write_latents(tmp_path / "cache")
    photographs = photographs_in(tmp_path / "pictures", IDS)
    for image_id in IDS[:3]:
        (tmp_path / "pictures" / f"{image_id}.png").unlink()
    with caplog.at_level(logging.INFO):
        said = check_sources(LatentCache(tmp_path / "cache", LATENT_KEY), photographs)
    assert "2 of 5 pictures are here" in said
    assert [record for record in caplog.records if "3 of 5 pictures are not on this machine" in record.getMessage()]


def test_another_size_in_the_json_is_refused_even_without_the_pictures(tmp_path):
    write_latents(tmp_path / "cache")
    photographs_in(tmp_path / "pictures", IDS)[0].path.unlink()
    with pytest.raises(ValueError, match=r"3\.png .*16x16 when it was cached, 20x16 in the split's json"):
        compared(tmp_path, image3=(20, 16))


def test_a_changed_caption_is_refused_and_alone_encoded_again(tmp_path):
    write_texts(tmp_path / "cache")
    changed = CAPTIONS | {21: "two words"}
    with pytest.raises(ValueError, match=r"caption 21 was another text when encoded .*'two words'.*run the same"):
        TextCache(tmp_path / "cache", TEXT_KEY).require(changed)
    TextCache(tmp_path / "cache", TEXT_KEY).require({8: CAPTIONS[8]})
    encoded: list[str] = []
    write_texts(
        tmp_path / "cache", captions=changed, encode=lambda texts: encoded.extend(texts) or fake_states(texts)
    )
    assert encoded == ["two words"]
    write_texts(tmp_path / "new", captions=changed)
    assert contents(tmp_path / "cache") == contents(tmp_path / "new")


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_no_flipped_byte_goes_unnoticed(tmp_path, kind):
    """Somewhere in a shard: found before anything is read, or without effect on what is read (a note of a file's time)."""
    write_latents(tmp_path / "latents", shard_size=5)
    write_texts(tmp_path / "text", shard_size=5)
    file = shard_path(tmp_path / kind, 0)
    whole, draw = file.read_bytes(), random.Random(0)
    photographs = photographs_in(tmp_path / "pictures", IDS)
    expected = [LatentCache(tmp_path / "latents", LATENT_KEY).moments(image_id, True) for image_id in IDS]
    num_found = 0
    for position in sorted(draw.sample(range(len(whole)), 120)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << draw.randrange(8)]) + whole[position + 1 :])
        try:
            latents, texts = LatentCache(tmp_path / "latents", LATENT_KEY), TextCache(tmp_path / "text", TEXT_KEY)
            latents.require(IDS)
            texts.require(CAPTIONS)
            check_cache(latents), check_cache(texts)
            check_sources(latents, photographs)
            read = [latents.moments(image_id, True) for image_id in IDS]
            states = [texts.states(caption_id, caption) for caption_id, caption in CAPTIONS.items()]
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            num_found += 1
            continue
        assert all(map(torch.equal, read, expected))
        assert all(map(torch.equal, states, fake_states(list(CAPTIONS.values()))))
    assert num_found > 60
    write_latents(tmp_path / "latents", shard_size=5)  # repairs what is left of it
    write_texts(tmp_path / "text", shard_size=5)
    check_cache(LatentCache(tmp_path / "latents", LATENT_KEY)), check_cache(TextCache(tmp_path / "text", TEXT_KEY))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda tensors: tensors["moments"].mul_(float("nan")), "checksum of item 5"),
    (lambda tensors: tensors.update(moments=tensors["moments"].half()), r"moments is F16 \[2, 2, 8, 4, 4\]"),
    (lambda tensors: tensors.update(moments=tensors["moments"][:, :, :6].clone()), r"moments \[2, 2, 6, 4, 4\] beside"),
    (lambda tensors: tensors.update(moments=tensors["moments"][:1].clone()), r"moments is F32 \[1, 2, 8, 4, 4\]"),
    (lambda tensors: tensors.pop("digest"), "digest"),
])  # fmt: skip
def test_shards_of_another_form(tmp_path, change, reason):
    write_latents(tmp_path / "cache")
    file = shard_path(tmp_path / "cache", 1)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"shard-00001\.safetensors is damaged \(.*{reason}"):
        check_cache(LatentCache(tmp_path / "cache", LATENT_KEY))


def test_values_that_were_not_finite_when_written(tmp_path):
    write_latents(tmp_path / "cache", encode=lambda pixels: fake_moments(pixels) * float("inf"))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged \(not finite of item 3\)"):
        check_cache(LatentCache(tmp_path / "cache", LATENT_KEY))


def test_processes_share_the_shards(tmp_path):
    write_latents(tmp_path / "whole")
    encoded: list[list[int]] = []
    for rank in range(2):
        own: list[int] = []
        encoded.append(own)
        share = Share(rank, 2)
        write_latents(tmp_path / "shared", share=share, encode=lambda p, own=own: own.append(len(p)) or fake_moments(p))
    assert [sum(own) for own in encoded] == [2 * 3, 2 * 2]
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_cache_of_an_older_version_is_refused_in_one_line(tmp_path):
    write_latents(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(ValueError, match=r"version 1, which does not say what it was made of .*remove that folder and"):
        LatentCache(tmp_path / "cache", LATENT_KEY)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    return CocoLayoutDataset.from_config(DataConfig(str(write_coco(tmp_path / "coco")), "train2017", 16))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("damage", "message"), [
    (Path.unlink, r"image not found: .*000000000005\.jpg"),
    (cut, r"cannot read image .*000000000005\.jpg: .*truncated"),
    (lambda path: path.write_text("404"), r"cannot read image .*000000000005\.jpg: .*no known format"),
    (lambda path: Image.new("RGB", (7, 8)).save(path), r"000000000005\.jpg is 7x8, but instances_train2017\.json says 333x257"),
])  # fmt: skip
def test_every_picture_is_looked_at(dataset, tmp_path, damage, message):
    assert "5 pictures are there" in check_dataset(dataset, tmp_path).summary[1]
    damage(dataset.index.image_path(2))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_dataset(dataset, tmp_path)


def test_the_first_bad_picture_is_named_whatever_thread_is_quickest(dataset):
    photographs = photographs_of(dataset.index)
    for photograph in photographs[1:]:
        photograph.path.unlink()
    for _ in range(20):
        with pytest.raises(FileNotFoundError, match=r"000000000002\.jpg"):
            check_pictures(photographs, "x.json")


def test_what_was_checked_is_not_looked_at_again_until_it_changes(dataset, tmp_path, monkeypatch):
    found = check_dataset(dataset, tmp_path)
    found.remember(tmp_path)
    looked: list[Path] = []
    monkeypatch.setattr(check_module, "check_picture", lambda path, size, named_in: looked.append(path))
    assert "as they were when checked" in check_dataset(dataset, tmp_path).summary[1] and not looked
    for change in (os.utime, cut, Path.unlink):
        change(dataset.index.image_path(3))
        check_dataset(dataset, tmp_path).remember(tmp_path)
        assert len(looked) == 5
        looked.clear()
        check_dataset(dataset, tmp_path)
        assert not looked


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checked": 5}', "\xff"])
def test_a_note_that_says_nothing_is_as_none(dataset, tmp_path, content):
    (tmp_path / NOTE_NAME).write_text(content, encoding="latin-1")
    assert "pictures are there, whole" in check_dataset(dataset, tmp_path).summary[1]


def test_a_note_that_cannot_be_written_is_said_and_no_error(dataset, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO):
        DataCheck((), "abc").remember(tmp_path / "file")
    assert "checked again at the next start" in caplog.text


def test_a_dataset_without_images_needs_none(dataset, tmp_path):
    for path in (tmp_path / "coco" / "train2017").iterdir():
        path.unlink()
    captions = CocoLayoutDataset(dataset.index, dataset.config, has_images=False)
    assert len(check_dataset(captions, tmp_path).summary) == 1
