"""The ablation: flags change what they say, no more; the script trains alike and resumes; the table is honest."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import main_mar
from engine.checkpoint.load import load_for_sampling
from engine.cli.arguments import train_parser
from engine.cli.build import model_config
from models.sampling.config import SamplingConfig
from models.sampling.guidance import embed_branches
from models.sampling.sampler import sample
from models.structmar import StructMARConfig, preset_config
from models.weights import part_of, select_trainable
from scripts import evaluate_layout
from scripts.mini.ablation import VARIANTS, ablation_table
from tests.conftest import ROOT
from tests.helpers import reference
from tests.helpers.script_tree import ScriptTree
from tests.helpers.structured import generator, predict, some_layout, some_text
from tests.helpers.tiny_run import argv, load_checkpoint, write_world
from util.config import parse_args

DIFFERENCES: dict[str, dict[str, Any]] = {  # from the full model, and from its training
    "full": {},
    "no_rope": {"rope_mode": "off"},
    "no_bias": {"layout_bias_encoder": False, "layout_bias_decoder": False},
    "no_fourier": {"layout_fourier": False},
    "no_cross_attention": {"cross_attn_every": 0},
    "text_only": {},
}

# flags and model


def pooled_model() -> Any:
    model = reference.tiny_model(**(reference.STRUCTURED | {"cross_attn_every": 0}))
    torch.nn.init.normal_(model.text_pool_proj.weight, std=0.3, generator=generator(5))
    return model


def test_without_cross_attention_only_the_pooled_text_is_left() -> None:
    model = pooled_model()
    text = [name for name, _ in model.named_parameters() if part_of(name) == "text"]
    assert text == ["text_pool_proj.weight", "text_pool_proj.bias"]
    caption = some_text()
    plain = predict(model, caption, some_layout())
    other_tokens = replace(caption, tokens=caption.tokens + 1)
    other_pooled = replace(caption, pooled=caption.pooled + 1)
    assert torch.equal(plain, predict(model, other_tokens, some_layout()))
    assert not torch.allclose(plain, predict(model, other_pooled, some_layout()))
    assert not torch.allclose(plain, predict(model, None, some_layout()))


def test_without_cross_attention_everything_trains_and_guides() -> None:
    for dropped in (False, True):
        model = pooled_model().train()
        chosen = select_trainable(model, "full")
        noise = model.sample_training_noise(2, generator(), 0.7)
        drop = torch.full((2,), dropped)
        text, layout = some_text().dropped(drop), some_layout().dropped(drop)
        model(reference.tensors()["train.latents"], noise, text=text, layout=layout).backward()
        assert [name for name, parameter in chosen.items() if parameter.grad is None] == []
    model.eval()
    config = SamplingConfig(num_iter=2, num_sampling_steps=2, cfg_text=2.0, cfg_layout=3.0)
    branches, _ = embed_branches(model, config, 2, some_text(), some_layout(), None)
    assert branches.names == ("full", "text", "null") and branches.conditions.text is None
    output = sample(model, config, [generator(1), generator(2)], some_text(), some_layout())
    assert output.latents.isfinite().all()


def test_every_kth_block_attends() -> None:
    for every, blocks in ((1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (0, [])):
        config = preset_config("mar_mini", text_dim=8, cross_attn_every=every)
        assert [block for block in range(4) if config.has_cross_attention(block)] == blocks
    assert not preset_config("mar_mini", text_dim=0).has_cross_attention(0)
    with pytest.raises(ValueError, match="cross_attn_every must be from 0 to 65536, got -1"):
        preset_config("mar_mini", cross_attn_every=-1)


def test_the_committed_weights_still_load() -> None:
    loaded = load_for_sampling(ROOT / "pretrained_models/mini/structmar_mini_stage2.safetensors", torch.device("cpu"))
    assert loaded.identity.config.cross_attn_every == 1 and loaded.model.text_null.abs().sum() > 0


def test_a_run_without_any_part_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_world(tmp_path / "world", num_images=4)
    flags: dict[str, object] = {
        "train_mode": "full", "rope_mode": "off", "no-layout_bias_encoder": True, "no-layout_bias_decoder": True,
        "no-layout_fourier": True, "cross_attn_every": 0, "layout_drop_prob": 1, "epochs": 1,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--cross_attn_every must not be negative, got -1"):
        main_mar.main(argv(root, **(flags | {"cross_attn_every": -1})))
    assert main_mar.main(argv(root, **flags)) == 0
    checkpoint = load_checkpoint(root)
    expected = {name: value for changes in DIFFERENCES.values() for name, value in changes.items()}
    assert {name: checkpoint["config"][name] for name in expected} == expected
    assert StructMARConfig.from_dict(checkpoint["config"]).layout_fourier is False
    assert not any(".cross." in name or "rope" in name for name in checkpoint["model"])
    assert checkpoint["model"]["layout_embed.box_mlp.0.weight"].shape[1] == 4


# script

FAKE_PYTHON = """
case "$*" in
    main_mar.py*) mkdir -p "$folder"; case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac ;;
    *evaluate_layout*) mkdir -p "$folder"; touch "$folder/results.json" ;;
