"""main_mar.py --train_mode distill as a user meets it: what its weights say of themselves, stops and kills, and what is
refused of weights that have guidance in them."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import main_mar
import main_rl
import scripts.compare_heads
import scripts.evaluate_layout
import scripts.page
import scripts.sample
from engine.checkpoint.files import read_identity
from engine.checkpoint.identity import Identity
from engine.checkpoint.load import export_weights
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.page.studio import Studio
from engine.sample.pipeline import StructMARPipeline
from engine.train.supervised import SupervisedStep
from models.sampling.config import SamplingConfig
from tests.helpers.eval_world import write_detector
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import in_child, kill_in_call
from tests.helpers.tiny_run import argv, assert_same_run, load_checkpoint, read_metrics, write_world

GUIDED = {"cfg_text": 3.0, "cfg_layout": 2.0, "cfg_schedule": "constant", "num_iter": 4}
QUICK = {"num_iter": 2, "num_sampling_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 checkpoint that names guided sampling, in sft/, and one distilled from it, in whole/."""
    root = write_world(tmp_path_factory.mktemp("distill") / "world")
    main_mar.main(argv(root, "sft", train_mode="full", max_steps=1, log_freq=1, num_sampling_steps=3, **GUIDED))
    main_mar.main(flags(root, "whole"))
    return root


def flags(root: Path, output: str, **more: Any) -> list[str]:
    """Five steps of two passes each: two epochs of two steps and half of the third."""
    own = {
        "train_mode": "distill",
        "resume": root / "sft" / "checkpoint-last.pth",
        "accum_iter": 2,
        "attn_dropout": 0.1,
        "max_steps": 5,
        "log_freq": 1,
    }
    return argv(root, output, **own | more)


def weights(root: Path, output: str = "whole") -> Path:
    return root / output / "checkpoint-last.pth"


# --- what it makes ---------------------------------------------------------------------------------------------------


def test_its_weights_say_that_they_are_guided_and_are_sampled_without(world: Path) -> None:
    identity = read_identity(weights(world))
    assert identity is not None and identity.sampling is not None
    assert (identity.stage, identity.guidance) == ("distill", (3.0, 2.0))
    assert not identity.sampling.is_guided
    assert (identity.sampling.num_iter, identity.sampling.num_sampling_steps) == (4, 3)


def test_its_log_says_what_it_costs(world: Path) -> None:
    log = (world / "whole" / "log.txt").read_text()
    assert "an update, per process: 4 images, no rollout; " in log and " student + " in log
    assert "the run, per process: 5 updates, 20 images, " in log


def test_nothing_is_dropped_and_all_states_are_trained_on(world: Path) -> None:
    args = load_checkpoint(world, "whole")["args"]
    assert (args["label_drop_prob"], args["text_drop_prob"], args["mask_schedule"]) == (0, 0, "linear")


def test_the_teacher_is_kept_as_far_as_the_student_can_leave_it(world: Path) -> None:
    teacher, state = load_checkpoint(world, "sft"), load_checkpoint(world, "whole")
    assert set(state["reference"]) == set(state["model_ema"])
    assert all(torch.equal(teacher["model_ema"][name], each) for name, each in state["reference"].items())
    moved = [name for name, each in state["reference"].items() if not torch.equal(state["model"][name], each)]
    assert len(moved) > 0.9 * len(state["reference"])


def test_the_first_loss_is_the_teachers_distance_to_itself_under_guidance(world: Path) -> None:
    """Without much guidance there is little to learn."""
    main_mar.main(flags(world, "little", max_steps=1, cfg_text=1.01, cfg_layout=1.01))
    assert read_metrics(world, "little")[0]["loss"] < 0.01 * read_metrics(world, "whole")[0]["loss"]


def test_previews_are_drawn_without_guidance(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingConfig] = []
    draw = StructMARPipeline.draw

    def noting(pipeline: StructMARPipeline, scenes: Any, config: SamplingConfig, *rest: Any, **more: Any) -> Any:
        seen.append(config)
        return draw(pipeline, scenes, config, *rest, **more)

    monkeypatch.setattr(StructMARPipeline, "draw", noting)
    main_mar.main(flags(world, "seen", max_steps=1, sample_freq=1, num_preview=1))
    assert [(config.num_iter, config.is_guided) for config in seen] == [(4, False)]


