"""Two processes (gloo) do what one does: gradients under DDP, steps and checkpoints under --fsdp, the main."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import main_mar
from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import Source, checkpoint_content, restore
from engine.data.inputs import StepInputs
from engine.train.optim import build_optimizer, clip_gradients
from engine.train.parallel import gathered, shard, unsharded, wrap
from engine.train.state import Position, TrainState
from engine.train.supervised import backward_pass
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from models.structmar import StructMAR, TrainingNoise
from tests.helpers.processes import assert_close, in_two_processes
from tests.helpers.tiny_run import argv, load_checkpoint, read_metrics, write_world
from tests.helpers.training import CONFIG, gradients, rows_of, rows_of_noise, tiny_inputs, tiny_model
from util.ema import Ema
from util.types import Category

CPU = torch.device("cpu")
IDENTITY = Identity(CONFIG, "vae", 0.5, "clip", (Category(1, "cat"), Category(2, "dog"), Category(3, "cow")))


# --- DDP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "text_layout", "text_proj"])
@pytest.mark.parametrize("dropped", [False, True])
def test_two_processes_give_the_gradients_of_one_with_the_double_batch(mode, dropped):
    inputs = tiny_inputs(8, dropped=dropped)
    model = tiny_model(mode)
    noise = model.sample_training_noise(8, torch.Generator().manual_seed(5), 0.7)
    backward_pass(model, inputs, noise, "fp32", 1, True)
    expected = gradients(model)

    def step(rank: int) -> dict[str, torch.Tensor]:
        """Two passes of two images each: the first without an exchange."""
        replica = tiny_model(mode)
        wrapped = wrap(replica, CPU, 2)
        for micro in range(2):
            rows = slice(4 * rank + 2 * micro, 4 * rank + 2 * micro + 2)
            part = rows_of_noise(noise, rows)
            backward_pass(wrapped, rows_of(inputs, rows), part, "fp32", 2, micro == 1)
        return gradients(replica)

    for found in in_two_processes(step):
        assert_close(found, expected)


def test_one_process_is_not_wrapped():
    model = tiny_model()
    assert wrap(model, CPU, 1) is model


# --- FSDP ----------------------------------------------------------------------------------------------------------


def train_state_of(model: StructMAR, world_size: int) -> TrainState:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(trainable, 1e-3, 0.02)
    return TrainState(model, wrap(model, CPU, world_size), trainable, optimizer, Ema(trainable, 0.9))


def steps_of(state: TrainState, rows: slice, num_steps: int, first: int = 0) -> list[torch.Tensor]:
    """Steps on rows of made-up batches of four; returns the gradient norms."""
    norms = []
    for number in range(first, first + num_steps):
        inputs = tiny_inputs(4, seed=number)
        noise = state.model.sample_training_noise(4, torch.Generator().manual_seed(number), 0.7)
        noise = rows_of_noise(noise, rows)
        backward_pass(state.wrapped, rows_of(inputs, rows), noise, "fp32", 1, True)
        norms.append(clip_gradients(state.trainable.values(), 0.5))
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update()
    return norms


@pytest.mark.parametrize("mode", ["full", "text_layout"])
def test_sharded_steps_and_checkpoints_are_those_of_one_process(mode):
    """Clipping by the global norm, AdamW and EMA on shards; the file continues in any number of processes."""
    whole = train_state_of(tiny_model(mode), 1)
    norms = steps_of(whole, slice(0, 4), 2)
    expected = checkpoint_content(whole, Position(0, 2, 2), mode, IDENTITY, {}, 4)
    expected = {name: {key: t.clone() for key, t in expected[name].items()} for name in ("model", "model_ema")}
    steps_of(whole, slice(0, 4), 1, first=2)

    def run(rank: int) -> dict[str, Any]:
        rows = slice(2 * rank, 2 * rank + 2)
        model = tiny_model(mode)
        shard(model, model.fsdp_units(), CPU, 2)
        state = train_state_of(model, 2)
        assert isinstance(state.wrapped, FSDPModule)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found_norms = steps_of(state, rows, 2)
        content = checkpoint_content(state, Position(0, 2, 2), mode, IDENTITY, {}, 4)
        everywhere = [content]
        dist.broadcast_object_list(everywhere)

        resumed_model = tiny_model(mode)
        resumed_model.load_state_dict(everywhere[0]["model"])
        shard(resumed_model, resumed_model.fsdp_units(), CPU, 2)
        resumed = train_state_of(resumed_model, 2)
        restore(resumed, Source("continue", Path("sharded.pth"), everywhere[0]))
        steps_of(resumed, rows, 1, first=2)
        return {
            "norms": {str(index): norm for index, norm in enumerate(found_norms)},
            "model": everywhere[0]["model"],
            "model_ema": everywhere[0]["model_ema"],
            "resumed": gathered(dict(resumed_model.state_dict())),
        }

    for found in in_two_processes(run):
        assert_close(found["norms"], {str(index): norm for index, norm in enumerate(norms)})
        assert_close(found["model"], expected["model"], rtol=1e-2)
        assert_close(found["model_ema"], expected["model_ema"], rtol=1e-2)
        assert_close(found["resumed"], whole.model.state_dict(), rtol=1e-2)


def test_accumulation_without_exchange_is_the_same_under_fsdp():
    inputs = tiny_inputs(8)
    model = tiny_model()
    noise = model.sample_training_noise(8, torch.Generator().manual_seed(5), 0.7)
    backward_pass(model, inputs, noise, "fp32", 1, True)
    expected = gradients(model)

    def step(rank: int) -> dict[str, torch.Tensor]:
        sharded = tiny_model()
        shard(sharded, sharded.fsdp_units(), CPU, 2)
        for micro in range(2):
            rows = slice(4 * rank + 2 * micro, 4 * rank + 2 * micro + 2)
            backward_pass(sharded, rows_of(inputs, rows), rows_of_noise(noise, rows), "fp32", 2, micro == 1)
        return gathered({name: p.grad for name, p in sharded.named_parameters() if p.grad is not None})

    for found in in_two_processes(step):
        assert_close(found, expected)


def low_precision_sample(model: StructMAR) -> torch.Tensor:
    """One image [1, C, h, w], on a copy with cast weights."""
    config = SamplingConfig(num_iter=2, num_sampling_steps=4, t_max=950)
    model.eval()
    latents = sample(model, config, [torch.Generator().manual_seed(3)], dtype=torch.bfloat16).latents
    model.train()
    return latents


def predict_all(model: StructMAR, inputs: StepInputs, noise: TrainingNoise) -> torch.Tensor:
    context = model.prepare(model.embed_conditions(4))
    return model.predict(model.patchify(inputs.latents), noise.mask.kept_ids(), context)


def test_a_sharded_model_samples_after_unsharding():
    def embed(rank: int) -> dict[str, torch.Tensor]:
        model = tiny_model()
        inputs = tiny_inputs(4)
        noise = model.sample_training_noise(4, torch.Generator().manual_seed(5), 0.7)
        expected = predict_all(model, inputs, noise)
        sampled = low_precision_sample(model)
        shard(model, model.fsdp_units(), CPU, 2)
        model(inputs.latents, noise, text=inputs.text, layout=inputs.layout)
        with unsharded(model), torch.no_grad():
            assert torch.equal(low_precision_sample(model), sampled)
            found = predict_all(model, inputs, noise)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return {"difference": (found - expected).abs().max()}

    for found in in_two_processes(embed):
        assert float(found["difference"]) < 1e-5


# --- the main ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.integration
@pytest.mark.parametrize("fsdp", [None, True])
def test_main_in_two_processes(world, fsdp):
    """Trains, previews, saves once, and continues in one process with the double batch."""
    output = f"two{fsdp}"
    preview = {"sample_freq": 2, "num_preview": 2, "num_iter": 2, "num_sampling_steps": 3}
    flags = argv(world, output, max_steps=2, log_freq=1, batch_size=2, fsdp=fsdp, train_mode="full", **preview)
    assert in_two_processes(lambda rank: main_mar.main(flags), join_group=False) == [0, 0]
    state = load_checkpoint(world, output)
    assert (state["step"], state["epoch"], state["global_batch"]) == (2, 1, 4)
    assert [line["step"] for line in read_metrics(world, output)] == [1, 2]
    assert (world / output / "samples" / "step-0000002.png").exists()
    main_mar.main(argv(world, output, max_steps=3, batch_size=4, train_mode="full"))
    assert load_checkpoint(world, output)["step"] == 3


@pytest.mark.integration
def test_ranks_see_different_images(world):
    """The mean loss of two processes differs from either's own draw: data and noise are keyed by rank."""
    seen = in_two_processes(lambda rank: _images_of(world, rank), join_group=False)
    assert len(seen[0]) == len(seen[1]) == 4
    assert not set(seen[0]) & set(seen[1])


def _images_of(world: Path, rank: int) -> list[int]:
    """Image ids of this rank's first epoch, recorded on their way into the model."""
    from engine.data.inputs import CocoInputs

    ids: list[int] = []
    make = CocoInputs.__call__

    def record(self: CocoInputs, batch: Any, *rest: Any) -> Any:
        ids.extend(batch.image_ids)
        return make(self, batch, *rest)

    CocoInputs.__call__ = record  # type: ignore[method-assign]
    main_mar.main(argv(world, "seen", max_steps=2, train_mode="text_proj"))
    return ids


def test_fsdp_without_torchrun_is_an_error(world):
    with pytest.raises(SystemExit, match="start with torchrun --nproc_per_node"):
        main_mar.main(argv(world, "alone", fsdp=True))
