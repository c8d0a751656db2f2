"""Caches of codes: both views apart, small, checked for their range, and never taken for another codebook's."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.cache import LatentCache, LatentCacheKey
from engine.data.check import check_cache
from engine.data.coco import CocoLayoutDataset, DataConfig, collate
from engine.data.inputs import encode_latents
from engine.data.shards import shard_path, tensor_crc
from models.frozen.codec import load_codec
from scripts import cache_latents
from tests.helpers.caches import IDS, LATENT_KEY, pixels_of, write_latents
from tests.helpers.coco_fixture import write_coco
from tests.helpers.vq_file import write_vq

KEY = LatentCacheKey("vq-1", 1.0, "train2017", 16, codebook_size=50)


def fake_codes(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, 16, 16] -> codes [B, 1, 4, 4] that know where left is."""
    shares = torch.nn.functional.avg_pool2d(pixels[:, :1] + torch.linspace(0, 1, 16), 4).sigmoid()
    return (shares * 49).to(torch.int16)


def codes_in(path):
    return LatentCache(path, KEY)


def test_codes_of_both_views(tmp_path):
    write_latents(tmp_path, key=KEY, encode=fake_codes)
    cache = codes_in(tmp_path)
    mirrored = 0
    for position, image_id in enumerate(IDS):
        pixels = pixels_of(position)[None]
        straight, flipped = cache.moments(image_id, False), cache.moments(image_id, True)
        assert straight.dtype == torch.int16 and torch.equal(straight, fake_codes(pixels)[0])
        assert torch.equal(flipped, fake_codes(pixels.flip(-1))[0])
        mirrored += int(torch.equal(flipped, straight.flip(-1)))
    assert mirrored == 0
    assert "finite" in check_cache(cache)


def test_a_kilobyte_for_an_image_of_256_pixels(tmp_path):
    ids = list(range(200))
    codes = torch.zeros(1, 1, 16, 16, dtype=torch.int16)
    write_latents(tmp_path, key=KEY, ids=ids, encode=lambda pixels: codes.expand(len(pixels), -1, -1, -1), shard_size=200)
    assert os.path.getsize(shard_path(tmp_path, 0)) / len(ids) < 1100


def test_an_interrupted_run_goes_on_and_repairs(tmp_path):
    write_latents(tmp_path / "whole", key=KEY, encode=fake_codes)
    write_latents(tmp_path / "cut", key=KEY, encode=fake_codes)
    shard_path(tmp_path / "cut", 1).unlink()
    tensors = load_file(shard_path(tmp_path / "cut", 0))
    tensors["codes"][1, 0] += 1
    save_file(tensors, shard_path(tmp_path / "cut", 0))
    encoded: list[int] = []
    write_latents(tmp_path / "cut", key=KEY, encode=lambda pixels: encoded.append(len(pixels)) or fake_codes(pixels))
    assert sum(encoded) == 2 * 3  # both views of two missing images and of a damaged one
    for shard in range(3):
        assert shard_path(tmp_path / "cut", shard).read_bytes() == shard_path(tmp_path / "whole", shard).read_bytes()


@pytest.mark.parametrize("value", [-1, 50])
def test_a_code_beyond_the_codebook_is_damage(tmp_path, value):
    write_latents(tmp_path, key=KEY, encode=fake_codes)
    shard = shard_path(tmp_path, 0)
    tensors = load_file(shard)
    tensors["codes"][0, 0, 0, 0, 0] = value
    tensors["crc"][0, 0] = tensor_crc(tensors["codes"][0, 0])
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=rf"shard-00000.*damaged \(codes from .*{value}.* instead of 0 to 49 of item 3"):
        codes_in(tmp_path).moments(3, False)
    with pytest.raises(ValueError, match="instead of 0 to 49"):
        check_cache(codes_in(tmp_path))
    write_latents(tmp_path, key=KEY, encode=fake_codes)
    assert torch.equal(codes_in(tmp_path).moments(3, False), fake_codes(pixels_of(0)[None])[0])


