"""A complete world in a folder, small enough for dozens of runs of main_mar.py: data, VAE, CLIP, MAR weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from models.frozen.vae import VaeConfig, build_autoencoder, ldm_checkpoint
from models.structmar import StructMAR, preset_config
from models.weights import NEW_PARTS
from tests.helpers.clip_files import text_settings, write_tokenizer
from tests.helpers.coco_fixture import FixtureBox, FixtureImage, write_coco
from tests.helpers.runs import assert_same
from util.rng import derive_seed

VAE = VaeConfig((8, 8, 8, 8), 1, 4, encoder_attention=False, mid_attention=False, norm_num_groups=4)
LATENT_SCALE = 0.5
SIZES = {"img_size": 32, "vae_embed_dim": 4, "buffer_size": 8, "diffloss_d": 2, "diffloss_w": 32, "max_objects": 4}


def write_world(root: Path, num_images: int = 9) -> Path:
    """data/coco (train2014 and val2014), vae.ckpt, clip/ and mar.safetensors under `root`, which is returned."""
    root.mkdir(parents=True, exist_ok=True)
    captions = ("a red dog", "a dog", "red red dog a")
    boxes = [FixtureBox((1, 3, 44, 90)[number % 4], (4, 6, 16, 20)) for number in range(num_images)]
    images = [FixtureImage(7 + 3 * k, 40 + k, 36, [box], captions) for k, box in enumerate(boxes)]
    write_coco(root / "coco", "train2014", images)
    write_coco(root / "coco", "val2014", images[:4])
    write_vae(root / "vae.ckpt")
    write_clip(root / "clip")
    write_mar(root / "mar.safetensors")
    return root


def write_vae(path: Path, seed: int = 0) -> None:
    _seed("vae", seed)
    torch.save(ldm_checkpoint(build_autoencoder(VAE), LATENT_SCALE, torch.float32), path)


def write_clip(directory: Path, seed: int = 0) -> None:
    directory.mkdir()
    _seed("clip", seed)
    CLIPTextModel(CLIPTextConfig(**text_settings(write_tokenizer(directory)))).save_pretrained(directory)


def mar_state() -> dict[str, torch.Tensor]:
    _seed("mar")
    model = StructMAR(preset_config("mar_mini", **SIZES))
    for parameter in model.parameters():  # zero-initialised parts would hide mistakes
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in NEW_PARTS)}


def write_mar(path: Path) -> None:
    save_file(mar_state(), path)


def argv(root: Path, output: str = "run", **flags: object) -> list[str]:
    """Flags of a short stage-1 run in `root`; `flags` replace or add (True: a switch; None: leave out)."""
    values: dict[str, object] = {
        "output_dir": root / output,
        "coco_root": root / "coco",
        "vae_path": root / "vae.ckpt",
        "clip_path": root / "clip",
        "resume": root / "mar.safetensors",
        "model": "mar_mini",
        **SIZES,
        "batch_size": 2,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "log_freq": 2,
        "num_workers": 0,
        "device": "cpu",
    } | flags
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def read_metrics(root: Path, output: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / output / "metrics.jsonl").read_text().splitlines()]


def load_checkpoint(root: Path, output: str = "run") -> dict:
    return torch.load(root / output / "checkpoint-last.pth", weights_only=True)


TIMES = ("images_per_second", "rollout_seconds", "update_seconds")


def assert_same_run(root: Path, one: str, other: str) -> None:
    """Two runs, by the names of their folders: the same checkpoint but for its flags, the same log but for times."""
    first, second = load_checkpoint(root, one), load_checkpoint(root, other)
    for state in (first, second):
        del state["args"]
    assert_same(first, second)
    assert timeless(read_metrics(root, one)) == timeless(read_metrics(root, other))


def timeless(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def _seed(*parts: int | str) -> None:
    torch.manual_seed(derive_seed("tiny_run", *parts))
