"""The mini world's trainers of frozen parts: tokenizer, VAE, VQ, CLIP; each survives an interruption unchanged."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from models.frozen.codec import load_codec
from models.frozen.text import ClipTextEncoder
from models.frozen.vae import LatentCodec
from models.frozen.vq import VqConfig, build_vq
from scripts.mini import autoencoder_training, clip_training, train_clip, train_vae, train_vq, vae_training
from scripts.mini.tokenizer import build_tokenizer, byte_alphabet, save_tokenizer
from scripts.mini.training import batch_indices, learning_rate
from scripts.mini.vq_training import VqInTraining, restart_unused, spherical_kmeans
from tests.helpers.killed import Killed, run_killed_and_again

CAPTIONS = ["a red apple", "a blue kite and a vase", "two red kites on the beach", "a vase left of a blue apple"]


@pytest.fixture(scope="module")
def mini_root(tmp_path_factory):
    """A COCO folder of twelve 16x16 images with two captions each."""
    root = tmp_path_factory.mktemp("mini")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(12):
            name = f"{index:012d}.png"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / split / name)
            images.append({"id": index, "file_name": name})
            annotations += [{"image_id": index, "caption": CAPTIONS[(index + shift) % 4]} for shift in (0, 1)]
        content = {"images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


def test_words_are_single_tokens_and_any_text_survives(tmp_path):
    tokenizer = build_tokenizer(CAPTIONS * 20)
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    rows = tokenizer(words)["input_ids"]
    assert all(len(row) == 3 for row in rows)
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in rows)
    unseen = tokenizer("a zebra, naïve & 日本!", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in unseen
    assert tokenizer.decode(unseen).replace(" ", "") == "azebra,naïve&日本!"
    assert len(set(byte_alphabet())) == 256
    save_tokenizer(tokenizer, tmp_path, 77)
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(tokenizer) and len(merges) > len(words)


def test_each_epoch_is_a_permutation():
    epoch = torch.cat([batch_indices(step, 12, 4, seed=1, purpose="test") for step in range(3)])
    assert epoch.sort().values.tolist() == list(range(12))
    assert not torch.equal(batch_indices(0, 12, 12, 1, "test"), batch_indices(1, 12, 12, 1, "test"))
    with pytest.raises(ValueError, match="13 exceeds the 12"):
        batch_indices(0, 12, 13, 1, "test")


def test_learning_rate():
    assert learning_rate(0, 100, 1.0, 10) == pytest.approx(0.1)
    assert learning_rate(10, 100, 1.0, 10) == pytest.approx(1.0)
    assert learning_rate(55, 100, 1.0, 10, final=0.0) == pytest.approx(0.5)
    assert learning_rate(100, 100, 1.0, 10, final=0.02) == pytest.approx(0.02)


def vae_arguments(root, output, *more):
    small = ["--widths", "8", "8", "8", "8", "--batch_size", "4", "--latent_channels", "4"]
    return ["--data", str(root), "--output", str(output), "--steps", "4", "--save_freq", "2", *small, *more]


def test_vae_trainer_continues_exactly(mini_root, tmp_path, monkeypatch, capsys):
    straight, broken = tmp_path / "straight" / "vae.ckpt", tmp_path / "broken" / "vae.ckpt"
    train_vae.main(vae_arguments(mini_root, straight))
    run_killed_and_again(train_vae, autoencoder_training, vae_arguments(mini_root, broken), monkeypatch)
    assert "continuing from" in capsys.readouterr().out
    first, second = (torch.load(path, weights_only=True) for path in (straight, broken))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    assert all(value.dtype == torch.float16 for value in first["model"].values())
    codec = LatentCodec.load(straight)
    assert (codec.stride, codec.latent_channels, codec.latent_scale) == (8, 4, second["latent_scale"])
    assert sorted(path.name for path in broken.parent.iterdir()) == ["vae.ckpt", "vae.png"]
    train_vae.main(vae_arguments(mini_root, straight))
    assert "is there already" in capsys.readouterr().out


def test_a_state_of_other_settings_is_refused(mini_root, tmp_path, monkeypatch):
    output = tmp_path / "vae.ckpt"

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(vae_training, "latent_statistics", die)
    with pytest.raises(Killed):
        train_vae.main(vae_arguments(mini_root, output))
    with pytest.raises(SystemExit, match=r"vae\.state\.pth was written with lr=0\.001, not 0\.5"):
        train_vae.main(vae_arguments(mini_root, output, "--lr", "0.5"))


@pytest.fixture(scope="module")
def small_vae(mini_root, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.ckpt"
    train_vae.main(vae_arguments(mini_root, path))
    return path


def vq_arguments(root, output, vae, *more):
    small = ["--widths", "8", "8", "--batch_size", "4", "--latent_channels", "4", "--codes", "32", "--code_dim", "4"]
    state = ["--steps", "4", "--save_freq", "3", "--restart_freq", "1", "--init", str(vae)]
    return ["--data", str(root), "--output", str(output), *small, *state, *more]


def test_vq_trainer_continues_exactly(mini_root, small_vae, tmp_path, monkeypatch, capsys):
    straight, broken = tmp_path / "straight" / "vq.pt", tmp_path / "broken" / "vq.pt"
    train_vq.main(vq_arguments(mini_root, straight, small_vae))
    assert re.search(r"codes used \d+\.\d % of 32, perplexity", capsys.readouterr().out)
    arguments = vq_arguments(mini_root, broken, small_vae)
    run_killed_and_again(train_vq, autoencoder_training, arguments, monkeypatch)
    assert "continuing from" in capsys.readouterr().out
    assert straight.read_bytes() == broken.read_bytes()
    codec = load_codec(straight)
    assert (codec.stride, codec.codebook_size, codec.latent_scale) == (2, 32, 1.0)


def test_more_codes_than_features_are_refused(mini_root, small_vae, tmp_path):
    with pytest.raises(SystemExit, match="1000 codes need as many features to start from, the images give 768"):
        train_vq.main(vq_arguments(mini_root, tmp_path / "vq.pt", small_vae, "--codes", "1000"))


def test_kmeans_finds_separate_clusters():
    draws = torch.Generator().manual_seed(0)
    centres = torch.eye(4)
    features = centres.repeat_interleave(20, dim=0) + 0.1 * torch.randn(80, 4, generator=draws)
    found = spherical_kmeans(torch.nn.functional.normalize(features, dim=1), 4, draws)
    assert sorted((found @ centres.T).argmax(dim=1).tolist()) == [0, 1, 2, 3]


def test_unused_codes_are_restarted_and_used_ones_stay():
    network, averaged = (VqInTraining(build_vq(VqConfig((8,), 1, 4, 6, 4, False, False, False, 4))) for _ in range(2))
    features = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    codes, _ = network.quantised(features)
    used = codes.unique()
    before = network.rows.detach().clone()
    restart_unused(network, averaged, torch.Generator().manual_seed(0))
    assert torch.equal(network.rows[used], before[used]) and not network.uses.any()
    unused = [code for code in range(6) if code not in used]
    assert all((features == row).all(dim=1).any() for row in network.rows[unused])
    assert torch.equal(averaged.rows[unused], network.rows[unused])


def clip_arguments(root, output):
    small = ["--width", "16", "--depth", "1", "--batch_size", "4"]
    return ["--data", str(root), "--output", str(output), "--steps", "4", "--save_freq", "2", *small]


def test_clip_trainer_continues_exactly(mini_root, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_clip.main(clip_arguments(mini_root, straight))
    run_killed_and_again(train_clip, clip_training, clip_arguments(mini_root, broken), monkeypatch)
    first, second = ClipTextEncoder.load(straight), ClipTextEncoder.load(broken)
    assert first.id == second.id and first.dim == 16 and first.max_tokens == 77
    assert not (tmp_path / "broken.tmp").exists() and not (tmp_path / "broken.state.pth").exists()
    for one, other in zip(first.encode(CAPTIONS), second.encode(CAPTIONS), strict=True):
        assert torch.equal(one, other)