# --- stops, kills and processes --------------------------------------------------------------------------------------


def test_n_and_n_steps_are_two_n_steps(world: Path) -> None:
    """Stopped in the middle of an epoch."""
    main_mar.main(flags(world, "parts", max_steps=3))
    main_mar.main(flags(world, "parts"))
    assert_same_run(world, "parts", "whole")


def test_killed_in_the_middle_of_a_step(world: Path) -> None:
    def run() -> int:
        kill_in_call(SupervisedStep, "take", 3)
        return main_mar.main(flags(world, "killed", save_freq_steps=1))

    assert in_child(run) == -signal.SIGKILL
    main_mar.main(flags(world, "killed"))
    assert_same_run(world, "killed", "whole")


def test_its_own_checkpoint_is_continued_without_naming_the_scales(world: Path) -> None:
    """The checkpoint names sampling without guidance; what it is trained towards, it knows."""
    main_mar.main(flags(world, "target", resume=weights(world), max_steps=6))
    assert read_identity(weights(world, "target")).guidance == (3.0, 2.0)  # type: ignore[union-attr]
    assert load_checkpoint(world, "target")["step"] == 6


@pytest.mark.integration
def test_two_processes_sharded(world: Path) -> None:
    runs = {name: flags(world, name, max_steps=1, fsdp=name == "sharded" or None) for name in ("sharded", "replicated")}
    for run in runs.values():
        in_two_processes(lambda _, run=run: main_mar.main(run), join_group=False)
    one, other = load_checkpoint(world, "sharded"), load_checkpoint(world, "replicated")
    for part in ("model", "model_ema", "reference"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.allclose(one[part][name], other[part][name], atol=2e-5) for name in one[part])


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(main: Callable[[list[str]], Any], words: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    message = str(caught.value)
    assert message.count("\n") == 0
    return message


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"text_drop_prob": 0.1}, "--text_drop_prob 0.1 does not go with --train_mode distill"),
    ({"label_drop_prob": 0.1}, "--label_drop_prob 0.1 does not go with --train_mode distill"),
    ({"cfg": 1.0}, "--cfg_text 1 and --cfg_layout 1 are no guidance: there is nothing to distil"),
    ({"layout_scale": 0.5}, "--layout_scale 0.5 does not go with guidance distillation"),
    ({"prefix_k": 1}, "--prefix_k 1 does not go with guidance distillation"),
    ({"num_iter": 17}, "num_iter must lie between 1 and the number of tokens, 16, got 17"),
    ({"resume": None}, "guidance is distilled from a stage-2 checkpoint"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=lambda each: str(each)[:40])
def test_mistakes(world: Path, mistake: dict[str, Any], message: str) -> None:
    assert message in refused(main_mar.main, flags(world, "refused", **mistake))
    assert not (world / "refused").exists()


def test_no_other_stage_undoes_it_and_nobody_distils_twice(world: Path) -> None:
    begins = f"{weights(world)} has guidance trained into its weights"
    for mode, ends in (("full", "which stage 'full' would undo"), ("distill", "start from the weights of before")):
        words = argv(world, "refused", train_mode=mode, resume=export(world), cfg=2.0)
        said = refused(main_mar.main, words)
        assert "(text 3, layout 2)" in said
        assert ends in said
    said = refused(main_mar.main, argv(world, "refused", train_mode="full", resume=weights(world)))
    assert begins in said
    said = refused(main_mar.main, flags(world, "whole", cfg_text=5.0))
    assert "towards guidance with text 3, layout 2, this run has text 5, layout 2" in said
    assert not (world / "refused").exists()


