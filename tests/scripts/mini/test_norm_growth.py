"""How large activations grow: readings by hand, the program on two checkpoints, and what the script trains."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_mar
from engine.cli.arguments import train_parser
from engine.cli.sizes import model_config
from engine.data.inputs import StepInputs
from models.frozen.vq import VqConfig
from models.structmar import StructMAR
from scripts.mini import norm_growth
from scripts.mini.residual_norms import Reading, fixed_mask, growth_figure, named_folders, read_blocks, read_run
from tests.conftest import ROOT
from tests.helpers.family import family_model, some_latents
from tests.helpers.script_tree import ScriptTree
from tests.helpers.tiny_run import argv, write_world
from tests.helpers.vq_file import write_vq
from util.config import parse_args
from util.plots import picture_of

FAKE_PYTHON = """
case "$*" in
    main_mar.py*) mkdir -p "$folder"; case "$folder" in *"/${FAIL_AT:-nowhere}") exit 7 ;; esac ;;
esac
"""
script_tree = partial(ScriptTree, script="norm_growth.sh", root_variable="NORMS_ROOT", fake_python=FAKE_PYTHON)
VARIANTS = {
    "pre": ("pre", "none"),
    "pre_qk_norm": ("pre", "head_rms"),
    "res_post": ("res_post", "none"),
    "res_post_qk_norm": ("res_post", "head_rms"),
}


def read(model: StructMAR) -> Reading:
    latents = some_latents(model, 3)
    return read_blocks(model, StepInputs(latents), fixed_mask(3, math.prod(model.config.unit_grid()), 0.5, 0), 7)


def predictable(qk_norm: str) -> StructMAR:
    """All tokens enter as twos, attention adds nothing, the MLP one; queries are threes and keys fours."""
    model = family_model(rope_mode="off", qk_norm=qk_norm)
    with torch.no_grad():
        for constant in (model.z_proj.codes.weight, model.mask_token, model.fake_latent):
            constant.fill_(2.0)
        for block in model.decoder_blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
            block.mlp.fc2.bias.fill_(1.0)
            query, key, _ = block.attn.qkv.bias.chunk(3)
            query.fill_(3.0)
            key.fill_(4.0)
            for norm in (block.attn.q_norm, block.attn.k_norm):
                if norm is not None:
                    norm.weight.fill_(1.0)
    return model


@pytest.mark.parametrize(("qk_norm", "product"), [("none", 12.0), ("head_rms", 1.0)])
def test_readings_by_hand(qk_norm: str, product: float) -> None:
    reading = read(predictable(qk_norm))
    assert reading.step == 7 and reading.norms == pytest.approx([3.0, 4.0])
    assert reading.logits == pytest.approx([product * math.sqrt(16)] * 2, rel=1e-4)


@pytest.mark.parametrize("trunk", ["mae", "single"])
def test_each_block_is_read_once_and_left_as_it_was(trunk: str) -> None:
    model = family_model(trunk, patch_size=2)
    first = read(model)
    assert len(first.norms) == len(first.logits) == len(model.encoder_blocks) + len(model.decoder_blocks)
    assert read(model) == first
    assert all(not block._forward_hooks for block in (*model.encoder_blocks, *model.decoder_blocks))


def test_the_same_tokens_are_hidden_whatever_the_model() -> None:
    mask = fixed_mask(5, 64, 0.6, 3)
    assert mask.num_masked == 38 and torch.equal(mask.masked, fixed_mask(5, 64, 0.6, 3).masked)
    assert not torch.equal(mask.masked, fixed_mask(5, 64, 0.6, 4).masked)
    assert fixed_mask(1, 4, 0.01, 0).num_masked == 1


def test_the_program(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    vq = write_vq(world / "vq.pt", VqConfig((8, 16, 16), 1, 8, 32, 4, norm_num_groups=4))
    sizes = {"model": "maskgil_mini", "codebook_size": 32, "code_dim": 8, "class_num": 3, "vae_embed_dim": None,
             "diffloss_d": None, "diffloss_w": None, "resume": None, "vae_path": vq}  # fmt: skip
    run = {"train_mode": "full", "max_steps": 2, "keep_every": 1, "warmup_epochs": 0}
    assert main_mar.main(argv(world, "run", **sizes, **run)) == 0
    out = world / "norms"
    frozen = ["--vae_path", str(vq), "--clip_path", str(world / "clip"), "--coco_root", str(world / "coco")]
    words = [*frozen, "--coco_split", "val2014", "--num_images", "3", "--output_dir", str(out)]
    norm_growth.main(["--runs", f"a={world}/run", f"b={world}/run", *words])
    content = json.loads((out / "norms.json").read_text())
    assert content["num_images"] == 3 and list(content["runs"]) == ["a", "b"]
    first, last = content["runs"]["a"]
    assert (first["step"], last["step"]) == (1, 2) and len(first["norms"]) == len(first["logits"]) == 8
    assert first["norms"] != last["norms"], "the weights of each step, not the averages of the last"
    assert content["runs"]["b"] == content["runs"]["a"]
    assert Image.open(out / "norms.png").size == (1040, 636)


def test_a_figure_of_every_number_of_runs() -> None:
    readings = [Reading(step, (1.0, 2.0 * step), (3.0, 4.0)) for step in (1, 2)]
    assert picture_of(growth_figure({"one": readings, "two": readings[:1]})).std() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["pre"], "takes NAME=DIR, got 'pre'"),
        (["a=x", "a=y"], "names a twice: x and y"),
        ([f"{number}=x" for number in range(7)], "at most 6 runs, got 7"),
    ],
)
def test_mistakes_in_runs(given: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_folders(given)


def test_a_folder_without_kept_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} has no checkpoints of single steps.*--keep_every"):
        read_run(tmp_path, norm_growth.parse_args(["--runs", "a=b", "--vae_path", "v", "--output_dir", "o"]))


def trainings(lines: Sequence[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("main_mar.py ")]


def test_the_variants_differ_in_their_norms_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = script_tree(tmp_path / "tree").run(STEPS="60")
    assert code == 0
    monkeypatch.chdir(ROOT)
    runs = {Path(args.output_dir).name: args for args in (parse_args(train_parser(), w[1:]) for w in trainings(lines))}
    configs = {name: model_config(args, 12, 64) for name, args in runs.items()}
    assert {name: (each.norm_position, each.qk_norm) for name, each in configs.items()} == VARIANTS
    own = {"output_dir", "norm_position", "qk_norm"}
    shared = [{name: value for name, value in vars(args).items() if name not in own} for args in runs.values()]
    assert all(each == shared[0] for each in shared) and shared[0]["keep_every"] == 10
    asked = norm_growth.parse_args(shlex.split(lines[-1])[2:])
    assert named_folders(asked.runs) == {name: Path(args.output_dir) for name, args in runs.items()}


def test_the_script_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run("--smoke", FAIL_AT="res_post")
    assert code == 7 and len(trainings(lines)) == 3
    code, lines = tree.run("--smoke")
    assert code == 0 and len(trainings(lines)) == 2 and "scripts.mini.norm_growth" in lines[-1]
    code, lines = tree.run("--fast")
    assert code == 2 and lines == []
