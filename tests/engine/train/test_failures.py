"""What a run leaves that cannot go on: the last whole step, never a broken one; what the next log line counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data.inputs import StepInputs
from engine.train.profile import StepProfiler, profiled_steps
from engine.train.state import Position
from engine.train.supervised import SupervisedStep
from tests.helpers.processes import in_two_processes
from tests.helpers.rl_world import grpo_step
from tests.helpers.tiny_training import FakeBatches, Stop, Tiny, tiny_run
from tests.helpers.training import CPU, tiny_inputs
from util.distributed import DistInfo
from util.failures import RanksFailed
from util.logging import read_metrics
from util.output import OutputError


class BrokenPicture(FakeBatches):
    """The batch at `bad` of every epoch cannot be read."""

    bad = 2

    def of_epoch(self, epoch: int, start: int) -> Iterator[StepInputs]:
        for number, batch in enumerate(self.inputs):
            if number * self.global_batch >= start:
                if number == self.bad:
                    raise ValueError("cannot read image 21.jpg: it is cut off")
                yield batch


def with_broken_picture(**config: Any) -> Tiny:
    tiny = tiny_run(**({"save_epochs": 0} | config))
    tiny.run = replace(tiny.run, batches=BrokenPicture(tiny.run.batches.inputs))
    return tiny


@pytest.mark.parametrize(("accum_iter", "whole"), [(1, 2), (2, 1)])
def test_the_last_whole_step_is_saved_when_a_picture_cannot_be_read(accum_iter: int, whole: int) -> None:
    tiny, wanted = with_broken_picture(accum_iter=accum_iter), tiny_run(accum_iter=accum_iter, max_steps=whole)
    with pytest.raises(ValueError, match=r"cannot read image 21.jpg"):
        tiny.train()
    wanted.train()
    assert [position.step for position in tiny.saved] == [whole]
    for name, value in wanted.run.state.model.state_dict().items():
        assert torch.equal(value, tiny.run.state.model.state_dict()[name]), name


def test_nothing_is_saved_where_nothing_is_new() -> None:
    tiny = with_broken_picture(save_steps=2)
    with pytest.raises(ValueError, match="cannot read image"):
        tiny.train()
    assert [position.step for position in tiny.saved] == [2]
    again = with_broken_picture()
    with pytest.raises(ValueError, match="cannot read image"):
        again.train(Position(0, 2, 8))
    assert again.saved == []


def test_half_an_update_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, calls = tiny_run(save_epochs=0), []

    def out_of_memory(step: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(tiny.run.state.ema, "update", out_of_memory)  # after the weights have moved
    with pytest.raises(MemoryError):
        tiny.train()
    assert tiny.saved == []


def test_a_preview_that_cannot_be_written_costs_no_step() -> None:
    tiny = tiny_run(save_epochs=0, preview_steps=3)

    def full(step: int, writer: Any) -> None:
        raise OutputError("step-0000003.png cannot be written: No space left on device")

    tiny.run = replace(tiny.run, preview=full)
    with pytest.raises(OutputError):
        tiny.train()
    assert [position.step for position in tiny.saved] == [3]


def test_a_save_that_fails_is_tried_once_and_its_reason_is_told() -> None:
    tiny, tried = tiny_run(save_epochs=0, save_steps=2), []

    def full(position: Position) -> None:
        tried.append(position.step)
        raise OutputError("checkpoint-last.pth cannot be written: No space left on device")

    tiny.run = replace(tiny.run, save=full)
    with pytest.raises(OutputError, match="No space left"):
        tiny.train()
    assert tried == [2]


def test_the_first_reason_is_told_where_saving_fails_too(caplog: pytest.LogCaptureFixture) -> None:
    tiny = with_broken_picture()

    def full(position: Position) -> None:
        raise OutputError("checkpoint-last.pth cannot be written: No space left on device")

    tiny.run = replace(tiny.run, save=full)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="cannot read image"):
        tiny.train()
    assert "step 2 could not be saved: checkpoint-last.pth cannot be written: No space left on device" in caplog.text


def test_previews_come_before_saves() -> None:
    """A checkpoint stands for everything that was due before it."""
    tiny, order = tiny_run(save_steps=2, save_epochs=0, preview_steps=2, eval_steps=2, max_steps=2), []
    tiny.run = replace(
        tiny.run,
        preview=lambda step, writer: order.append(f"preview {step}"),
        evaluate=lambda step, writer: order.append(f"evaluate {step}"),
        save=lambda position: order.append(f"save {position.step}"),
    )
    tiny.train()
    assert order == ["evaluate 0", "evaluate 2", "preview 2", "save 2"]


# --- the open interval of the log ----------------------------------------------------------------------------------


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "images_per_second"} for line in read_metrics(folder)
    ]


@pytest.mark.parametrize("log_freq", [2, 3, 5])
@pytest.mark.parametrize("stop_after", [1, 2, 4, 7])
def test_a_run_that_stops_anywhere_logs_the_lines_of_one_that_does_not(
    tmp_path: Path, log_freq: int, stop_after: int
) -> None:
    whole, parts, stop = tiny_run(log_freq=log_freq), tiny_run(log_freq=log_freq), Stop()
    whole.train(folder=tmp_path / "whole")
    first, taken = parts.run.step, []

    def take_one_more(batch: Any, epoch: int, draws: torch.Generator) -> StepInputs:
        taken.append(epoch)
        stop.signum = 15 if len(taken) == stop_after else None
        return batch

    parts.run.step.make_inputs = take_one_more
    assert parts.train(stop=stop, folder=tmp_path / "parts") == 15
    second = SupervisedStep(first.config, first.state, lambda batch, epoch, draws: batch, CPU)
    second.reopen(first.open_interval())
    parts.run = replace(parts.run, step=second)
    parts.train_on(parts.saved[-1], tmp_path / "parts")
    assert timeless(tmp_path / "parts" / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_stage_3_hands_its_open_interval_on_without_its_speeds() -> None:
    def update(step: Any, number: int) -> None:
        step.take(Position(0, number, 2 * number), iter([tiny_inputs(2, number)]))

    whole, parts = grpo_step(None, "elbo"), grpo_step(None, "elbo")
    for number in range(2):
        update(whole, number)
    update(parts, 0)
    interval = parts.open_interval()
    assert not [name for name in interval if name.endswith("_seconds")]
    parts.read()
    parts.reopen(interval)
    update(parts, 1)
    found, wanted = parts.read(), whole.read()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert name.endswith("_seconds") or found[name] == wanted[name], name


def test_a_step_of_stage_3_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in what the guard hears: the step is taken again."""
    step, heard = grpo_step(None, "elbo"), []
    step.observers = [lambda rollouts, reward: heard.append(reward)]

    def lost(*_: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr(step, "optimizer_step", lost)
    with pytest.raises(OSError, match="gone"):
        step.take(Position(), iter([tiny_inputs(2)]))
    assert step.open_interval() == {} and heard == []


# --- several processes ---------------------------------------------------------------------------------------------


def test_one_process_that_cannot_read_ends_both_at_the_same_whole_step() -> None:
    def run(rank: int) -> dict[str, Any]:
        tiny = with_broken_picture() if rank == 1 else tiny_run(save_epochs=0)
        tiny.run = replace(tiny.run, dist=DistInfo(rank, 2, rank, torch.device("cpu")))
        try:
            tiny.train()
        except RanksFailed as error:
            return {"said": str(error), "saved": [position.step for position in tiny.saved]}
        return {}

    expected = {"said": "rank 1: cannot read image 21.jpg: it is cut off", "saved": [2]}
    assert in_two_processes(run) == [expected, expected]


# --- profile -------------------------------------------------------------------------------------------------------


def test_profiled_steps() -> None:
    assert list(profiled_steps("3", start=10)) == [12, 13, 14]
    assert list(profiled_steps("4:6", start=10)) == [4, 5]
    for text in ("", "0", "5:5", "6:4", "a", "-1", "1:2:3", "1.5"):
        with pytest.raises(ValueError, match="--profile_steps"):
            profiled_steps(text, start=0)


@pytest.mark.parametrize(("steps", "name"), [(range(1, 3), "steps-1-3"), (range(6, 99), "steps-6-8")])
def test_a_trace_of_the_steps_is_written_even_where_the_run_ends_before(
    tmp_path: Path, steps: range, name: str
) -> None:
    tiny = tiny_run()
    tiny.run = replace(tiny.run, profiler=StepProfiler(steps, tmp_path))
    tiny.train()
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]
    assert "aten::" in (tmp_path / f"{name}.json").read_text()
