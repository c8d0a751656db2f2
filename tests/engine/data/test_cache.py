"""Caches: what is read equals what was encoded; killed, damaged, foreign and stale caches."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from engine.data.cache import (
    LatentCache,
    LatentCacheKey,
    TextCache,
    TextCacheKey,
)
from engine.data.coco import CocoLayoutDataset, DataConfig, collate
from engine.cli import build_cache
from engine.data.shards import shard_path
from scripts import cache_latents
from tests.helpers.caches import (
    CAPTIONS, IDS, LATENT_KEY, TEXT_KEY, fake_moments, fake_states, pixels_of, write_latents, write_texts,
)
from tests.helpers.coco_fixture import write_coco

def files(path):
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


def test_latents_round_trip(tmp_path):
    write_latents(tmp_path)
    cache = LatentCache(tmp_path, LATENT_KEY)
    assert len(cache) == 5 and sorted(os.listdir(tmp_path)) == [
        "manifest.json",
        *(shard_path("", shard).name for shard in range(3)),
    ]
    for position, image_id in enumerate(IDS):
        pixels = pixels_of(position)[None]
        assert torch.equal(cache.moments(image_id, False), fake_moments(pixels)[0])
        assert torch.equal(cache.moments(image_id, True), fake_moments(pixels.flip(-1))[0])
    cache.require(IDS)
    with pytest.raises(KeyError, match="no item with id 4"):
        cache.moments(4, False)
    with pytest.raises(ValueError, match=r"lacks 2 of the 3 items asked for, id 99 first"):
        cache.require([3, 99, 100])


def test_text_round_trip(tmp_path):
    write_texts(tmp_path)
    cache = TextCache(tmp_path, TEXT_KEY)
    for caption_id, caption in CAPTIONS.items():
        assert torch.equal(cache.states(caption_id, caption), fake_states([caption])[0])
    with pytest.raises(ValueError, match=r"caption 30 was another text when encoded \(checksum \w{8}\), now it is 'a cat'"):
        cache.states(30, "a cat")
    with pytest.raises(KeyError, match="no item with id 31"):
        cache.states(31, "a dog")


def test_batch_size_does_not_change_the_files(tmp_path):
    write_latents(tmp_path / "a", batch_size=1)
    write_latents(tmp_path / "b", batch_size=7)
    assert files(tmp_path / "a") == files(tmp_path / "b")


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("calls_before", [1, 3, 5, 6])
def test_killed_latent_run_continues(tmp_path, calls_before):
    write_latents(tmp_path / "whole")
    calls = []

    def killed_encode(pixels):
        if len(calls) == calls_before:
            raise Killed
        calls.append(len(pixels))
        return fake_moments(pixels)

    with pytest.raises(Killed):
        write_latents(tmp_path / "killed", encode=killed_encode, batch_size=1)
    with pytest.raises(ValueError, match=rf"is incomplete: {calls_before // 4} of 3 shards"):
        LatentCache(tmp_path / "killed", LATENT_KEY)
    (tmp_path / "killed" / "shard-00001.safetensors.tmp").write_bytes(b"half a shard")
    encoded, progress = [], []
    write_latents(
        tmp_path / "killed",
        encode=lambda pixels: encoded.append(len(pixels)) or fake_moments(pixels),
        on_progress=lambda done, total: progress.append(done),
    )
    assert sum(encoded) == 2 * (5 - 2 * (calls_before // 4))  # finished shards are not encoded again
    assert (progress[0], progress[-1]) == (5 - sum(encoded) // 2, 5)
    written = files(tmp_path / "killed")
    written.pop("shard-00001.safetensors.tmp", None)
    assert written == files(tmp_path / "whole")


def test_killed_text_run_continues(tmp_path):
    write_texts(tmp_path / "whole")
    seen = []

    def killed_encode(captions):
        if seen:
            raise Killed
        seen.extend(captions)
        return fake_states(captions)

    with pytest.raises(Killed):
        write_texts(tmp_path / "killed", encode=killed_encode)
    again = []
    write_texts(tmp_path / "killed", encode=lambda captions: again.extend(captions) or fake_states(captions))
    assert again == list(CAPTIONS.values())[2:]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"vae_id": "vae-2"}, "vae_id 'vae-1', but 'vae-2'"),
        ({"latent_scale": 0.18215}, r"latent_scale 0\.2325, but 0\.18215"),
        ({"split": "val2017"}, "split 'train2017', but 'val2017'"),
        ({"img_size": 32}, "img_size 16, but 32"),
    ],
)
def test_latents_of_something_else_are_refused(tmp_path, change, values):
    write_latents(tmp_path)
    before = files(tmp_path)
    other = dataclasses.replace(LATENT_KEY, **change)
    with pytest.raises(ValueError, match=values):
        LatentCache(tmp_path, other)
    with pytest.raises(ValueError, match=values):
        write_latents(tmp_path, key=other)
    assert files(tmp_path) == before


def test_text_of_something_else_is_refused(tmp_path):
    write_texts(tmp_path)
    for change, values in (
        ({"text_encoder_id": "t5"}, "text_encoder_id 'clip-1', but 't5'"),
        ({"split": "val2017"}, "split 'train2017', but 'val2017'"),
    ):
        with pytest.raises(ValueError, match=values):
            TextCache(tmp_path, dataclasses.replace(TEXT_KEY, **change))
    with pytest.raises(ValueError, match="ids_digest"):
        write_texts(tmp_path, captions={other + 1: caption for other, caption in CAPTIONS.items()})


def test_other_images_or_shards_are_refused(tmp_path):
    write_latents(tmp_path)
    with pytest.raises(ValueError, match="num_items 5, but 4 is asked for"):
        write_latents(tmp_path, ids=IDS[:4])
    with pytest.raises(ValueError, match="digest"):
        write_latents(tmp_path, ids=[3, 11, 5, 42, 8])
    with pytest.raises(ValueError, match="shard_size 2, but 3 is asked for"):
        write_latents(tmp_path, shard_size=3)
    with pytest.raises(ValueError, match="distinct"):
        write_latents(tmp_path / "new", ids=[1, 1])
    with pytest.raises(ValueError, match="distinct"):
        write_latents(tmp_path / "new", ids=[])


def test_latents_are_not_text(tmp_path):
    write_latents(tmp_path)
    with pytest.raises(ValueError, match="format 'structmar-latents', but 'structmar-text'"):
        TextCache(tmp_path, TEXT_KEY)


def test_no_cache_and_broken_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cache at .*manifest\.json not found; make it with"):
        LatentCache(tmp_path, LATENT_KEY)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        LatentCache(tmp_path, LATENT_KEY)


def test_shards_without_manifest_are_left_alone(tmp_path):
    write_latents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards but no manifest\.json"):
        write_latents(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_shard(tmp_path, keep):
    write_latents(tmp_path)
    whole = files(tmp_path)
    shard = shard_path(tmp_path, 1)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged .* run the same scripts"):
        LatentCache(tmp_path, LATENT_KEY)
    write_latents(tmp_path)  # repairs it
    assert files(tmp_path) == whole


def test_flipped_bits_are_noticed(tmp_path):
    write_latents(tmp_path / "latents")
    write_texts(tmp_path / "text")
    for kind, name in (("latents", "moments"), ("text", "states")):
        shard = shard_path(tmp_path / kind, 0)
        tensors = load_file(shard)
        tensors[name].view(-1)[0] += 1
        save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged \(checksum of item 3\)"):
        LatentCache(tmp_path / "latents", LATENT_KEY).moments(3, False)
    with pytest.raises(ValueError, match=r"damaged \(checksum of item 30\)"):
        TextCache(tmp_path / "text", TEXT_KEY).states(30, "a dog")


def test_readers_pickle_without_their_handles(tmp_path):
    write_latents(tmp_path)
    cache = LatentCache(tmp_path, LATENT_KEY)
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.moments(42, True), cache.moments(42, True))


def test_only_the_center_crop_can_be_cached(tmp_path):
    with pytest.raises(ValueError, match="only the 'center' crop can be cached, got 'random'"):
        write_latents(tmp_path, key=dataclasses.replace(LATENT_KEY, crop="random"))


class FakeCodec:
    id, latent_scale, codebook_size = "vae-1", 0.2325, 0

    @classmethod
    def load(cls, path, device="cpu", latent_scale=None):
        return cls()

    def encode(self, pixels):
        return fake_moments(pixels)


class FakeEncoder:
    id, dim, stated_cut = "clip-1", 8, 0

    @classmethod
    def load(cls, path, device="cpu", max_tokens=None):
        return cls()

    def tokenize(self, captions):
        return [[0]] * len(captions)

    def encode(self, captions):
        return fake_states(captions)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A dataset and the caches that the script made of it with fake models."""
    monkeypatch.setattr(build_cache, "load_codec", FakeCodec.load)
    monkeypatch.setattr(build_cache, "load_text_encoder", FakeEncoder.load)
    root = write_coco(tmp_path / "coco")
    command = ["--coco_root", str(root), "--coco_split", "train2017", "--cached_path", str(tmp_path / "cache")]
    cache_latents.main([*command, "--img_size", "16", "--batch_size", "2", "--device", "cpu", "--num_workers", "0"])
    return DataConfig(str(root), "train2017", 16), tmp_path / "cache"


