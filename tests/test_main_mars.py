"""main_mar.py --backbone mars as a user meets it: both stages, stops, processes, caches, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import main_mar
import scripts.cache_latents
from engine.checkpoint.mars_weights import export_mars
from engine.cli.arguments import train_parser
from engine.cli.arguments_mars import OWN, SHARED
from engine.data.translations import translations_path
from engine.train.mars import MarsStep
from models.frozen.causal_lm import open_causal_lm
from models.mars.identity import MarsIdentity
from models.mars.model import Mars
from models.semvie import VISUAL_PART
from tests.helpers.mars_run import NUM_CODES, SIDE, mars_argv, run_mars, write_mars_world
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import assert_same, in_child, kill_in_call
from tests.helpers.tiny_run import assert_same_run, load_checkpoint, read_metrics
from util.ranges import Range

PARTS = {"max_steps": 5, "accum_iter": 2, "log_freq": 2, "ema_rate": 0.9}
"""An epoch has two steps of two batches: two epochs, and half of the third."""
ODD = {"grad_checkpointing": True, "lm_precision": "bf16", "copied_norms": True}
DRAWING = {"caption_weight": 0, "choice_weight": 0, "label_drop_prob": 0, "hflip_prob": 0}
"""A mean over codes alone, so that means over processes are the mean."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of stage I in whole/, seen from outside."""
    root = write_mars_world(tmp_path_factory.mktemp("mars") / "world")
    looked = {"eval_split": "val2014", "online_eval": True, "eval_freq": 1, "eval_images": 3, "num_preview": 2}
    run_mars(root, "whole", sample_freq=3, keep_every=2, **PARTS, **looked)
    return root


def checkpoint(world: Path, output: str = "whole") -> Path:
    return world / output / "checkpoint-last.pth"