PROGRAMS: dict[ModuleType, list[str]] = {
    scripts.sample: [],
    scripts.evaluate_layout: ["--profile", "mini"],
    scripts.page: [],
    scripts.compare_heads: [],
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda module: module.__name__)
@pytest.mark.parametrize(("flag", "named"), [("--cfg", "--cfg_text"), ("--cfg_layout", "--cfg_layout")])
def test_no_command_guides_it_twice(world: Path, program: ModuleType, flag: str, named: str) -> None:
    words = [*PROGRAMS[program], "--resume", str(weights(world))]
    expected = f"{weights(world)} has guidance trained into its weights (text 3, layout 2) and is sampled without any: "
    with pytest.raises(ValueError, match=re.escape(f"{expected}{named} must be 1, got 4")):
        parse_sampling_args(program.get_parser(), [*words, flag, "4"])
    args, _ = parse_sampling_args(program.get_parser(), words)
    assert not sampling_config(args).is_guided


def test_it_is_never_guided_twice(world: Path) -> None:
    """By a call, on the page, by what an export names."""
    pipe = StructMARPipeline.from_checkpoint(weights(world), world / "vae.ckpt", world / "clip")
    with pytest.raises(ValueError, match="guidance_scale must be 1, got 7.5"):
        pipe("a dog", guidance_scale=7.5)
    with pytest.raises(ValueError, match="cfg_text must be 1, got 2"):
        pipe.draw([], SamplingConfig(num_iter=2, cfg_text=2.0), [])
    with pytest.raises(ValueError, match="cfg_text must be 1, got 2"):
        export_weights(weights(world), world / "other.safetensors", sampling=SamplingConfig(cfg_text=2.0))
    studio = Studio(pipe, pipe.own_sampling, (), {})
    assert studio.facts()["has_guidance"] is False
    wish = {"scene": {"prompt": "a dog", "objects": []}, "options": {"cfg_layout": 2.0}}
    with pytest.raises(ValueError, match="cfg_layout must be 1, got 2"):
        studio.read(wish)


@pytest.mark.parametrize("guidance", ["3", "[3.0]", "[3.0, true]", "[3.0, 1000.0]", "[NaN, 2.0]", "{}"])
def test_scales_that_are_none_are_refused(world: Path, guidance: str) -> None:
    metadata = read_identity(weights(world)).to_metadata() | {"guidance": guidance}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"file\.safetensors has malformed metadata: guidance must be"):
        Identity.from_metadata(metadata, "file.safetensors")


# --- where it goes on ------------------------------------------------------------------------------------------------


def export(world: Path) -> Path:
    path = world / "distilled.safetensors"
    export_weights(weights(world), path)
    return path


def test_exports_and_folders_keep_it(world: Path, tmp_path: Path) -> None:
    exported = read_identity(export(world))
    assert exported is not None and exported.guidance == (3.0, 2.0)
    assert Identity.from_metadata(exported.to_metadata(), "file") == exported
    pipe = StructMARPipeline.from_checkpoint(export(world), world / "vae.ckpt", world / "clip")
    pipe.save_pretrained(tmp_path / "folder")
    again = StructMARPipeline.from_pretrained(tmp_path / "folder")
    assert again.identity is not None and again.identity.guidance == (3.0, 2.0)
    assert len(again("a dog", num_inference_steps=2, num_diffusion_steps=2, seed=0).images) == 1


def test_stage_3_goes_on_from_it_and_keeps_it(world: Path) -> None:
    names = tuple(category for category in read_identity(weights(world)).categories)  # type: ignore[union-attr]
    write_detector(world / "detector.pth", names)
    own = {"resume": export(world), "detector_path": world / "detector.pth", "group_size": 2, "rl_masks": 1,
           "rl_draws": 2, "max_rl_steps": 1, "sample_freq": 0, "warmup_epochs": None, **QUICK}  # fmt: skip
    main_rl.main(argv(world, "rl", **own))
    identity = read_identity(weights(world, "rl"))
    assert identity is not None and identity.guidance == (3.0, 2.0)
    said = refused(main_rl.main, argv(world, "refused", **own, cfg_text=2.0))
    assert "(text 3, layout 2) and is sampled without any: --cfg_text must be 1, got 2" in said
    assert not (world / "refused").exists()