def test_script_makes_what_training_reads(cached):
    """Cached and uncached samples agree: the same draws, and moments of the very pixels that would have been read."""
    config, path = cached
    latents, texts = LatentCache(path / "latents", LATENT_KEY), TextCache(path / "text", TEXT_KEY)
    plain, from_cache = CocoLayoutDataset.from_config(config), CocoLayoutDataset.from_config(config, latents, texts)
    flips = set()
    for epoch in range(3):
        plain.set_epoch(epoch)
        from_cache.set_epoch(epoch)
        for item in range(len(plain)):
            first, second = plain[item], from_cache[item]
            assert (first.caption, first.is_flipped) == (second.caption, second.is_flipped)
            assert torch.equal(first.layout.boxes_xyxy, second.layout.boxes_xyxy)
            assert second.pixels is None
            torch.testing.assert_close(second.moments, fake_moments(first.pixels[None])[0], rtol=0, atol=1e-6)
            assert torch.equal(second.text_states, fake_states([first.caption])[0])
            flips.add(first.is_flipped)
    assert flips == {True, False}


def test_cached_batches_through_workers(cached):
    config, path = cached
    for image in (path.parent / "coco" / "train2017").iterdir():
        image.unlink()  # training from the caches reads no image
    latents, texts = LatentCache(path / "latents", LATENT_KEY), TextCache(path / "text", TEXT_KEY)
    dataset = CocoLayoutDataset.from_config(config, latents, texts)
    dataset[0]  # opens handles before the workers fork
    plain, workers = (
        list(DataLoader(dataset, batch_size=2, num_workers=count, collate_fn=collate(4))) for count in (0, 2)
    )
    for first, second in zip(plain, workers, strict=True):
        assert torch.equal(first.moments, second.moments) and first.moments.shape[1:] == (8, 4, 4)
        assert torch.equal(first.text.tokens, second.text.tokens)
        lengths = [len(caption.split()) for caption in first.captions]
        assert first.text.valid.sum(dim=1).tolist() == lengths


