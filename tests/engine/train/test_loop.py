"""The loop on a tiny model and made-up latents: gradients, schedule, accumulation, stops, bad values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import engine.train.supervised
from engine.data.inputs import StepInputs
from engine.train.meter import Meter
from engine.train.optim import LrSchedule, absolute_lr, build_optimizer, clip_gradients, parameter_groups
from engine.train.state import Course, Position
from engine.train.supervised import backward_pass
from tests.helpers.tiny_training import Stop, tiny_run
from tests.helpers.training import (
    gradients,
    rows_of,
    rows_of_noise,
    tiny_inputs,
    tiny_model,
)

# --- optimizer -----------------------------------------------------------------------------------------------------


def test_lr_by_hand():
    schedule = LrSchedule(lr=1.0, min_lr=0.1, warmup_epochs=2, epochs=6, kind="cosine")
    assert [schedule.at(e) for e in (0.5, 1, 2, 6)] == pytest.approx([0.25, 0.5, 1.0, 0.1])
    assert schedule.at(4) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.at(3) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    constant = LrSchedule(1.0, 0.1, 2, 6, "constant")
    assert [constant.at(e) for e in (1, 2, 5)] == [0.5, 1.0, 1.0]
    assert LrSchedule(1.0, 0.0, 0, 6, "constant").at(0) == 1.0


def test_blr_scales_with_the_images_of_a_step():
    assert absolute_lr(None, 1e-4, 512) == pytest.approx(2e-4)
    assert absolute_lr(3e-4, 1e-4, 512) == 3e-4


def test_what_decays():
    model = tiny_model()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain, decayed = parameter_groups(trainable, 0.02)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    names = {id(p): name for name, p in trainable.items()}
    decaying = {names[id(p)] for p in decayed["params"]}
    assert len(decaying) + len(plain["params"]) == len(trainable)
    assert "encoder_blocks.0.attn.qkv.weight" in decaying
    assert not any(name.startswith("diffloss.") or name.endswith("bias") or ".norm" in name for name in decaying)


def test_clipping_returns_the_norm_before():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert float(clip_gradients([parameter], 3.0)) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    parameter.grad = torch.full((4,), 3.0)
    assert float(clip_gradients([parameter], 0.0)) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(6.0)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer({}, 1e-3, 0.0)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "text_layout", "text_proj"])
@pytest.mark.parametrize("dropped", [False, True])
def test_every_trainable_parameter_gets_a_gradient(mode, dropped):
    """With dropped conditions too: DDP would wait forever for a parameter that takes no part in a step."""
    model = tiny_model(mode)
    inputs = tiny_inputs(4, dropped=dropped)
    noise = model.sample_training_noise(4, torch.Generator().manual_seed(5), 0.7)
    backward_pass(model, inputs, noise, "fp32", 1, True)
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_two_passes_of_four_are_one_of_eight():
    inputs = tiny_inputs(8)
    model = tiny_model()
    noise = model.sample_training_noise(8, torch.Generator().manual_seed(5), 0.7)
    whole = backward_pass(model, inputs, noise, "fp32", 1, True)
    expected = gradients(model)
    model.zero_grad()
    losses = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = rows_of_noise(noise, rows)
        losses.append(backward_pass(model, rows_of(inputs, rows), part, "fp32", 2, rows.stop == 8))
    assert sum(losses) / 2 == pytest.approx(float(whole), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_bf16_keeps_weights_and_gradients_in_fp32():
    model = tiny_model()
    noise = model.sample_training_noise(4, torch.Generator().manual_seed(5), 0.7)
    exact = backward_pass(model, tiny_inputs(4), noise, "fp32", 1, True)
    model.zero_grad()
    rough = backward_pass(model, tiny_inputs(4), noise, "bf16", 1, True)
    assert exact != rough
    assert float(rough) == pytest.approx(float(exact), rel=0.05)
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


# --- the loop ------------------------------------------------------------------------------------------------------


def test_epochs_end_at_whole_steps():
    position, course = Position(), Course(images=21, images_per_step=8, epochs=2)
    for _ in range(3):
        position = course.after_step(position)
    assert position == Position(epoch=1, step=3, images=8)


def test_loss_falls():
    tiny = tiny_run(num_batches=1, epochs=30, lr=5e-3, save_epochs=0, log_freq=30)
    model, inputs = tiny.run.state.model, tiny_inputs(4, 0)
    noise = model.sample_training_noise(4, torch.Generator().manual_seed(9), 0.7)

    def loss() -> float:
        with torch.no_grad():
            return float(model(inputs.latents, noise, text=inputs.text, layout=inputs.layout))

    before = loss()
    tiny.train()
    assert loss() < 0.8 * before


def test_when_it_saves_previews_and_logs(tmp_path):
    tiny = tiny_run(epochs=3, save_epochs=2, save_steps=5, preview_steps=6, preview_epochs=3, log_freq=4)
    assert tiny.train(folder=tmp_path) is None
    assert [p.step for p in tiny.saved] == [5, 8, 10, 12]  # 8: two epochs; 12: the end
    assert tiny.saved[-1] == Position(3, 12, 0)
    assert tiny.previews == [6, 12]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert '"step": 12' in lines[-1]
    assert '"epoch": 3.0' in lines[-1]


def test_the_last_interval_is_logged_too(tmp_path):
    tiny = tiny_run(max_steps=3, log_freq=2)
    tiny.train(folder=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_left_over_batches_are_left_out():
    tiny = tiny_run(num_batches=5, accum_iter=2, epochs=2)
    tiny.train()
    assert tiny.saved[-1] == Position(2, 4, 0)


def test_an_epoch_without_a_step_is_an_error():
    with pytest.raises(ValueError, match=r"an epoch has 16 images, fewer than the 20 of a step \(accum_iter=5\)"):
        tiny_run(accum_iter=5).train()


def test_a_finished_run_stays_as_it_is():
    tiny = tiny_run()
    before = {name: p.clone() for name, p in tiny.run.state.trainable.items()}
    assert tiny.train(Position(2, 8, 0)) is None
    assert all(torch.equal(p, before[name]) for name, p in tiny.run.state.trainable.items())


def test_a_signal_saves_in_the_middle_of_an_epoch():
    tiny, stop = tiny_run(), Stop()
    take = tiny.run.step.make_inputs

    def count(batch: Any, epoch: int, draws: torch.Generator) -> StepInputs:
        stop.signum = 15 if tiny.run.state.optimizer.state else None  # from the second step on
        return take(batch, epoch, draws)

    tiny.run.step.make_inputs = count
    assert tiny.train(stop=stop) == 15
    assert tiny.saved == [Position(0, 2, 8)]


def test_only_what_trains_changes():
    tiny = tiny_run(mode="text_layout", max_steps=2)
    before = {name: p.clone() for name, p in tiny.run.state.model.named_parameters()}
    tiny.train()
    changed = {name for name, p in tiny.run.state.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= set(tiny.run.state.trainable) == set(tiny.run.state.ema.state_dict())


def test_a_step_reads_nothing_back(monkeypatch):
    """No host sync: `.item()` and `.tolist()` wait for the device."""
    step = tiny_run().run.step

    def refuse(self: torch.Tensor) -> None:
        raise AssertionError("a step read a tensor back")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", refuse)
        patch.setattr(torch.Tensor, "tolist", refuse)
        step.take(Position(), iter([tiny_inputs(4)]))
    assert step.read()["loss"] > 0


# --- values that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "poison"), [("latents", "latents"), ("text", "text")])
def test_the_part_that_is_not_finite_is_named_and_not_saved(part, poison):
    tiny = tiny_run(log_freq=100, save_epochs=1)
    good = tiny.run.batches.inputs[2]
    if poison == "latents":
        bad = replace(good, latents=good.latents * math.nan)
    else:
        bad = replace(good, text=replace(good.text, pooled=good.text.pooled * math.inf))
    tiny.run.batches.inputs[2] = bad
    with pytest.raises(FloatingPointError, match=rf"{part} is not finite at step 2 on rank 0"):
        tiny.train()
    assert tiny.saved == []


def test_a_loss_that_is_not_finite_raises(monkeypatch):
    tiny = tiny_run(log_freq=3)

    def broken(*args: Any) -> torch.Tensor:
        loss = backward_pass(*args)
        return loss * math.inf if tiny.run.state.optimizer.state else loss

    monkeypatch.setattr(engine.train.supervised, "backward_pass", broken)
    with pytest.raises(FloatingPointError, match="loss is not finite at step 1 on rank 0"):
        tiny.train()


def test_meter_averages_and_starts_again():
    meter = Meter(torch.device("cpu"), rank=3)
    for value in (1.0, 2.0, 6.0):
        meter.add_loss(torch.tensor(value), step=0)
    meter.add_norm(torch.tensor(5.0), step=0)
    assert meter.read() == (3.0, 5.0)
    assert meter.read() == (0.0, 0.0)
    meter.add_norm(torch.tensor(math.nan), step=7)
    meter.add_norm(torch.tensor(math.nan), step=8)
    with pytest.raises(FloatingPointError, match="gradient norm is not finite at step 7 on rank 3"):
        meter.check()