esac
"""

script_tree = partial(ScriptTree, script="ablation.sh", root_variable="ABLATION_ROOT", fake_python=FAKE_PYTHON)


def trainings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("main_mar.py ")]


def evaluations(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("-m scripts.evaluate_layout ")]


def folder_of(line: str) -> str:
    """The variant that a training or an evaluation is of."""
    words = shlex.split(line)
    return words[words.index("--output_dir") + 1].removesuffix("/evaluation").rsplit("/", 1)[1]


@pytest.mark.parametrize("arguments", [(), ("--smoke",)])
def test_variants_differ_in_one_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    monkeypatch.chdir(ROOT)
    code, lines = script_tree(tmp_path / "tree").run(*arguments)
    assert code == 0
    assert [folder_of(line) for line in trainings(lines)] == list(DIFFERENCES) == list(VARIANTS)
    assert [folder_of(line) for line in evaluations(lines)] == list(VARIANTS)
    parsed = {folder_of(line): parse_args(train_parser(), shlex.split(line)[1:]) for line in trainings(lines)}
    full = model_config(parsed["full"], 12, 64)
    for name, args in parsed.items():
        assert model_config(args, 12, 64) == replace(full, **DIFFERENCES[name])
        changed = {key for key, value in vars(args).items() if value != vars(parsed["full"])[key]}
        expected = {*DIFFERENCES[name], *({"layout_drop_prob"} if name == "text_only" else ())}
        assert changed - {"output_dir"} == expected
    args = parsed["text_only"]
    assert (args.layout_drop_prob, args.train_mode, args.max_steps) == (1, "full", 2 if arguments else 1000)
    images = 96 if arguments else 6000
    assert args.epochs == -(-args.max_steps * args.batch_size // images)  # the cosine ends where the run does
    scored = {folder_of(line): vars(parse_args(evaluate_layout.get_parser(), shlex.split(line)[2:]))
              for line in evaluations(lines)}  # fmt: skip
    for name, values in scored.items():
        assert values["resume"] == f"{values['output_dir'].removesuffix('/evaluation')}/checkpoint-last.pth"
        assert values["without_layout"] == (name == "text_only")
        same = values.keys() - {"output_dir", "resume", "name", "without_layout"}
        assert {key: values[key] for key in same} == {key: scored["full"][key] for key in same}


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="no_bias", STEPS="10")
    assert code == 7 and [folder_of(line) for line in trainings(lines)] == ["full", "no_rope", "no_bias"]
    code, lines = tree.run(STEPS="10", SEEDS="0 1", IMAGES="20")
    assert code == 0 and [folder_of(line) for line in trainings(lines)] == list(VARIANTS)[2:]
    assert all("--seeds 0 1 " in line and "--max_images 20 " in line for line in evaluations(lines))
    assert len(evaluations(lines)) == 6
    code, lines = tree.run(STEPS="10")
    assert code == 0 and trainings(lines) == evaluations(lines) == []
    assert lines[-1].startswith("-m scripts.mini.ablation_table --runs ")
    code, lines = tree.run(STEPS="20")  # another budget, other folders
    assert code == 0 and len(trainings(lines)) == 6


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    code, lines = script_tree(tmp_path / "tree").run("--fast")
    assert code == 2 and lines == []


# table


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def row(name: str, kind: str, value: float) -> dict[str, Any]:
    layout = {"mIoU": interval(value + 0.01), "SR50": interval(value + 0.02), "extra_rate": interval(value + 0.5)}
    return {"name": name, "kind": kind, "conditioned": {"AP50": interval(value)}, "layout": layout}


def results(name: str, value: float) -> dict[str, Any]:
    rows = [row("real images", "bound", 0.9), row(name, "model", value)]
    if name == "text_only":
        rows.append(row("no layout", "control", 0.2))
    return {
        "format": "structmar-eval-1",
        "profile": {"name": "mini", "hash": "abc"},
        "dataset": {"split": "val2017", "num_images": 500, "ids_hash": "def"},
        "detector": {"id": "1"},
        "sampling": {"cfg": 3.0},
        "seeds": [0, 1],
        "num_resamples": 500,
        "rows": rows,
    }


def write_results(root: Path, changes: dict[str, dict[str, Any]] | None = None) -> Path:
    for index, name in enumerate(VARIANTS):
        folder = root / name / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        content = copy.deepcopy(results(name, 0.5 + index / 100)) | (changes or {}).get(name, {})
        (folder / "results.json").write_text(json.dumps(content))
    return root


def test_table_by_hand(tmp_path: Path) -> None:
    lines = ablation_table(write_results(tmp_path)).splitlines()
    assert lines[0] == "| | AP50 | mIoU | SR50 | extra/image |"
    assert lines[2] == "| full | 50.0 [40.0, 60.0] | 51.0 [41.0, 61.0] | 52.0 [42.0, 62.0] | 1.00 [0.90, 1.10] |"
    assert lines[3].startswith("| without 2D RoPE | 51.0 ")
    assert lines[7].startswith("| caption only, no boxes | 20.0 ")  # its row without boxes, not the model's 0.55
    assert lines[8].startswith("| real images | 90.0 ")
    assert "mini (abc), 500 images of val2017 (ids def), seeds 0, 1" in lines[10] and "500 bootstrap" in lines[10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"cfg": 1.0}}, r"sampling differs: \{'cfg': 3.0\} in .*full.*, \{'cfg': 1.0\} in .*no_bias"),
        ({"seeds": [0]}, r"seeds differs: \[0, 1\] in .*, \[0\] in "),
        ({"format": "x"}, r"no_bias.*results.json has format 'x', expected 'structmar-eval-1'"),
        ({"rows": []}, r"no_bias.*results.json: expected one row 'model', found 0 among \[\]"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablation_table(write_results(tmp_path, {"no_bias": changes}))


def test_missing_evaluations_are_named(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "no_rope" / "evaluation" / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no_rope/evaluation/results.json does not exist"):
        ablation_table(tmp_path)
