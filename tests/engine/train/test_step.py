"""What a training step leaves out may not show in its gradients: visible tokens, repeated embeddings, frozen parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine.checkpoint.load import load_for_sampling
from engine.data.inputs import StepInputs
from engine.train.loop import TrainConfig
from engine.train.optim import build_optimizer
from engine.train.state import Position, TrainState
from engine.train.supervised import SupervisedStep, backward_pass
from models.blocks import attention
from models.heads.diffloss import DiffusionNoise
from models.heads.diffusion import add_noise, hybrid_loss
from models.masking import sample_token_mask
from models.rope import Rotation
from models.structmar import StructMAR, TrainingNoise, gather_tokens
from models.weights import select_trainable
from tests.conftest import ROOT
from tests.helpers.structured import generator, some_layout, some_text
from util.distributed import DistInfo
from util.ema import Ema

BATCH, COPIES = 2, 3


@pytest.fixture(scope="module")
def trained() -> StructMAR:
    model = load_for_sampling(ROOT / "pretrained_models/mini/structmar_mini_stage2.safetensors").model.train()
    model.config = replace(model.config, diffusion_batch_mul=COPIES)
    return model


@pytest.fixture
def model(trained: StructMAR) -> Iterator[StructMAR]:
    select_trainable(trained, "full")
    yield trained
    trained.zero_grad()


def inputs_of(model: StructMAR) -> StepInputs:
    config = model.config
    side = config.img_size // config.vae_stride
    latents = torch.randn(BATCH, config.vae_embed_dim, side, side, generator=generator(1))
    return StepInputs(latents, text=some_text(config.text_dim), layout=some_layout(config.max_objects))


def gradients(model: StructMAR) -> dict[str, Tensor]:
    """Those of the last pass, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_with_all_tokens(model: StructMAR, inputs: StepInputs, mask: Any, noise: DiffusionNoise) -> Tensor:
    """MAR's way: the head sees every token of every copy, and those that are not masked are weighted with 0."""
    tokens = model.patchify(inputs.latents)
    conditions = model.embed_conditions(BATCH, text=inputs.text, layout=inputs.layout)
    z = model.predict(tokens, mask.kept_ids(), model.prepare(conditions)).flatten(0, 1).repeat(COPIES, 1)
    target = tokens.flatten(0, 1).repeat(COPIES, 1)
    tables, net = model.diffloss.tables_at(noise.timesteps), model.diffloss.net
    x = add_noise(target, noise.noise, tables)
    condition, output = net.time_embed(noise.timesteps) + net.cond_embed(z), net.input_proj(x)
    for layer in net.layers():
        output = layer(output, layer.modulation(condition))
    losses = hybrid_loss(target, x, noise.noise, output, noise.timesteps, tables)
    weights = mask.masked.flatten().repeat(COPIES)
    return (losses * weights).sum() / weights.sum()