def test_dataset_refuses_a_cache_that_does_not_fit(cached):
    config, path = cached
    latents = LatentCache(path / "latents", LATENT_KEY)
    with pytest.raises(ValueError, match="latents of the 'center' crop, but crop='random' was asked for"):
        CocoLayoutDataset.from_config(dataclasses.replace(config, crop="random"), latents)
    with pytest.raises(ValueError, match="train2017 at 16 px, but train2017 at 32 px was asked for"):
        CocoLayoutDataset.from_config(dataclasses.replace(config, img_size=32), latents)


def test_dataset_refuses_a_cache_that_lacks_an_image(cached):
    config, path = cached
    write_latents(path / "few", ids=[1, 2, 5])
    with pytest.raises(ValueError, match="lacks 2 of the 5 items asked for, id 9 first"):
        CocoLayoutDataset.from_config(config, LatentCache(path / "few", LATENT_KEY))


def test_script_runs_again_without_encoding_again(cached, monkeypatch):
    config, path = cached
    before = files(path / "latents") | files(path / "text")
    monkeypatch.setattr(FakeCodec, "encode", None)
    monkeypatch.setattr(FakeEncoder, "encode", None)
    command = ["--coco_root", config.coco_root, "--coco_split", "train2017", "--cached_path", str(path)]
    cache_latents.main([*command, "--img_size", "16", "--device", "cpu", "--num_workers", "0"])
    assert files(path / "latents") | files(path / "text") == before
    manifest = json.loads((path / "latents" / "manifest.json").read_text())
    assert (manifest["vae_id"], manifest["latent_scale"], manifest["num_items"]) == ("vae-1", 0.2325, 5)


def test_script_with_nothing_to_do():
    with pytest.raises(SystemExit, match="nothing to do"):
        cache_latents.main(["--coco_root", "x", "--cached_path", "y", "--no_latents", "--no_text"])


def test_script_says_in_one_line_what_is_missing(tmp_path):
    write_coco(tmp_path)
    command = ["--coco_root", str(tmp_path), "--coco_split", "train2017", "--cached_path", str(tmp_path / "c")]
    with pytest.raises(SystemExit, match=r"error: VAE checkpoint not found: .*none\.ckpt"):
        cache_latents.main([*command, "--vae_path", str(tmp_path / "none.ckpt"), "--device", "cpu"])
