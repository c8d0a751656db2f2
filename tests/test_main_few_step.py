"""main_mar.py --train_mode few_step as a user meets it: what its weights say of themselves, stops, kills, exports, and
what is refused."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import main_mar
import main_rl
import scripts.compare_heads
import scripts.sample
from engine.checkpoint.files import read_identity
from engine.checkpoint.identity import Identity
from engine.checkpoint.load import export_weights, load_for_sampling
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.sample.pipeline import StructMARPipeline
from engine.train.supervised import SupervisedStep
from models.sampling.config import SamplingConfig
from models.sampling.few import few_sampling
from tests.helpers.eval_world import write_detector
from tests.helpers.runs import in_child, kill_in_call
from tests.helpers.tiny_run import argv, assert_same_run, load_checkpoint, write_world

TEACHER = SamplingConfig(
    num_iter=4, num_sampling_steps=3, cfg_text=3.0, cfg_layout=2.0, cfg_schedule="constant", temperature=0.9
)
GUIDED = {"cfg_text": 3.0, "cfg_layout": 2.0, "cfg_schedule": "constant", "num_iter": 4, "temperature": 0.9}
FEW = "diffloss.few."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 checkpoint that names guided sampling, in sft/, and one with a few-step head of it, in whole/."""
    root = write_world(tmp_path_factory.mktemp("few") / "world")
    main_mar.main(argv(root, "sft", train_mode="full", max_steps=1, log_freq=1, num_sampling_steps=3, **GUIDED))
    main_mar.main(flags(root, "whole"))
    return root


def flags(root: Path, output: str, **more: Any) -> list[str]:
    """Five steps of two passes each: two epochs of two steps and half of the third."""
    resume = root / "sft" / "checkpoint-last.pth"
    own = {"train_mode": "few_step", "resume": resume, "accum_iter": 2, "max_steps": 5, "log_freq": 1, "few_draws": 2}
    return argv(root, output, **own | more)


def weights(root: Path, output: str = "whole") -> Path:
    return root / output / "checkpoint-last.pth"


def identity(path: Path) -> Identity:
    found = read_identity(path)
    assert found is not None
    return found


# --- what the weights say and hold -----------------------------------------------------------------------------------


def test_weights_name_the_head_and_nothing_else_has_changed(world: Path) -> None:
    found = identity(weights(world))
    assert found.config == replace(identity(weights(world, "sft")).config, few_step_head=True)
    assert (found.stage, found.sampling, found.guidance) == ("few_step", few_sampling(TEACHER, 2), None)
    before, after = load_checkpoint(world, "sft"), load_checkpoint(world, "whole")
    assert set(after["model_ema"]) == {name for name in after["model"] if name.startswith(FEW)}
    for name, weight in {**before["model"], **before["model_ema"]}.items():
        assert torch.equal(after["model"][name], weight)
    moved = [name for name, weight in after["model"].items() if name.startswith(FEW) and _moved(after, name, weight)]
    assert f"{FEW}input_proj.weight" in moved and f"{FEW}final_layer.linear.weight" in moved


def _moved(after: dict[str, Any], name: str, weight: torch.Tensor) -> bool:
    return not torch.equal(weight, after["model"][name.replace(FEW, "diffloss.net.")])


def test_an_export_draws_as_the_checkpoint_does(world: Path, tmp_path: Path) -> None:
    exported = tmp_path / "few.safetensors"
    export_weights(weights(world), exported)
    one, other = load_for_sampling(weights(world)), load_for_sampling(exported)
    assert one.identity.sampling == other.identity.sampling
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], few_sampling(TEACHER, 2)),
        (["--head_evals", "1"], few_sampling(TEACHER, 1)),
        (["--speed", "fast"], few_sampling(TEACHER, 2)),
    ],
)
def test_programs_draw_with_the_head(world: Path, words: list[str], expected: SamplingConfig) -> None:
    parsed, _ = parse_sampling_args(scripts.sample.get_parser(), ["--resume", str(weights(world)), *words])
    unused = {"num_sampling_steps": 3, "num_sampling_steps_last": None, "uncond_refresh": 1}
    assert replace(sampling_config(parsed), **unused) == replace(expected, **unused)


def test_the_reverse_process_is_still_there(world: Path) -> None:
    words = ["--resume", str(weights(world)), "--head_evals", "none", "--cfg_text", "3", "--cfg_layout", "2"]
    parsed, _ = parse_sampling_args(scripts.sample.get_parser(), [*words, "--temperature", "0.9"])
    assert sampling_config(parsed) == TEACHER


