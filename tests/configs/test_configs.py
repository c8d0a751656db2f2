"""Every YAML in configs/ is parsed by what reads it; the stage files are the paper's commands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from engine.cli import validate_mars
from engine.cli.arguments import train_parser
from engine.cli.arguments_planner import check_planner_args, planner_parser
from engine.cli.arguments_rl import rl_parser
from engine.cli.build import model_config
from engine.cli.build_rl import build_estimator, grpo_config
from engine.cli.build_rl_parts import rl_train_config
from engine.cli.build_train import train_config
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.cli.sizes import head_of
from engine.eval.profiles import available_profiles, load_profile
from scripts import evaluate_layout, page, sample
from tests.helpers.paper_commands import STAGE_1, STAGE_2, STAGE_3, words
from util.config import parse_args, resolved_dict

ROOT = Path(__file__).resolve().parents[2]
EVERY = sorted((ROOT / "configs").glob("*.yaml"))
SAMPLE = [path for path in EVERY if path.stem.endswith("_sample")]
EVALUATE = [path for path in EVERY if path.stem.endswith("_eval")]
PROFILES = [path for path in EVERY if path.stem.startswith("eval_")]
GRADIENT = [path for path in EVERY if path.stem.endswith("stage3_gradient")]
MAIN_RL = [path for path in EVERY if "stage3" in path.stem and path not in GRADIENT]
PAGES = [path for path in EVERY if path.stem.endswith("page")]
PLANNER = [path for path in EVERY if path.stem.endswith("_planner")]
MARS = [path for path in EVERY if path.stem.endswith("_mars")]
OTHERS = SAMPLE + EVALUATE + PROFILES + MAIN_RL + GRADIENT + PLANNER + PAGES + MARS
MAIN_MAR = [path for path in EVERY if path not in OTHERS]


def parse(*argv: str) -> dict:
    return resolved_dict(parse_args(train_parser(), argv))


@pytest.mark.parametrize("path", MAIN_MAR, ids=lambda path: path.name)
def test_it_parses_and_its_sizes_fit(path):
    args = parse_args(train_parser(), ["--config", str(path)])
    config = model_config(args, num_categories=80, text_dim=64)
    assert math.prod(config.unit_grid()) >= sampling_config(args).num_iter

    assert train_config(args).epochs >= args.warmup_epochs


@pytest.mark.parametrize("path", MAIN_RL, ids=lambda path: path.name)
def test_settings_of_stage_3_parse_and_fit_together(path):
    args, _ = parse_sampling_args(rl_parser(), ["--config", str(path)], head_of=head_of, for_rollouts=True)
    assert model_config(args, num_categories=80, text_dim=64).num_tokens >= args.num_iter
    assert build_estimator(args, sampling_config(args)).num_masks <= args.num_iter
    assert grpo_config(args, total_updates=1).kl_coef > 0
    assert rl_train_config(args).epochs >= args.warmup_epochs
    assert args.detector_path != args.eval_detector


@pytest.mark.parametrize("path", GRADIENT, ids=lambda path: path.name)
def test_settings_of_the_reward_gradient_parse_and_fit_together(path):
    args, _ = parse_sampling_args(rl_parser(), ["--config", str(path)], head_of=head_of, for_rollouts=True)
    assert args.objective == "reward_gradient" and not sampling_config(args).is_guided
    assert model_config(args, num_categories=80, text_dim=64).num_tokens >= args.num_iter
    assert rl_train_config(args).epochs >= args.warmup_epochs
    assert args.anchor > 0 and args.reward_t_min < args.reward_t_max
    distilled = yaml.safe_load((path.parent / distill_file(path)).read_text())
    assert args.resume == f"{distilled['output_dir']}/checkpoint-last.pth" and args.model == distilled["model"]
    assert args.detector_path != args.eval_detector


def distill_file(path: Path) -> str:
    """Of the stage before."""
    return "mini_distill.yaml" if path.stem.startswith("mini") else "stage2_distill.yaml"


@pytest.mark.parametrize("path", SAMPLE, ids=lambda path: path.name)
def test_settings_of_the_sampler_parse(path):
    parse_args(sample.get_parser(), ["--config", str(path)])


@pytest.mark.parametrize("path", EVALUATE, ids=lambda path: path.name)
def test_settings_of_the_evaluation_parse(path):
    args = parse_args(evaluate_layout.get_parser(), ["--config", str(path)])
    evaluate_layout.check_args(args)
    assert load_profile(args.profile).name in available_profiles()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.name)
def test_profiles_of_the_evaluation_load_by_name(path):
    assert load_profile(path).name in available_profiles()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_settings_of_the_page_parse(path):
    page.check_args(parse_args(page.get_parser(), ["--config", str(path)]))


@pytest.mark.parametrize("path", PLANNER, ids=lambda path: path.name)
def test_settings_of_planners_parse(path):
    args = parse_args(planner_parser(None), ["--config", str(path)])
    check_planner_args(args)
    assert args.epochs >= args.warmup_epochs


@pytest.mark.parametrize("path", MARS, ids=lambda path: path.name)
def test_settings_of_mars_parse(path, monkeypatch):
    monkeypatch.setattr(validate_mars, "require_path", lambda *_: None)
    args, _ = validate_mars.parse_train_args(train_parser(), ["--config", str(path)])
    assert args.backbone == "mars" and train_config(args).epochs >= args.warmup_epochs


def test_there_is_something_to_parse():
    assert {path.name for path in MAIN_MAR} >= {
        "stage1_align.yaml", "stage2_sft.yaml", "mini_stage1.yaml", "mini_stage2.yaml",
    }  # fmt: skip
    assert {path.name for path in MARS} >= {"mini_mars.yaml"}
    assert {path.name for path in PAGES} >= {"page.yaml"}
    assert {path.name for path in PLANNER} >= {"coco_planner.yaml", "mini_planner.yaml"}
    assert {path.name for path in GRADIENT} == {"mini_stage3_gradient.yaml", "stage3_gradient.yaml"}
    assert {path.name for path in MAIN_RL} >= {"stage3_grpo.yaml", "mini_stage3.yaml"}


@pytest.mark.parametrize(("name", "command"), [("stage1_align", STAGE_1), ("stage2_sft", STAGE_2)])
def test_the_stage_files_are_the_papers_commands(name, command):
    assert parse("--config", str(ROOT / "configs" / f"{name}.yaml")) == parse(*words(command))


def test_the_stage_3_file_is_the_papers_command():
    args = parse_args(rl_parser(), ["--config", str(ROOT / "configs" / "stage3_grpo.yaml")])
    assert resolved_dict(args) == resolved_dict(parse_args(rl_parser(), words(STAGE_3)))


def test_the_mini_stages_differ_only_where_stages_do():
    one, two = (parse("--config", str(ROOT / "configs" / f"mini_stage{number}.yaml")) for number in (1, 2))
    same = ("model", "img_size", "vae_path", "clip_path", "coco_root", "coco_split", "max_objects", "min_area")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert two["resume"] == f"{one['output_dir']}/checkpoint-last.pth"
    assert (one["train_mode"], two["train_mode"]) == ("text_layout", "full")


def test_mini_stage_3_starts_where_stage_2_is_evaluated():
    three = resolved_dict(parse_args(rl_parser(), ["--config", str(ROOT / "configs" / "mini_stage3.yaml")]))
    two = parse("--config", str(ROOT / "configs" / "mini_stage2.yaml"))
    same = ("model", "img_size", "vae_path", "clip_path", "coco_root", "coco_split", "max_objects", "min_area")
    assert {name: three[name] for name in same} == {name: two[name] for name in same}
    evaluated = yaml.safe_load((ROOT / "configs" / "mini_eval.yaml").read_text())
    assert (three["resume"], three["detector_path"]) == (evaluated["resume"], evaluated["detector"])
    assert (three["cfg"], three["cfg_text"], three["cfg_layout"]) == (1, None, None)  # what elbo scores


def test_the_command_line_wins():
    path = str(ROOT / "configs" / "mini_stage1.yaml")
    assert parse("--config", path, "--batch_size", "3")["batch_size"] == 3
    assert parse("--config", path)["batch_size"] == yaml.safe_load(Path(path).read_text())["batch_size"]
