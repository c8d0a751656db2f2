"""The sampler computes once what does not change: nothing of that may show. The reference is `plain_sampler`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models.heads.diffusion_sampler
from models.heads.diffusion import reverse_steps
from models.heads.diffusion_sampler import DiffusionStep, ReverseOptions
from models.heads.packed import can_pack
from models.inference import inference_copy
from models.masking import cosine_masked_counts, mask_from_orders, sample_orders
from models.rope import Rotation
from models.sampling.config import SamplingConfig
from models.sampling.guidance import Branches, embed_branches
from models.structmar import StructMAR, gather_tokens
from tests.helpers import reference
from tests.helpers.plain_model import plain_predict
from tests.helpers.plain_sampler import plain_reverse_process
from tests.helpers.sampled import QUICK, conditions, sampled, world
from tests.helpers.sampling import run_unmask
from tests.helpers.structured import generator, structured_model
from tests.helpers.tiny import shaken
from util.types import LayoutBatch, TextContext

GUIDANCE = [
    {},
    {"cfg_text": 3.0, "cfg_layout": 3.0},
    {"cfg_layout": 3.0},
    {"cfg_text": 1.5, "cfg_layout": 3.0},
]  # 1, 2, 2 and 3 branches


def head_step(model: StructMAR, config: SamplingConfig, dtype: torch.dtype = torch.float32) -> DiffusionStep:
    """The head, prepared to draw with these options."""
    cast_model = inference_copy(model, dtype)
    options = config.head_options(0)
    assert isinstance(options, ReverseOptions)
    return model.diffloss.sampler(cast_model.diffloss, None).at(options)


def guide_of(branches: Branches) -> partial[Tensor]:
    return partial(branches.combine, w_text=1.5, w_layout=3.0)


def assert_same(
    model: StructMAR,
    config: SamplingConfig,
    text: TextContext | None,
    layout: LayoutBatch | None,
    labels: Tensor | None = None,
) -> None:
    expected, found = (sampled(model, config, text, layout, labels, plain=plain)[0] for plain in (True, False))
    assert float(expected.std()) > 0.1
    assert reference.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["tiny", "mini"])
@pytest.mark.parametrize("guidance", GUIDANCE, ids=str)
def test_the_whole_sampler(name: str, guidance: dict[str, float]) -> None:
    model = world(name)
    assert_same(model, replace(QUICK, **guidance), *conditions(model))


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_the_whole_schedule(name: str) -> None:
    """From t = 999, whose step multiplies rounding errors of eps by hundreds (`models/heads/diffusion.py`)."""
    model = world(name)
    config = replace(QUICK, num_sampling_steps=20, t_max=None, cfg_text=1.5, cfg_layout=3.0)
    expected, found = (sampled(model, config, *conditions(model), plain=plain)[0] for plain in (True, False))
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-6


@pytest.mark.parametrize("given", ["nothing", "text", "layout", "labels", "labels and text", "text of one image"])
def test_conditions_that_are_absent(given: str) -> None:
    model = world("tiny")
    text, layout = conditions(model)
    text = text.dropped(torch.tensor([True, False])) if "one" in given else text
    labels = torch.tensor([3, -1]) if "labels" in given else None
    config = replace(QUICK, cfg_text=2.0, cfg_layout=2.0)
    assert_same(model, config, text if "text" in given else None, layout if given == "layout" else None, labels)


def test_other_architectures() -> None:
    """Bare MAR; no RoPE; full RoPE; cross-attention in every second block; no layout bias."""
    assert_same(world("mar"), replace(QUICK, cfg_text=2.0), None, None, torch.tensor([3, 5]))
    state = structured_model().state_dict()
    for changes in ({"rope_mode": "off"}, {"rope_mode": "full"}, {"cross_attn_every": 2}, {"cross_attn_every": 0},
                    {"layout_bias_encoder": False}, {"layout_bias_decoder": False}):  # fmt: skip
        model = StructMAR(replace(world("tiny").config, **changes)).eval()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        assert_same(model, replace(QUICK, cfg_text=1.5, cfg_layout=3.0), *conditions(model))


def test_options_of_the_reverse_process() -> None:
    model = world("mini")
    every = (
        {"temperature": 0.7, "cfg_schedule": "constant", "cfg_layout": 2.0},
        {"temperature": 0.0, "clip_x0": 5.0},
        {"num_sampling_steps": 1},
        {"num_sampling_steps": 3, "num_iter": 1},
    )
    for options in every:
        assert_same(model, replace(QUICK, **options), *conditions(model))


@pytest.mark.parametrize("guidance", [GUIDANCE[0], GUIDANCE[3]], ids=str)
def test_traces(guidance: dict[str, float]) -> None:
    model = world("mini")
    config = replace(QUICK, **guidance)
    expected, found = (sampled(model, config, *conditions(model), record=True, plain=plain) for plain in (True, False))
    assert expected[1] is not None and found[1] is not None
    assert reference.relative_error(found[1].states, expected[1].states) < 1e-5
    torch.testing.assert_close(found[1].log_probs, expected[1].log_probs, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], sampled(model, config, *conditions(model))[0])  # recording changes nothing


def test_bf16_is_close() -> None:
    """To float32, and on the whole about as close as the plain sampler under autocast."""
    model, errors = world("mini"), []
    for options in ({}, {"t_max": None}, {"cfg_text": 3.0, "cfg_layout": 3.0}, GUIDANCE[3]):
        config = replace(QUICK, num_iter=2, **options)
        exact = sampled(model, config, *conditions(model))[0]
        found = sampled(model, config, *conditions(model), dtype=torch.bfloat16)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cast = sampled(model, config, *conditions(model), plain=True)[0]
        assert found.dtype == torch.float32
        errors.append([float((tokens - exact).square().mean() / exact.square().mean()) for tokens in (found, cast)])
        assert 0 < errors[-1][0] < 1e-2
    error, of_autocast = (sum(column) for column in zip(*errors, strict=True))
    assert error < 1.5 * of_autocast


def test_bf16_weights() -> None:
    """A copy, with the linears of all blocks and adaLN cast, and the head's norms; all else is the model's own."""
    model = world("mini")
    copy = inference_copy(model, torch.bfloat16)
    assert inference_copy(model, torch.float32) is model
    linears = {f"{name}.{leaf}" for name, module in model.named_modules() if isinstance(module, nn.Linear)
               for leaf in ("weight", "bias")}  # fmt: skip
    parts = ("encoder_blocks.", "decoder_blocks.", "decoder_embed.", "diffloss.net.res_blocks.")
    expected = {name for name in linears if name.startswith(parts) or "final_layer.adaLN" in name}
    expected |= {name for name, _ in model.named_parameters() if ".in_ln." in name}
    weights, copies = dict(model.named_parameters()), dict(copy.named_parameters())
    assert weights.keys() == copies.keys()
    assert {name for name, weight in copies.items() if weight.dtype == torch.bfloat16} == expected
    assert all(copies[name].data_ptr() == weights[name].data_ptr() for name in weights.keys() - expected)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_a_wide_head_is_packed(dtype: torch.dtype, tolerance: float) -> None:
    """The same output with a kernel less per block; the model keeps its own weights."""
    model = StructMAR(replace(world("tiny").config, diffloss_w=512)).eval()
    shaken(model.diffloss, 1, std=0.05)
    assert can_pack(512, dtype, torch.device("cpu"))  # oneDNN is there
    packed = inference_copy(model, dtype).diffloss.net
    assert packed is not model.diffloss.net and not packed.state_dict().keys() >= model.diffloss.net.state_dict().keys()
    z = torch.randn(2, 3, 512, generator=generator(1))
    x = torch.randn(3, 16, generator=generator(2))
    outputs, counts = [], []
    with torch.no_grad():
        for net in (model.diffloss.net, packed):
            layers = net.modulations(torch.randn(1, 512, generator=generator(3)), z)
            modulations = [tuple(part[0] for part in layer) for layer in layers]
            with Kernels() as kernels:
                outputs.append(net.modulated(x, modulations))
            counts.append(len(kernels.names))
    assert reference.relative_error(outputs[1], outputs[0]) < tolerance
    casts = 2 if dtype == torch.bfloat16 else 0
    assert counts == [6 * model.config.diffloss_d + 4, 5 * model.config.diffloss_d + 4 + casts]


@pytest.mark.parametrize("guidance", [GUIDANCE[0], GUIDANCE[3]], ids=str)
def test_the_first_reverse_step_is_in_float32(guidance: dict[str, float]) -> None:
    """At equal z a bf16 head's first state is the float32 head's, and no later one is."""
    model = world("mini")
    states = []
    with torch.no_grad():
        branches, config = embed_branches(model, replace(QUICK, **guidance), 2, *conditions(model), None)
        z = torch.randn(len(branches.names), 4, model.config.decoder_embed_dim, generator=generator(1))
        noise = torch.randn(9, 4, model.config.token_dim, generator=generator(2))
        for dtype in (torch.float32, torch.bfloat16):
            output = head_step(model, config, dtype).sample(z, guide_of(branches), noise, record=True)
            states.append([state for state, _ in output.record[1:]])
    exact, low = states
    assert torch.equal(low[0], exact[0]) and not any(
        torch.equal(*pair) for pair in zip(low[1:], exact[1:], strict=True)
    )


class Kernels(TorchDispatchMode):
    """Counts operations that compute; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("guidance", "extra"), [({}, 0), (GUIDANCE[1], 1), (GUIDANCE[3], 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_of_a_reverse_step(guidance: dict[str, float], extra: int, dtype: torch.dtype) -> None:
    """Six per block of the head, one to enter it, three to leave it, four for the step, and guidance's; in bf16, two
    casts. None of a weight: what is cast is what enters the first block and leaves the last."""
    model = world("mini")
    counts = []
    with torch.no_grad():
        for num_steps in (6, 10):
            config = replace(QUICK, **guidance, num_sampling_steps=num_steps, t_max=None)
            branches, config = embed_branches(model, config, 2, *conditions(model), None)
            step = head_step(model, config, dtype)
            z = torch.randn(len(branches.names), 2, model.config.decoder_embed_dim)
            noise = torch.randn(num_steps + 1, 2, model.config.token_dim)
            with Kernels() as kernels:
                step.sample(z, guide_of(branches), noise)
            counts.append(len(kernels.names))
    expected = 6 * model.config.diffloss_d + 8 + extra + (2 if dtype == torch.bfloat16 else 0)
    assert counts[1] - counts[0] == 4 * expected


# each part alone


@pytest.mark.parametrize("rows", [1, 20, 10**6])
def test_head(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modulations of all steps at once, of two at a time, of each: the same tokens."""
    monkeypatch.setattr(models.heads.diffusion_sampler, "MODULATED_ROWS", rows)
    model = world("mini")
    config = replace(QUICK, cfg_text=1.5, cfg_layout=3.0)
    z = torch.randn(3, 3, model.config.decoder_embed_dim, generator=generator(1))
    noise = torch.randn(9, 3, model.config.token_dim, generator=generator(2))
    with torch.no_grad():
        branches, config = embed_branches(model, config, 1, *(part_of_first(part) for part in conditions(model)), None)
        step = head_step(model, config)
        steps = list(step.sampler.modulations(z, step.times))
        assert len(steps) == len(step.times) == 8 and steps[0][0][0].shape == (3, 3, model.config.diffloss_w)
        found = step.sample(z, guide_of(branches), noise).tokens
        expected = plain_reverse_process(model, z, branches, (1.5, 3.0), noise, step.options)
        assert reference.relative_error(found, expected) < 1e-5

        told = torch.full((9,), reverse_steps(8, 950)[5].timestep)
        once = model.diffloss.net.modulated(noise[0], steps[5]).flatten(0, 1)
        assert reference.relative_error(once, model.diffloss.net(noise[0].repeat(3, 1), told, z.flatten(0, 1))) < 1e-5


def part_of_first(batch: TextContext | LayoutBatch) -> TextContext | LayoutBatch:
    return type(batch)(*(None if part is None else part[:1] for part in vars(batch).values()))


@pytest.mark.parametrize("num_masked", [64, 30, 1])
def test_backbone(num_masked: int) -> None:
    """The condition of the chosen tokens, in any order, for all guidance branches."""
    model = world("tiny")
    config = replace(QUICK, cfg_text=1.5, cfg_layout=3.0)
    with torch.no_grad():
        branches, _ = embed_branches(model, config, 2, *conditions(model), None)
        assert branches.conditions.num_with_text == 4
        orders = sample_orders(2, 64, [generator(3)]).repeat(3, 1)
        kept = mask_from_orders(orders, num_masked).kept_ids()
        chosen = orders[:, : min(5, num_masked)]
        tokens = reference.tensors()["train.tokens"].repeat(3, 1, 1)
        expected = plain_predict(model, tokens, kept, branches.conditions)
        for dtype in (None, torch.float32):  # as in training, as in sampling
            context = model.prepare(branches.conditions, dtype)
            every, found = model.predict(tokens, kept, context), model.predict(tokens, kept, context, chosen)
            assert reference.relative_error(every, expected) < 1e-5
            assert reference.relative_error(found, gather_tokens(expected, chosen)) < 1e-5


def test_cross_attention_to_the_null_token_is_a_constant() -> None:
    model = world("tiny")
    cross = model.encoder_blocks[0].cross
    x = torch.randn(3, 7, model.config.encoder_embed_dim, generator=generator(1))
    text = torch.randn(3, 4, 12, generator=generator(2))
    text[2] = model.text_null[0].detach()
    valid = torch.tensor([[False, True, True, False], [True, False, False, False], [True, True, False, True]])
    with torch.no_grad():
        expected = cross.attend(x, cross.keys_values(text, valid))
        for rows in (0, 2):
            found = cross.attend(x, cross.keys_values(text[:rows], valid[:rows], model.text_null[0, 0]))
            torch.testing.assert_close(found[rows:][-1], expected[2])
            torch.testing.assert_close(found[:rows], expected[:rows])
    assert float(expected[:2].std(dim=1).max()) > 1e-3  # captions are no constant


def test_a_reverse_step_is_its_formula() -> None:
    """x_0 = (x - sqrt(1 - bar) eps) / sqrt(bar), then the posterior's mean, then the draw; merged, to few kernels."""
    x, eps, fraction, noise = torch.randn(4, 9, 3, generator=generator(1), dtype=torch.float64)
    for step in (*reverse_steps(20)[1:], *reverse_steps(20, 950)):
        for clip in (None, 1.5):
            x0 = step.x0_from_x * x - step.x0_from_eps * eps
            x0 = x0 if clip is None else x0.clamp(-clip, clip)
            mean = step.mean_from_x0 * x0 + step.mean_from_x * x
            share = (fraction + 1) / 2
            std = (0.5 * (share * step.log_variance_max + (1 - share) * step.log_variance_min)).exp()
            expected = mean if step.is_last else mean + 0.7 * std * noise
            torch.testing.assert_close(step(x, eps, fraction, noise, 0.7, clip), expected)
            found, log_variance = step.distribution(x, eps, fraction, clip)
            torch.testing.assert_close(found, mean)
            torch.testing.assert_close((0.5 * log_variance).exp(), std)


def test_rotations_from_a_table() -> None:
    angles = torch.rand(1, 9, 4, generator=generator(1))
    positions = torch.tensor([[2, 0, 8], [1, 5, 7]])
    x = torch.randn(2, 2, 3, 8, generator=generator(2))
    assert torch.equal(Rotation.by(angles).at(positions)(x), Rotation.by(angles[0][positions])(x))


def test_noise_is_drawn_before_the_loop() -> None:
    """And in the order of the iterations: a generator gives the same noise."""
    model, calls = world("tiny"), []
    config = replace(QUICK, num_iter=4)

    def noise(iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        calls.append((iteration, num_draws, num_tokens))
        return torch.randn(num_draws, 1, num_tokens, 16, generator=generator(iteration))

    def iterations() -> Iterator[int]:
        counts = cosine_masked_counts(64, 4)
        assert calls == [(i, 9, counts[i] - counts[i + 1]) for i in range(4)]
        yield from range(4)

    with torch.no_grad():
        branches, config = embed_branches(model, config, 1, None, None, None)
        run_unmask(model, branches, sample_orders(1, 64, [generator()]), noise, config, iterations=iterations())
    assert len(calls) == 4