def test_moments_and_codes_refuse_each_other(tmp_path):
    write_latents(tmp_path / "codes", key=KEY, encode=fake_codes)
    write_latents(tmp_path / "moments")
    with pytest.raises(ValueError, match="format 'structmar-codes', but 'structmar-latents' is asked for"):
        LatentCache(tmp_path / "codes", LATENT_KEY)
    for action in (lambda path: LatentCache(path, KEY), lambda path: write_latents(path, key=KEY, encode=fake_codes)):
        with pytest.raises(ValueError, match="format 'structmar-latents', but 'structmar-codes' is asked for"):
            action(tmp_path / "moments")


def test_another_codebook_is_refused(tmp_path):
    write_latents(tmp_path, key=KEY, encode=fake_codes)
    with pytest.raises(ValueError, match="codebook_size 50, but 64 is asked for"):
        LatentCache(tmp_path, dataclasses.replace(KEY, codebook_size=64))
    with pytest.raises(ValueError, match="vae_id 'vq-1', but 'vq-2' is asked for"):
        LatentCache(tmp_path, dataclasses.replace(KEY, vae_id="vq-2"))


def test_large_codebooks_take_32_bits(tmp_path):
    key = dataclasses.replace(KEY, codebook_size=65536)
    write_latents(tmp_path, key=key, encode=lambda pixels: fake_codes(pixels).int() + 65000)
    assert LatentCache(tmp_path, key).moments(3, False).dtype == torch.int32
    assert LatentCache(tmp_path, key).moments(3, False).min() >= 65000


def test_a_cache_of_moments_says_what_it_said_before(tmp_path):
    """So that the caches that are there stay good."""
    write_latents(tmp_path)
    assert "codebook_size" not in json.loads((tmp_path / "manifest.json").read_text())


@pytest.fixture
def coded(tmp_path):
    """A dataset and the cache that the script made of it with a VQ tokenizer's file."""
    path = write_vq(tmp_path / "vq.pt")
    root = write_coco(tmp_path / "coco")
    command = ["--coco_root", str(root), "--coco_split", "train2017", "--cached_path", str(tmp_path / "cache")]
    command += ["--img_size", "16", "--device", "cpu", "--num_workers", "0", "--batch_size", "1", "--no-text"]
    cache_latents.main([*command, "--vae_path", str(path)])
    return load_codec(path), DataConfig(str(root), "train2017", 16), tmp_path / "cache" / "latents", command


def test_script_makes_codes_that_training_reads(coded):
    """Cached and uncached batches give the same latents."""
    codec, config, path, _ = coded
    cache = LatentCache(path, LatentCacheKey(codec.id, 1.0, "train2017", 16, codebook_size=32))
    plain, cached = CocoLayoutDataset.from_config(config), CocoLayoutDataset.from_config(config, cache)
    for item in range(len(plain)):
        batches = [collate(4)([dataset[item]]) for dataset in (plain, cached)]
        latents = [
            encode_latents(codec, batch.pixels, batch.moments, batch.image_ids, 0, 0, torch.device("cpu"))
            for batch in batches
        ]
        assert torch.equal(*latents) and latents[0].dtype == torch.float32 and latents[0].shape == (1, 1, 8, 8)


def test_script_refuses_a_scale_and_another_tokenizer(coded, tmp_path):
    *_, command = coded
    with pytest.raises(SystemExit, match=r"asked for latent_scale 2\.0, but .*vq\.pt makes codes"):
        cache_latents.main([*command, "--vae_path", str(tmp_path / "vq.pt"), "--latent_scale", "2"])
    content = torch.load(tmp_path / "vq.pt", weights_only=True)
    content["model"]["quantize.embedding.weight"] = content["model"]["quantize.embedding.weight"][:16].clone()
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="codebook_size 32, but 16 is asked for"):
        cache_latents.main([*command, "--vae_path", str(tmp_path / "other.pt")])