def test_a_run_learns_both_tasks_and_shows_them(world: Path) -> None:
    lines = read_metrics(world, "whole")
    trained = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval/drawing" in line]
    assert [line["step"] for line in trained] == [2, 4, 5] and [line["step"] for line in held_out] == [2, 4]
    for line in trained:
        parts = line["drawing"] + line["describing"] + line["choice"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    first, last = held_out
    assert last["eval/describing"] < first["eval/describing"] and "eval/describing_zh" in first
    assert first["eval/drawing"] < math.log(NUM_CODES) + 0.5
    samples = world / "whole" / "samples"
    assert {path.name for path in samples.iterdir()} >= {"step-0000003.png", "step-0000003.txt"}
    assert min(Image.open(samples / "step-0000003.png").size) > SIDE
    told = (samples / "step-0000003.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in told] == ["7", "10"]
    assert (world / "whole" / "checkpoint-0000004.pth").is_file()


def test_the_first_loss_is_that_of_a_head_of_zeros(world: Path) -> None:
    run_mars(world, "first", max_steps=1)
    assert read_metrics(world, "first")[0]["drawing"] == pytest.approx(math.log(NUM_CODES), rel=1e-5)


def test_a_checkpoint_holds_what_trains_and_says_for_what(world: Path) -> None:
    state, base = load_checkpoint(world, "whole"), open_causal_lm(world / "lm", torch.float32)
    identity = MarsIdentity.of(state["mars"], "file")
    assert (identity.base_id, identity.base_type, identity.stage) == (base.id, "qwen2", "joint")
    assert identity.config.grid == (4, 4) and identity.config.num_codes == NUM_CODES and identity.max_tokens == 12
    frozen = [name for name in state["model"] if name.startswith("lm.") and VISUAL_PART not in name]
    assert frozen == [] and set(state["model"]) == set(state["model_ema"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = base.lm(input_ids=ids).logits
        model = Mars(base.lm, identity.config, torch.Generator())
        started = model.visual_state() | {}
        moved = [name for name, value in state["model"].items() if not torch.equal(value, started[name])]
        model.load_visual_state(state["model"], "file")
        assert torch.equal(model.lm(input_ids=ids).logits, before)
    assert set(moved) == set(model.trainable_names())


@pytest.mark.parametrize("flags", [{}, {"ema_rate": 0}, ODD])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(world: Path, flags: dict[str, Any]) -> None:
    name, chosen = "-".join(["stop", *flags]), PARTS | flags | {"log_freq": 1}
    run_mars(world, f"{name}-whole", **chosen)
    run_mars(world, f"{name}-parts", **chosen | {"max_steps": 3})
    state = run_mars(world, f"{name}-parts", **chosen)
    assert_same_run(world, f"{name}-whole", f"{name}-parts")
    assert (state["model_ema"] == {}) == ("ema_rate" in flags)


def test_a_run_that_was_killed_goes_on(world: Path) -> None:
    def killed() -> int:
        kill_in_call(MarsStep, "take", 3)
        return main_mar.main(mars_argv(world, "killed", **PARTS, save_freq_steps=1))

    assert in_child(killed) == -signal.SIGKILL
    assert load_checkpoint(world, "killed")["step"] == 3
    run_mars(world, "killed", **PARTS)
    run_mars(world, "not-killed", **PARTS)
    assert_same_run(world, "killed", "not-killed")


def test_stage_2_draws_alone_from_the_weights_of_stage_1(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state = run_mars(world, "refined", train_mode="refine", resume=checkpoint(world), max_steps=1, lr=1e-9)
    assert "starting stage 'refine' at epoch 0 with a fresh optimizer from the averaged weights" in caplog.text
    assert MarsIdentity.of(state["mars"], "file").stage == state["stage"] == "refine"
    (line,) = read_metrics(world, "refined")
    assert "describing" not in line and line["loss"] == pytest.approx(line["drawing"] + line["choice"], rel=1e-5)
    before = load_checkpoint(world, "whole")["model_ema"]
    for name, value in state["model"].items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    again = run_mars(world, "refined", train_mode="refine", resume=checkpoint(world), max_steps=2, lr=1e-9)
    assert again["step"] == 2
    assert main_mar.main(["--config", str(world / "refined" / "args.yaml"), "--max_steps", "2"]) == 0
    assert_same(load_checkpoint(world, "refined"), again)
    export_mars(checkpoint(world), world / "mars.safetensors")
    exported = run_mars(world, "exported", train_mode="refine", resume=world / "mars.safetensors", max_steps=2, lr=1e-9)
    assert_same(exported["model"], again["model"])


def upscaled(world: Path, output: str, **flags: Any) -> dict[str, Any]:
    return run_mars(
        world, output, **{"train_mode": "upscale", "resume": checkpoint(world), "img_size": 2 * SIDE} | flags
    )


def test_stage_3_makes_larger_what_stage_1_draws(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    looked = {"eval_split": "val2014", "online_eval": True, "eval_freq": 1, "eval_images": 3, "num_preview": 2}
    with caplog.at_level(logging.INFO):
        state = upscaled(world, "large", epochs=1, sample_freq=2, lr=1e-9, **looked)
    assert "starting stage 'upscale' at epoch 0 with a fresh optimizer from the averaged weights" in caplog.text
    identity = MarsIdentity.of(state["mars"], "file")
    assert (identity.config.grid, identity.config.low_grid, identity.stage) == ((8, 8), (4, 4), "upscale")
    before = load_checkpoint(world, "whole")["model_ema"]
    for name, value in state["model"].items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    lines = read_metrics(world, "large")
    assert all(line["loss"] == line["drawing"] and "describing" not in line for line in lines if "loss" in line)
    assert any("eval/drawing_zh" in line and "eval/describing" not in line for line in lines)
    (shown,) = [line for line in lines if "samples/psnr" in line and line["step"] == 2]
    assert shown["samples/psnr_zh"] > 0 and shown["samples/psnr_pictures"] > 0
    assert min(Image.open(world / "large" / "samples" / "step-0000002.png").size) > 2 * SIDE


@pytest.mark.parametrize("flags", [{}, {"grad_checkpointing": True, "precision": "bf16"}])
def test_stage_3_that_was_stopped_ends_as_one_that_was_not(world: Path, flags: dict[str, Any]) -> None:
    name, chosen = "-".join(["large", *flags]), PARTS | flags | {"max_steps": 3}
    upscaled(world, f"{name}-whole", **chosen)
    upscaled(world, f"{name}-parts", **chosen | {"max_steps": 2})
    upscaled(world, f"{name}-parts", **chosen)
    assert_same_run(world, f"{name}-whole", f"{name}-parts")
    other = world / f"{name}-parts"
    assert main_mar.main(["--config", str(other / "args.yaml")]) == 0  # as it was written down
    assert "is of stage upscale, which makes pictures larger" in refused(world, resume=other, train_mode="refine")


def test_two_processes_of_stage_3_are_one_of_twice_the_batch(world: Path) -> None:
    one = upscaled(world, "large-one", max_steps=2, label_drop_prob=0, hflip_prob=0)

    def run(rank: int) -> dict[str, Any]:
        words = mars_argv(world, "large-two", train_mode="upscale", resume=checkpoint(world), img_size=2 * SIDE,
                          max_steps=2, label_drop_prob=0, hflip_prob=0, batch_size=1, fsdp=True)  # fmt: skip
        main_mar.main(words)
        return {}

    in_two_processes(run, join_group=False)
    for key, value in load_checkpoint(world, "large-two")["model"].items():
        torch.testing.assert_close(value, one["model"][key], rtol=0, atol=2e-4, msg=key)


def test_cached_codes_are_those_of_the_images(world: Path) -> None:
    cache = world / "cache"
    words = {"coco_root": world / "coco", "coco_split": "train2014", "cached_path": cache, "vae_path": world / "vq.pt",
             "clip_path": world / "clip", "img_size": SIDE, "device": "cpu", "num_workers": 0}  # fmt: skip
    scripts.cache_latents.main([part for name, value in words.items() for part in (f"--{name}", str(value))])
    one = run_mars(world, "images", max_steps=3)
    other = run_mars(world, "cached", max_steps=3, use_cached=True, cached_path=cache)
    assert_same(one["model"], other["model"])


def test_captions_come_in_two_languages_where_there_are_two(world: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(world / "coco", tmp_path / "coco"))
    translations_path(alone, "train2014").unlink()
    both = run_mars(world, "both", max_steps=3)
    one = run_mars(world, "one-language", max_steps=3, coco_root=alone)
    assert not torch.equal(both["model"]["visual_embed.weight"], one["model"]["visual_embed.weight"])
    path = translations_path(alone, "train2014")
    content = json.loads(translations_path(world / "coco", "train2014").read_text())
    path.write_text(json.dumps(content | {"annotations": content["annotations"][1:]}))
    with pytest.raises(SystemExit, match=f"{path} lacks caption .* of image 7, 'a red dog'"):
        run_mars(world, "lacking", coco_root=alone)


def in_two(world: Path, output: str, **flags: object) -> dict[str, Any]:
    """As `run_mars`, with two processes that share a batch."""

    def run(rank: int) -> dict[str, Any]:
        main_mar.main(mars_argv(world, output, batch_size=1, **flags))
        return {}

    in_two_processes(run, join_group=False)
    return load_checkpoint(world, output)


def test_two_processes_are_one_of_twice_the_batch(world: Path) -> None:
    one, two = run_mars(world, "one", max_steps=3, **DRAWING), in_two(world, "two", max_steps=3, **DRAWING)
    for part in ("model", "model_ema"):
        assert two[part].keys() == one[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=2e-4, msg=f"{part} {name}")


def test_a_sharded_run_learns_shows_itself_and_goes_on(world: Path) -> None:
    """In two precisions, whose groups must not mix."""
    looked = {"eval_split": "val2014", "online_eval": True, "eval_freq": 1, "eval_images": 3, "num_preview": 2}
    flags = {"fsdp": True, "lm_precision": "bf16", "sample_freq": 2, **looked, **DRAWING}
    in_two(world, "sharded", max_steps=2, **flags)
    in_two(world, "sharded", max_steps=4, **flags)
    in_two(world, "sharded-whole", max_steps=4, **flags)
    assert_same_run(world, "sharded", "sharded-whole")
    assert (world / "sharded" / "samples" / "step-0000002.png").is_file()
    run_mars(world, "unsharded", max_steps=4, lm_precision="bf16", **looked, **DRAWING)
    lines = {name: read_metrics(world, name) for name in ("sharded", "unsharded")}
    for part in ("loss", "eval/drawing", "eval/describing"):
        found, wanted = ([line[part] for line in each if part in line] for each in lines.values())
        assert found and found == pytest.approx(wanted, rel=1e-3), part


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(world: Path, **flags: object) -> str:
    """The one line with which a run ends that does not begin."""
    with pytest.raises(SystemExit) as caught:
        main_mar.main(mars_argv(world, "refused", **flags))
    assert not (world / "refused").exists()
    return str(caught.value.code)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_mode": None}, "--backbone mars needs --train_mode joint, refine or upscale, got text_layout"),
        ({"backbone": None}, "--lm_path .* is for --backbone mars"),
        ({"backbone": None, "lm_path": None}, "--train_mode joint is for --backbone mars"),
        ({"lm_path": None}, "--backbone mars needs --lm_path"),
        ({"lm_path": "nowhere"}, "--lm_path nowhere does not exist; a folder that save_pretrained"),
        ({"train_mode": "refine"}, "--train_mode refine starts from trained weights: --resume names them"),
        ({"train_mode": "refine", "caption_weight": 2}, r"--caption_weight 2.0 does not go with --train_mode refine"),
        ({"train_mode": "upscale"}, "--train_mode upscale starts from trained weights: --resume names them"),
        ({"train_mode": "upscale", "choice_weight": 2}, "--choice_weight 2.0 does not go with --train_mode upscale"),
        (
            {"train_mode": "upscale", "use_cached": True, "cached_path": "x"},
            "--use_cached does not go with --train_mode",
        ),
        ({"img_size": 9}, "--img_size 9 is no multiple of the 2 pixels of a code"),
        ({"img_size": 32}, "--max_text_tokens 12 and --img_size 32, 256 codes, do not fit into .*lm: 270 positions"),
        ({"temperature": 0}, "--temperature must be above 0"),
        ({"online_eval": True}, "--online_eval needs --eval_split"),
        (
            {"online_eval": True, "coco_split": "train2014", "eval_split": "val2014+train2014"},
            r"--eval_split val2014\+train2014 and --coco_split train2014 share some",
        ),
        ({"resume": "best"}, "--resume best: runs of --backbone mars keep no best weights"),
        ({"warmup_epochs": 9}, "--warmup_epochs 9.0 is longer than --epochs 3"),
    ],
)
def test_what_does_not_go_together(world: Path, flags: dict[str, object], message: str) -> None:
    assert re.search(message, refused(world, **flags))


def test_every_flag_that_means_nothing_is_refused(world: Path) -> None:
    parser = train_parser()
    for action in parser._actions:
        if action.dest in (*SHARED, *OWN, "help"):
            continue
        default, flag = parser.get_default(action.dest), action.option_strings[0]
        if action.choices is not None:
            value = next(each for each in action.choices if each != default)
        elif isinstance(default, bool) or action.nargs == 0:
            value = not default
        elif isinstance(action.type, Range):
            value = next(each for each in (action.type.low, action.type.high, 1, 0.5) if
                         each != default and action.type.holds(action.type.kind(each)))  # fmt: skip
            value = action.type.kind(value)
        else:
            value = "64x64" if "size" in action.dest else "else"
        words = [flag if value else f"--no-{action.dest}"] if isinstance(value, bool) else [flag, str(value)]
        if isinstance(action.nargs, int) and action.nargs > 1:
            words = [flag, *[str(value)] * action.nargs]
        with pytest.raises(SystemExit) as caught:
            main_mar.main([*mars_argv(world, "refused"), *words])
        assert "does not go with --backbone mars" in str(caught.value.code), words


def test_weights_of_something_else_are_refused(world: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(world / "lm", tmp_path / "lm"))
    (other / "more.txt").write_text("")
    resume = {"resume": checkpoint(world)}
    assert "was made with base_id" in (said := refused(world, lm_path=other, **resume)) and "(see --lm_path)" in said
    assert "was made with max_tokens 12, here it is 10" in refused(world, max_text_tokens=10, **resume)
    assert "was made with config" in refused(world, copied_norms=True, **resume)
    large = {"train_mode": "upscale", **resume}
    assert "was made with config" in refused(world, copied_norms=True, img_size=2 * SIDE, **large)
    said = refused(world, **large)
    assert f"--img_size {SIDE} against " in said and "low_grid must be smaller than the grid (4, 4), got (4, 4)" in said
    assert "makes continuous latents, --backbone mars needs a VQ" in refused(world, vae_path=world / "vae.ckpt")
    assert "mar.safetensors" in refused(world, resume=world / "mar.safetensors")
    with pytest.raises(SystemExit, match="was written by stage 'joint', this run is stage 'refine'"):
        main_mar.main(mars_argv(world, "whole", train_mode="refine"))
    damaged = tmp_path / "checkpoint-last.pth"
    damaged.write_bytes(checkpoint(world).read_bytes()[:-100])
    assert str(damaged) in refused(world, resume=damaged)