def test_masked_only_head_has_the_gradients_of_the_full_one(model: StructMAR) -> None:
    inputs = inputs_of(model)
    mask = sample_token_mask(BATCH, model.config.num_tokens, 0.5, generator(2))
    everything = model.diffloss.sample_noise(COPIES * BATCH * model.config.num_tokens, generator(3))

    def masked(rows: Tensor) -> Tensor:
        by_image = rows.view(COPIES * BATCH, model.config.num_tokens, -1)
        return gather_tokens(by_image, mask.masked_ids().repeat(COPIES, 1)).flatten(0, 1)

    noise = TrainingNoise(mask, DiffusionNoise(masked(everything.timesteps)[:, 0], masked(everything.noise)))
    full = loss_with_all_tokens(model, inputs, mask, everything)
    full.backward()
    expected = gradients(model)
    loss = backward_pass(model, inputs, noise, "fp32", 1, True)
    torch.testing.assert_close(loss, full.detach(), rtol=1e-5, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_timesteps_are_embedded_once_each(model: StructMAR) -> None:
    """With more rows than timesteps: same values, same gradients."""
    net = model.diffloss.net
    timesteps = torch.randint(0, 1000, (1500,), generator=generator(4))
    weights = torch.randn(1500, net.input_proj.out_features, generator=generator(5))
    results = []
    for embed in (net.time_embed, net.embed_times):
        times = embed(timesteps)
        results.append((times, *torch.autograd.grad(times, net.time_embed.parameters(), weights)))
    for once, every in zip(*results, strict=True):
        torch.testing.assert_close(once, every, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.embed_times(timesteps)
    assert counter.get_total_flops() == 1000 * 2 * sum(p.numel() for p in net.time_embed.parameters() if p.dim() == 2)


def flops_and_gradients(model: StructMAR, mode: str) -> tuple[int, set[str]]:
    select_trainable(model, mode)
    noise = model.sample_training_noise(BATCH, generator(6), 0.7)
    with FlopCounterMode(display=False) as counter:
        backward_pass(model, inputs_of(model), noise, "fp32", 1, True)
    return counter.get_total_flops(), set(gradients(model))


def test_stage_1_computes_no_gradient_of_a_frozen_weight(model: StructMAR) -> None:
    full, _ = flops_and_gradients(model, "full")
    aligned, names = flops_and_gradients(model, "text_layout")
    assert aligned < 0.75 * full
    owners = {name.split(".")[0] for name in names if "_blocks." not in name}
    assert owners == {"layout_embed", "text_null", "text_pool_proj"}
    assert {name.split(".")[2] for name in names if "_blocks." in name and "rope_strength" not in name} == {"cross"}
    assert sum("rope_strength" in name for name in names) in (0, model.config.encoder_depth * 2)


class Operations(TorchDispatchMode):
    """Notes every operation; none may wait for the device: read a value, or make a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"), name
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(model: StructMAR, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = TrainState(model, model, trainable, build_optimizer(trainable, 0.0, 0.0), Ema(trainable, 0.9))
    drawn = model.sample_training_noise(BATCH, generator(7), 0.7)  # on the host
    monkeypatch.setattr(model, "sample_training_noise", lambda *_: drawn)
    config = TrainConfig(seed=1, epochs=1, precision=precision)
    dist = DistInfo(0, 1, 0, torch.device("cpu"))
    step = SupervisedStep(config, state, lambda batch, epoch, draws: batch, dist)
    batches = iter([inputs_of(model)])
    with Operations() as operations:
        step.take(Position(), batches)
    assert {"_fused_adamw_", "_foreach_lerp_", "_foreach_norm"} <= operations.seen


def test_bf16_gradients_point_where_fp32_ones_do(model: StructMAR) -> None:
    noise = model.sample_training_noise(BATCH, generator(8), 0.7)
    inputs = inputs_of(model)
    exact = backward_pass(model, inputs, noise, "fp32", 1, True)
    expected = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
    rough = backward_pass(model, inputs, noise, "bf16", 1, True)
    found = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
    assert float(rough) == pytest.approx(float(exact), rel=0.01)
    assert F.cosine_similarity(found, expected, dim=0) > 0.99


BIAS = torch.zeros(2, 1, 7, 5).masked_fill(torch.arange(5) == 3, -torch.inf)
VALID = torch.tensor([[True, True, False, True, False], [True] * 5])[:, None, None]


@pytest.mark.parametrize("mask", [None, BIAS, VALID], ids=["none", "bias", "valid"])
def test_attention_in_bf16(mask: Tensor | None) -> None:
    """On a CPU it is written out; the fused kernel in float64 is the reference, for values and gradients."""
    draws = generator(9)
    rows = partial(torch.randn, generator=draws, dtype=torch.float64)
    exact = [rows(2, 4, length, 8).bfloat16().double().requires_grad_() for length in (7, 5, 5)]
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    weights = rows(2, 4, 7, 8).bfloat16()

    def as_type(dtype: torch.dtype) -> Tensor | None:
        return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)

    wanted = F.scaled_dot_product_attention(*exact, attn_mask=as_type(torch.float64))
    found = attention(*rough, as_type(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    pairs = zip(
        (found, *torch.autograd.grad(found, rough, weights)),
        (wanted, *torch.autograd.grad(wanted, exact, weights.double())),
        strict=True,
    )
    for ours, reference in pairs:
        assert (ours.double() - reference).norm() < 0.02 * reference.norm()


def test_a_rotation_is_written_out_pair_by_pair() -> None:
    """Values, and gradients of what is turned and of the strength. In bfloat16 only the result is rounded."""
    draws = generator(10)
    x = torch.randn(2, 3, 4, 8, generator=draws, requires_grad=True)
    strength, angles = torch.tensor([0.7], requires_grad=True), torch.rand(1, 4, 4, generator=draws)
    weights = torch.randn(2, 3, 4, 8, generator=draws)
    cos, sin = (angles * strength).cos()[:, None], (angles * strength).sin()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    wanted = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    rotation = Rotation.by(angles * strength)
    found = rotation(x)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(turned, (x, strength), weights) for turned in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(rotation(x.bfloat16()), rotation(x.bfloat16().float()).bfloat16())
