"""main_mar.py as a user meets it: the paper's commands, the run folder, previews, caches, and what mistakes say."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_mar
from engine.checkpoint.files import read_identity
from engine.cli.arguments import train_parser
from engine.cli.build import model_config
from models.sampling.config import SamplingConfig
from scripts import cache_latents
from tests.helpers.coco_fixture import FixtureBox, FixtureImage, annotation_path, write_coco
from tests.helpers.paper_commands import STAGE_1, STAGE_2, words
from tests.helpers.tiny_run import SIZES, argv, load_checkpoint, read_metrics, write_clip, write_vae, write_world
from util.config import parse_args


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """The run folder of a short stage 1 with previews."""
    preview = {"sample_freq": 3, "num_preview": 2, "num_iter": 2, "num_sampling_steps": 3, "cfg": 2.0}
    flags = argv(world, "finished", max_steps=3, log_freq=1, eval_split="val2014", log_dir=None, **preview)
    assert main_mar.main(flags) == 0
    return world / "finished"


# --- the paper's commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [STAGE_1, STAGE_2])
def test_the_papers_commands_are_the_papers(command, shared):
    """Verbatim."""
    printed = (shared / "seeds" / "000_ea522daebb22e4f2.txt").read_text()
    assert command.strip() in printed


def test_the_papers_values_arrive():
    first, second = (parse_args(train_parser(), words(command)) for command in (STAGE_1, STAGE_2))
    assert (first.train_mode, second.train_mode) == ("text_layout", "full")
    assert (first.epochs, second.epochs, first.blr, second.blr) == (20, 100, 1e-4, 2e-5)
    assert (first.grad_checkpointing, second.grad_checkpointing) == (False, True)
    for args in (first, second):
        assert (args.batch_size, args.warmup_epochs, args.label_drop_prob, args.save_last_freq) == (64, 5, 0.1, 5)
        assert (args.mask_ratio_min, args.grad_clip, args.ema_rate, args.weight_decay) == (0.7, 3.0, 0.9999, 0.02)
        assert (args.vae_path, args.lr_schedule) == ("./pretrained_models/vae/kl16.ckpt", "constant")
        assert args.clip_path == "./pretrained_models/clip-vit-base-patch32"
        config = model_config(args, 80, 512)
        assert (config.attn_dropout, config.proj_dropout, config.diffusion_batch_mul) == (0.0, 0.0, 1)
        assert (config.img_size, config.vae_stride, config.buffer_size, config.max_objects) == (256, 16, 64, 16)
        assert (config.encoder_embed_dim, config.encoder_depth) == (1280, 20)
        assert (config.diffloss_d, config.diffloss_w) == (12, 1536)


def shrunk(command: str, world: Path, **paths: Any) -> list[str]:
    """The command with paths, device, length and sizes changed, and nothing else."""
    return [*words(command), *argv(world, **paths, max_steps=2, epochs=None, warmup_epochs=None, lr=None, log_freq=1)]


@pytest.mark.integration
def test_the_papers_two_stages_run(world, caplog):
    with caplog.at_level(logging.INFO):
        assert main_mar.main(shrunk(STAGE_1, world, output="paper1")) == 0
        stage_1 = world / "paper1" / "checkpoint-last.pth"
        assert main_mar.main(shrunk(STAGE_2, world, output="paper2", resume=stage_1)) == 0
    expected = f"starting stage 'full' at epoch 0 with a fresh optimizer from the EMA weights of {stage_1}"
    assert f"{expected} (stage 'text_layout'" in caplog.text
    first, second = load_checkpoint(world, "paper1"), load_checkpoint(world, "paper2")
    assert (first["stage"], first["step"]) == ("text_layout", 2)
    assert (second["stage"], second["step"]) == ("full", 2)
    assert second["config"]["grad_checkpointing"]
    assert len(second["optimizer"]["state"]) > len(first["optimizer"]["state"])


@pytest.mark.integration
def test_loss_falls_on_pictures(world):
    """Sixteen steps of stage 2 on nine pictures. Single steps are noisy: means of four are compared."""
    flags = {"batch_size": 8, "epochs": 16, "warmup_epochs": 0, "lr": 3e-3, "log_freq": 4}
    main_mar.main(argv(world, "falls", train_mode="full", **flags))
    losses = [line["loss"] for line in read_metrics(world, "falls")]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.integration
def test_sampling_options_go_from_weights_to_weights(world, caplog):
    """Stage 2 previews and evaluates as stage 1 says, but for what its own flags say; its checkpoint says it too."""
    length = {"max_steps": 1, "epochs": None, "warmup_epochs": None}
    main_mar.main(argv(world, "says", num_iter=5, temperature=0.9, **length))
    weights = world / "says" / "checkpoint-last.pth"
    with caplog.at_level(logging.INFO):
        main_mar.main(argv(world, "takes", train_mode="full", resume=weights, cfg=2.0, temperature=1.0, **length))
    assert "sampling options from the weights: num_iter 5\n" in caplog.text
    kept = read_identity(world / "takes" / "checkpoint-last.pth").sampling
    assert kept == SamplingConfig(num_iter=5, cfg_text=2.0, cfg_layout=2.0)


# --- the run folder ------------------------------------------------------------------------------------------------


def test_the_run_folder_is_enough_to_repeat_the_run(finished, world):
    args = yaml.safe_load((finished / "args.yaml").read_text())
    assert args["train_mode"] == "text_layout"
    assert (args["mask_ratio_min"], args["max_steps"], args["cfg_text"]) == (0.7, 3, None)
    again = parse_args(train_parser(), ["--config", str(finished / "args.yaml"), "--output_dir", "elsewhere"])
    assert {name for name in args if args[name] != vars(again)[name]} == {"output_dir"}
    environment = json.loads((finished / "environment.json").read_text())
    assert {"torch", "git_commit", "command", "packages"} <= set(environment)
    assert "run folder" in (finished / "log.txt").read_text()
    changed = ["--output_dir", str(world / "repeated"), "--sample_freq", "0"]
    main_mar.main(["--config", str(finished / "args.yaml"), *changed])
    first, second = load_checkpoint(world, "finished"), load_checkpoint(world, "repeated")
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def test_metrics_and_events(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert set(lines[0]) >= {"loss", "grad_norm", "lr", "epoch", "images_per_second"}
    assert [line["lr"] for line in lines] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])  # warmup: four steps
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["samples"]


def test_previews_are_pictures_with_boxes(finished):
    picture = Image.open(finished / "samples" / "step-0000003.png")
    assert min(picture.size) > 32


def test_previews_change_nothing(finished, world):
    main_mar.main(argv(world, "plain", max_steps=3, log_freq=1))
    first, second = load_checkpoint(world, "finished"), load_checkpoint(world, "plain")
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def test_online_eval_samples_by_epoch(world):
    preview = {"num_preview": 1, "num_iter": 1, "num_sampling_steps": 2, "eval_freq": 2}
    main_mar.main(argv(world, "online", epochs=2, online_eval=True, **preview))
    assert [path.name for path in (world / "online" / "samples").iterdir()] == ["step-0000008.png"]


def test_cached_training_is_uncached_training(world):
    cache = world / "cache"
    flags = {"coco_root": world / "coco", "vae_path": world / "vae.ckpt", "clip_path": world / "clip"}
    settings = {"cached_path": cache, "img_size": 32, "num_workers": 0, "device": "cpu"}
    cache_latents.main([word for name, value in (flags | settings).items() for word in (f"--{name}", str(value))])
    main_mar.main(argv(world, "uncached", max_steps=3, log_freq=1))
    main_mar.main(argv(world, "cached", max_steps=3, log_freq=1, use_cached=True, cached_path=cache))
    one, other = ([line["loss"] for line in read_metrics(world, name)] for name in ("uncached", "cached"))
    assert other == pytest.approx(one, rel=1e-4)


def test_workers_change_nothing(world):
    main_mar.main(argv(world, "workers", max_steps=2, log_freq=1, num_workers=1))
    main_mar.main(argv(world, "no_workers", max_steps=2, log_freq=1))
    one, other = ([line["loss"] for line in read_metrics(world, name)] for name in ("workers", "no_workers"))
    assert one == other


def test_every_flag_has_help():
    for action in train_parser()._actions:
        assert action.help, action.dest


# --- mistakes ------------------------------------------------------------------------------------------------------


def fails(world: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    """What a run says that is refused; its output folder must not exist."""
    output = world / "refused"
    with pytest.raises(SystemExit) as caught:
        main_mar.main(argv(world, "refused", **flags))
    assert not output.exists()
    return f"{caught.value} {capsys.readouterr().err}"


VALUES: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "--batch_size must be positive, got 0"),
    ({"batch_size": -4}, "--batch_size must be positive, got -4"),
    ({"batch_size": "many"}, "argument --batch_size: invalid int value: 'many'"),
    ({"accum_iter": 0}, "--accum_iter must be positive, got 0"),
    ({"accum_iter": 5}, "--accum_iter 5 is more than the 4 batches of an epoch"),
    ({"batch_size": 10}, "the dataset has 9 items, fewer than one global batch of 10"),
    ({"epochs": 0}, "--epochs must be positive, got 0"),
    ({"max_steps": 0}, "--max_steps must be positive, got 0"),
    ({"warmup_epochs": 4}, "--warmup_epochs 4.0 is longer than --epochs 3"),
    ({"lr": "nan"}, "--lr must be positive, got nan"),
    ({"grad_clip": -1}, "--grad_clip must not be negative, got -1.0"),
    ({"mask_ratio_min": 1.0}, "--mask_ratio_min must lie in (0, 1), got 1.0"),
    ({"label_drop_prob": 1.5}, "--label_drop_prob must lie in [0, 1], got 1.5"),
    ({"text_drop_prob": -0.1}, "--text_drop_prob must lie in [0, 1], got -0.1"),
    ({"label_drop_prob": 0.5, "text_drop_prob": 0.4, "layout_drop_prob": 0.2}, "add up to 1.1, which is more than 1"),
    ({"ema_rate": 1.01}, "--ema_rate must lie in [0, 1], got 1.01"),
    ({"attn_dropout": 1.0}, "--attn_dropout must lie in [0, 1), got 1.0"),
    ({"train_mode": "all"}, "must be one of full, text_layout, text_proj, backbone, class, distill, few_step"),
    ({"train_mode": "class"}, "--train_mode class and --class_root belong together, got class and ''"),
    ({"precision": "fp16"}, "argument --precision: invalid choice: 'fp16'"),
    ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ({"model": "mar_giant"}, "unknown model 'mar_giant'; did you mean mar_mini? choose one of"),
    ({"img_size": 36}, "--img_size 36 is not a multiple of --vae_stride x --patch_size = 8"),
    ({"vae_stride": 16}, "the model has vae_stride 16, but the VAE"),
    ({"vae_embed_dim": 16}, "the model has vae_embed_dim 16, but the VAE"),
    ({"latent_scale": 0.2325}, "asked for latent_scale 0.2325, but the file was made for 0.5"),
    ({"latent_scale": -1}, "--latent_scale must be positive, got -1.0"),
    ({"max_objects": 9}, "--max_objects 9 does not fit into --buffer_size 8"),
    ({"buffer_size": 12}, "encoder_pos_embed_learned: (1, 24, 128) in the file, (1, 28, 128) in the model"),
    ({"diffloss_w": 48}, "other sizes: diffloss.net.time_embed.mlp.0.weight: (32, 256) in the file, (48, 256)"),
    ({"diffloss_d": 3}, "missing ['diffloss.net.res_blocks.2.in_ln.weight'"),
    ({"coco_split": "train2017"}, "instances_train2017.json"),
    ({"cached_path": "somewhere"}, "--use_cached and --cached_path belong together, got False and 'somewhere'"),
    ({"use_cached": True, "cached_path": "somewhere"}, "somewhere has neither latents/ nor text/"),
    ({"use_cached": True, "cached_path": "x", "crop": "random"}, "--use_cached does not go with --crop random"),
    ({"sample_freq": 1, "num_iter": 17}, "num_iter must lie between 1 and the number of tokens, 16, got 17"),
    ({"sample_freq": 1, "num_iter": 4, "num_preview": 10}, "10 scenes were asked for, but train2014 has 9 images"),
    ({"num_sampling_steps": 0}, "--num_sampling_steps must be positive, got 0"),
    ({"batchsize": 4}, "unrecognized arguments: --batchsize 4"),
]


@pytest.mark.parametrize(("flags", "message"), VALUES, ids=lambda value: str(value)[:40])
def test_mistaken_values(world, capsys, flags, message):
    assert message in fails(world, capsys, **flags)


@pytest.mark.parametrize("flag", ["coco_root", "vae_path", "clip_path", "resume"])
def test_missing_paths_say_where_to_get_them(world, capsys, flag):
    said = fails(world, capsys, **{flag: world / "nowhere"})
    flag = {"clip_path": "text_encoder"}.get(flag, flag)
    assert f"--{flag} {world / 'nowhere'} does not exist" in said
    assert "https://" in said


def broken_json(root: Path) -> dict[str, Path]:
    annotation_path(root / "coco", "captions", "train2014").write_text("{")
    return {}


def missing_images(root: Path) -> dict[str, Path]:
    shutil.rmtree(root / "coco" / "train2014")
    return {}


def cut_off_image(root: Path) -> dict[str, Path]:
    """In the middle of the split: no batch would have come to it before the first step."""
    image = sorted((root / "coco" / "train2014").iterdir())[5]
    image.write_bytes(image.read_bytes()[:-1])
    return {}


def truncated_weights(root: Path) -> dict[str, Path]:
    whole = (root / "mar.safetensors").read_bytes()
    (root / "mar.safetensors").write_bytes(whole[: len(whole) // 2])
    return {}


def truncated_checkpoint(root: Path) -> dict[str, Path]:
    path = root / "run.pth"
    torch.save({"model": {"fake_latent": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-200])
    return {"resume": path}


def web_page(root: Path) -> dict[str, Path]:
    (root / "vae.ckpt").write_text("<!DOCTYPE html><html>not found</html>")
    return {}


def folder_without_checkpoint(root: Path) -> dict[str, Path]:
    return {"resume": root / "coco"}


def clip_without_weights(root: Path) -> dict[str, Path]:
    (root / "clip" / "model.safetensors").unlink()
    return {}


def tensors_of_something_else(root: Path) -> dict[str, Path]:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, root / "other.pth")
    return {"resume": root / "other.pth"}


FILES: list[tuple[Callable[[Path], dict[str, Path]], str]] = [
    (broken_json, "captions_train2014.json is not valid JSON"),
    (missing_images, "image folder not found"),
    (cut_off_image, "000000000022.jpg: image file is truncated"),
    (truncated_weights, "mar.safetensors is truncated or not a safetensors file"),
    (truncated_checkpoint, "run.pth is truncated"),
    (web_page, "vae.ckpt is a web page, not weights"),
    (folder_without_checkpoint, "is a folder without checkpoint-last.pth"),
    (clip_without_weights, "has no model.safetensors or pytorch_model.bin"),
    (tensors_of_something_else, "other.pth is neither a StructMAR checkpoint nor MAR's or MaskGIL's weights"),
]


@pytest.mark.parametrize(("breaks", "message"), FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_files(world, tmp_path, capsys, breaks, message):
    root = tmp_path / "copy"
    root.mkdir()
    for name in ("coco", "clip"):
        shutil.copytree(world / name, root / name)
    for name in ("vae.ckpt", "mar.safetensors"):
        shutil.copy(world / name, root)
    assert message in fails(root, capsys, **breaks(root))


def test_check_data_looks_and_does_not_train(world, tmp_path, caplog):
    """What it found is noted, so that the run itself begins quickly."""
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        assert main_mar.main(argv(world, str(out), check_data=True)) == 0
    assert "9 pictures are there, whole" in caplog.text and "all that this run reads is there" in caplog.text
    assert [path.name for path in out.iterdir()] == ["checked.json"]


def test_a_checkpoint_of_another_vae_text_encoder_or_dataset(world, tmp_path, finished, capsys):
    """Each names the file, the field and both values."""
    resume = {"resume": finished, "train_mode": "full"}
    write_vae(tmp_path / "other.ckpt", seed=1)
    said = fails(world, capsys, **resume, vae_path=tmp_path / "other.ckpt")
    assert f"{finished / 'checkpoint-last.pth'} was made with vae id" in said
    write_clip(tmp_path / "clip", seed=1)
    assert "was made with text_encoder id" in fails(world, capsys, **resume, clip_path=tmp_path / "clip")

    images = [FixtureImage(number, 40, 36, [FixtureBox(1, (4, 6, 16, 20))]) for number in range(1, 10)]
    path = annotation_path(write_coco(tmp_path / "coco", "train2014", images), "instances", "train2014")
    path.write_text(path.read_text().replace("tomato", "melon"))
    said = fails(world, capsys, **resume, coco_root=tmp_path / "coco")
    assert "categories {'id': 1, 'name': 'tomato'}, this run has {'id': 1, 'name': 'melon'}" in said
    said = fails(world, capsys, **resume, diffloss_w=48)
    assert f"another architecture: diffloss_w {SIZES['diffloss_w']} in the file, 48 here" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 4", "unknown key batch_sise (value 4), did you mean batch_size?"),
        ("batch_size: four", "batch_size: 'four': expected an int, got str"),
        ("epochs: 2.5", "epochs: 2.5: expected an int, got float"),
        ("grad_checkpointing: 3", "grad_checkpointing: 3: expected true or false"),
        ("lr_schedule: linear", "lr_schedule: 'linear': choose from constant, cosine"),
        ("- a list", "must be a mapping of argument names, it is a list"),
    ],
)
def test_mistakes_in_a_yaml(world, tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    said = fails(world, capsys, config=path)
    assert message in said
    assert str(path) in said


def test_a_missing_yaml(world, capsys):
    assert "config file nowhere.yaml does not exist" in fails(world, capsys, config="nowhere.yaml")