def test_presets_use_the_head_where_the_weights_name_the_reverse_process(world: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.safetensors"
    export_weights(weights(world), named, sampling=TEACHER)

    def parsed(*words: str) -> SamplingConfig:
        return sampling_config(parse_sampling_args(scripts.sample.get_parser(), ["--resume", str(named), *words])[0])

    assert parsed() == TEACHER
    fast = parsed("--speed", "fast")
    assert (fast.head_evals, fast.cfg_text, fast.cfg_layout, fast.temperature) == (2, 1, 1, 1)
    assert parsed("--speed", "fast", "--cfg_text", "5").head_evals is None
    assert parsed("--speed", "fast", "--head_evals", "none").head_evals is None


def test_previews_are_drawn_with_the_head(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingConfig] = []
    draw = StructMARPipeline.draw

    def noting(pipeline: StructMARPipeline, scenes: Any, config: SamplingConfig, *rest: Any, **more: Any) -> Any:
        seen.append(config)
        return draw(pipeline, scenes, config, *rest, **more)

    monkeypatch.setattr(StructMARPipeline, "draw", noting)
    main_mar.main(flags(world, "seen", max_steps=1, sample_freq=1, num_preview=1, few_evals=4))
    assert seen == [few_sampling(TEACHER, 4)]


def test_stage_3_samples_with_the_head_and_leaves_it_as_it_is(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    categories = identity(weights(world)).categories
    write_detector(world / "detector.pth", categories)
    own = {"resume": weights(world), "detector_path": world / "detector.pth", "group_size": 2, "rl_masks": 1,
           "rl_draws": 2, "max_rl_steps": 1, "sample_freq": 0, "warmup_epochs": None, "few_step_head": True,
           "kl_coef": 0.0, "num_iter": 4}  # fmt: skip
    main_rl.main(argv(world, "rl", **own))
    before, after = load_checkpoint(world, "whole"), load_checkpoint(world, "rl")
    start = {**before["model"], **before["model_ema"]}
    assert all(torch.equal(after["model"][name], start[name]) for name in start if name.startswith(FEW))
    assert not any(name.startswith(FEW) for name in after["model_ema"])
    assert identity(weights(world, "rl")).sampling == few_sampling(TEACHER, 2)
    assert "has a few-step head, which stays as it is while the rest trains" in caplog.text
    assert "8 head calls one after the other" in caplog.text  # 4 iterations of 2 evaluations
    trajectory = own | {"rl_estimator": "trajectory", "rl_draws": None}
    said = refused(main_rl.main, argv(world, "refused", **trajectory))
    assert "(the trajectory estimator) need reverse steps" in said and "head_evals 2: take elbo" in said
    assert not (world / "refused").exists()


# --- stops and kills -------------------------------------------------------------------------------------------------


def test_n_and_n_steps_are_two_n_steps(world: Path) -> None:
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


def test_its_own_checkpoint_is_continued_with_its_teacher(world: Path) -> None:
    """The checkpoint names the head's options; what the teacher's are, it knows."""
    main_mar.main(flags(world, "own", resume=weights(world), max_steps=6))
    found = load_checkpoint(world, "own")
    assert (found["step"], found["teacher"]) == (6, TEACHER.to_dict())


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(main: Callable[[list[str]], Any], words: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    message = str(caught.value)
    assert message.count("\n") == 0
    return message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fsdp": True}, "--fsdp does not go with --train_mode few_step"),
        ({"prefix_k": 2}, "--prefix_k 2 does not go with few-step distillation"),
        ({"num_sampling_steps_last": 2}, "--num_sampling_steps_last 2 does not go with few-step distillation"),
        ({"text_drop_prob": 0.1}, "--text_drop_prob 0.1 does not go with --train_mode few_step"),
        ({"train_mode": "full", "few_step_head": True}, "--few_step_head does not go with --train_mode full"),
    ],
)
def test_flags_that_do_not_go_together(world: Path, more: dict[str, Any], message: str) -> None:
    said = refused(main_mar.main, flags(world, "refused", **more))
    assert message in said
    assert not (world / "refused").exists()


def test_weights_without_anything_to_draw(world: Path) -> None:
    said = refused(main_mar.main, flags(world, "refused", resume=world / "mar.safetensors"))
    assert "a few-step head is distilled from a trained checkpoint" in said


def test_another_teacher(world: Path) -> None:
    said = refused(main_mar.main, flags(world, "whole", max_steps=6, cfg_text=5.0))
    assert "has another teacher: cfg_text 5.0 instead of 3.0" in said


def test_other_stages_would_leave_the_head_behind(world: Path) -> None:
    words = argv(world, "refused", train_mode="full", resume=weights(world), max_steps=1)
    assert "takes --few_step_head" in refused(main_mar.main, words)
    assert "few_step_head True in the file, False here" in refused(main_mar.main, [*words, "--head_evals", "none"])


def test_guidance_beside_the_head(world: Path) -> None:
    words = ["--resume", str(weights(world)), "--prompt", "a dog", "--cfg", "3"]
    assert "--cfg_text 3 does not go with --head_evals 2" in refused(scripts.sample.main, words)


def test_evaluations_of_weights_without_the_head(world: Path) -> None:
    words = ["--resume", str(weights(world, "sft")), "--coco_root", str(world / "coco"), "--coco_split", "val2014"]
    words += ["--vae_path", str(world / "vae.ckpt"), "--clip_path", str(world / "clip"), "--num_iterations", "2"]
    said = refused(scripts.compare_heads.main, [*words, "--steps", "few:2"])
    assert "head_evals 2 needs a few-step head, and the model has none" in said
    named = [*words[:1], str(weights(world)), *words[2:], "--steps", "few:2"]
    assert "few evaluations are compared with the reverse process" in refused(scripts.compare_heads.main, named)


def test_few_evaluations_are_compared_with_the_teacher(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--resume", str(weights(world)), "--coco_root", str(world / "coco"), "--coco_split", "val2014"]
    words += ["--vae_path", str(world / "vae.ckpt"), "--clip_path", str(world / "clip"), "--num_images", "2"]
    words += ["--head_evals", "none", "--cfg_text", "3", "--cfg_layout", "2", "--temperature", "0.9"]
    words += ["--num_iterations", "2", "--num_draws", "2", "--full_steps", "3", "--steps", "3", "few:1", "few:4"]
    scripts.compare_heads.main(words)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| few")]
    assert [row.split("|")[2].strip() for row in rows] == ["4", "16"]
