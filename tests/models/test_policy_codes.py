"""Exact log-probabilities of codes: against enumeration, against what was recorded, their invariants and refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.rl.grpo import clipped_surrogate, kl_penalty
from models.blocks import gather_tokens
from models.config import StructMARConfig
from models.heads.discrete_sampler import CodeTrace
from models.policy.base import Policy, Samples, collect_samples
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.sampler import sample
from models.structmar import StructMAR
from tests.helpers.structured import generator, some_layout, some_text
from tests.helpers.tiny import shaken

SIZES: dict[str, Any] = {
    "img_size": 16,
    "vae_stride": 4,
    "vae_embed_dim": 1,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "encoder_embed_dim": 16,
    "encoder_num_heads": 2,
    "buffer_size": 4,
    "max_objects": 4,
    "class_num": 2,
    "head": "discrete",
    "codebook_size": 11,
    "learned_pos": False,
}
TRUNKS: dict[str, dict[str, Any]] = {
    "mae": {"trunk": "mae", "encoder_depth": 2},
    "single": {"trunk": "single", "encoder_depth": 0},
    "mae, patches": {"trunk": "mae", "encoder_depth": 2, "patch_size": 2},
    "single, patches": {"trunk": "single", "encoder_depth": 0, "patch_size": 2, "code_dim": 8},
}
CODES = default_sampling("discrete", num_iter=4, order="random")
every_trunk = pytest.mark.parametrize("trunk", list(TRUNKS))


def code_model(trunk: str, seed: int = 3, **overrides: Any) -> StructMAR:
    """With every part in play: the head starts at zero, at which all codes are equally likely."""
    sizes = SIZES | TRUNKS[trunk] | {"num_categories": 5, "text_dim": 12} | overrides
    model = StructMAR(StructMARConfig(**sizes)).eval()
    shaken(model, seed)
    return model


@lru_cache
def world(trunk: str) -> tuple[StructMAR, Samples]:
    """A model (not to be changed) and what it sampled."""
    model = code_model(trunk)
    return model, sampled(model)


def sampled(model: StructMAR, config: SamplingConfig = CODES, seed: int = 3) -> Samples:
    text, layout = some_text(), some_layout()
    output = sample(model, config, [generator(seed), generator(seed + 1)], text, layout, record=True)
    return collect_samples(output, text, layout)


# against enumeration


def two_tokens(trunk: str) -> StructMAR:
    return code_model(trunk, num_categories=0, text_dim=0, codebook_size=3)


@lru_cache
def rewards() -> Tensor:
    """Of each pair of codes: [9]."""
    return torch.rand(9, generator=generator(8))


ORDERS = torch.tensor([[0, 1], [1, 0]])
PAIRS = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]


def log_probs_of_pairs(model: StructMAR, order: Tensor, num_iter: int, temperature: float) -> Tensor:
    """Written out: of each pair of codes, drawn in this order (from its end), at once or one by one. [9]."""
    tokens = PAIRS[..., None].float()  # [9, 2, 1]
    context = model.prepare(model.embed_conditions(9, grid=(1, 2)))
    known = torch.zeros(9, 0, dtype=torch.int64)
    total = torch.zeros(9)
    for ids in [order.flip(0)[None]] if num_iter == 1 else order.flip(0)[:, None, None]:
        z = model.predict(tokens, known, context)  # [9, 2, D]
        log_probs = (model.code_head.logits(z)[:, :, 0] / temperature).log_softmax(-1)  # [9, 2, 3]
        for place in ids.flatten().tolist():
            total = total + log_probs[torch.arange(9), place, PAIRS[:, place]]
        known = torch.cat([known, ids.expand(9, -1)], dim=1)
    return total


def gradient_of(value: Tensor, model: StructMAR) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, trained, allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


@pytest.mark.parametrize("num_iter", [1, 2])
@pytest.mark.parametrize("trunk", ["mae", "single"])
def test_the_gradient_is_that_of_the_expected_reward(trunk: str, num_iter: int) -> None:
    """Of every order and pair of codes, each as likely as it is sampled: the surrogate's own gradient."""
    model, temperature = two_tokens(trunk), 0.7
    config = default_sampling("discrete", num_iter=num_iter, order="random", temperature=temperature)
    estimator = ExactEstimator(config, num_iter)
    expected, surrogate = torch.zeros(()), torch.zeros(())
    for order in ORDERS:
        probs = log_probs_of_pairs(model, order, num_iter, temperature).exp()  # [9]
        assert float(probs.sum().detach()) == pytest.approx(1, abs=1e-5)
        expected = expected + (probs * rewards()).sum() / len(ORDERS)
        samples = Samples(PAIRS[..., None].float(), order.expand(9, -1), (1, 2), None, None)
        advantages = 9 * probs.detach() * rewards() / len(ORDERS)  # the surrogate is a mean over nine images
        passes = estimator.draw_noise(samples, generator())
        for noise in passes:
            log_prob = estimator.log_probs(model, samples, noise).log_prob
            loss = clipped_surrogate(log_prob, log_prob.detach(), advantages, 0.2).loss
            surrogate = surrogate - 2 * noise.weight / len(passes) * loss  # two codes: a mean over codes, not a sum
    torch.testing.assert_close(gradient_of(surrogate, model), gradient_of(expected, model), rtol=1e-4, atol=1e-6)


def test_a_subset_of_iterations_is_unbiased() -> None:
    """Iterations are drawn as often as the passes of all of them weigh."""
    samples = world("single")[1]
    whole = ExactEstimator(CODES, 4).draw_noise(samples, generator())
    weights = torch.tensor([noise.weight for noise in whole]) / 4
    assert float(weights.sum()) == pytest.approx(1)
    few, shared = ExactEstimator(CODES, 2), generator(1)
    drawn = [noise for _ in range(2000) for noise in few.draw_noise(samples, shared)]
    hits = torch.bincount(torch.tensor([noise.iteration for noise in drawn]), minlength=4) / len(drawn)
    torch.testing.assert_close(hits, weights, atol=0.02, rtol=0)
    assert {noise.weight for noise in drawn} == {1.0}


# against the sampler

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "order": "halton", "schedule": "linear"},
    {"cfg_text": 3.0, "cfg_layout": 3.0, "temperature": 1.4},
    {"cfg_text": 1.5, "cfg_layout": 3.0, "cfg_schedule": "step_linear"},
    {"cfg_text": 1.5, "cfg_layout": 3.0, "guidance_interval": (0.25, 0.75), "order": "raster"},
]


@every_trunk
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_was_recorded_is_computed_again(trunk: str, settings: dict[str, Any]) -> None:
    model, config = world(trunk)[0], replace(CODES, **settings)
    samples, estimator = sampled(model, config), ExactEstimator(config, 4)
    assert isinstance(samples.trace, CodeTrace) and float(samples.trace.log_probs.std()) > 0.1
    for noise in estimator.draw_noise(samples, generator()):
        with torch.no_grad():
            output = estimator.log_probs(model, samples, noise)
        gap = estimator.replay_gap(samples, noise, output.log_prob)
        assert gap is not None and float(gap) < 1e-5


@every_trunk
def test_every_code_is_scored_once_given_what_was_known_then(trunk: str) -> None:
    """Codes of later iterations are nothing to it, those of earlier ones are."""
    model, samples = world(trunk)
    estimator = ExactEstimator(CODES, 4)
    passes = estimator.draw_noise(samples, generator())
    scored = torch.cat([noise.token_ids for noise in passes], dim=1)
    assert torch.equal(scored.sort(dim=1).values, torch.arange(samples.orders.shape[1]).expand(2, -1))
    for noise in passes:
        known = torch.zeros(samples.orders.shape, dtype=torch.bool).scatter(1, noise.kept_ids, True)
        before = torch.cat([torch.zeros(2, 0).long(), *(each.token_ids for each in passes[: noise.iteration])], dim=1)
        assert torch.equal(known, torch.zeros_like(known).scatter(1, before, True))
        with torch.no_grad():
            own = estimator.log_probs(model, samples, noise).log_prob
            is_later = ~known.scatter(1, noise.token_ids, True)[..., None]
            tokens = torch.where(is_later, (samples.tokens + 3) % 11, samples.tokens)
            assert torch.equal(estimator.log_probs(model, replace(samples, tokens=tokens), noise).log_prob, own)
            if noise.iteration:
                tokens = torch.where(known[..., None], (samples.tokens + 3) % 11, samples.tokens)
                assert (estimator.log_probs(model, replace(samples, tokens=tokens), noise).log_prob != own).any()


# ratios and KL


@every_trunk
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratios_are_one_and_the_kl_zero_to_the_bit(trunk: str, checkpointing: bool) -> None:
    samples = world(trunk)[1]
    model = code_model(trunk, grad_checkpointing=checkpointing, attn_dropout=0.5, proj_dropout=0.5)
    config = replace(CODES, cfg_text=3.0, cfg_layout=2.0)
    estimator = ExactEstimator(config, 4, has_distribution=True)
    for noise in estimator.draw_noise(samples, generator()):
        with torch.no_grad():
            reference = estimator.log_probs(model, samples, noise)
        current = estimator.log_probs(model, samples, noise)
        codes_of_token = samples.tokens.shape[-1]
        assert current.log_prob.shape == (*noise.token_ids.shape, codes_of_token)
        assert torch.equal(current.log_prob, reference.log_prob) and current.log_prob.requires_grad
        for kind in ("k2", "k3", "exact"):
            kl = kl_penalty(kind, current, reference)
            assert float(kl.detach()) == 0.0
            assert not gradient_of_some(kl, model).any()


def gradient_of_some(value: Tensor, model: StructMAR) -> Tensor:
    head = model.code_head.out.weight
    return torch.autograd.grad(value, head, retain_graph=True)[0]


def test_the_exact_kl_is_the_sum_over_codes() -> None:
    """And what k3 estimates without bias from the policy's own codes."""
    current, reference = (torch.randn(1, 1, 1, 7, generator=generator(seed)).log_softmax(-1) for seed in (1, 2))
    probs = current.exp()
    expected = (probs * (current - reference)).sum()
    estimator = ExactEstimator(CODES, 4, has_distribution=True)
    model, samples = world("single")
    noise = estimator.draw_noise(samples, generator())[0]
    with torch.no_grad():
        output = estimator.log_probs(model, samples, noise)
    outputs = [replace(output, code_log_probs=each) for each in (current, reference)]
    torch.testing.assert_close(kl_penalty("exact", *outputs), expected)
    k3 = [kl_penalty("k3", *(replace(output, log_prob=each[..., code]) for each in (current, reference)))
          for code in range(7)]  # fmt: skip
    torch.testing.assert_close((probs.flatten() * torch.stack(k3)).sum(), expected)
    with pytest.raises(ValueError, match="'eps' needs what the network predicted"):
        kl_penalty("eps", *outputs)
    with pytest.raises(ValueError, match="'exact' needs"):
        kl_penalty("exact", *(replace(output, code_log_probs=None) for _ in range(2)))


def test_only_the_full_branch_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = code_model("single"), world("single")[1]
    calls, code_logits = [], model.code_logits

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((torch.is_grad_enabled(), kwargs["text"] is not None, kwargs["layout"] is not None))
        return code_logits(*args, **kwargs)

    monkeypatch.setattr(model, "code_logits", recording)
    estimator = ExactEstimator(replace(CODES, cfg_text=1.5, cfg_layout=3.0), 4)
    estimator.log_probs(model, samples, estimator.draw_noise(samples, generator())[1])
    assert calls == [(True, True, True), (False, True, False), (False, False, False)]


def test_the_head_is_float32_under_autocast() -> None:
    model, samples = world("mae")
    ids = samples.orders[:, :3]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.code_logits(samples.tokens, ids[:, :0], ids, text=samples.text, layout=samples.layout)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    assert gather_tokens(samples.tokens, ids).shape[:2] == logits.shape[:2]


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "confidence"}, "order confidence"),
        ({"top_k": 5}, "top_k 5"),
        ({"top_p": 0.9}, "top_p 0.9"),
        ({"uncond_refresh": 2}, "uncond_refresh 2"),
    ],
    ids=str,
)
def test_rollouts_that_have_no_exact_log_probabilities(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactEstimator(replace(CODES, **settings), 2)


def test_other_refusals() -> None:
    model, samples = world("single")
    with pytest.raises(ValueError, match="between 1 and num_iter = 4, got 5"):
        ExactEstimator(CODES, 5)
    with pytest.raises(ValueError, match="options are of the diffusion head"):
        ExactEstimator(SamplingConfig(num_iter=4), 2)
    with pytest.raises(ValueError, match="an estimator of the diffusion head with a model of the discrete head"):
        Policy(model, ElboEstimator(4))
    noise = ExactEstimator(CODES, 2).draw_noise(samples, generator())[0]
    with pytest.raises(ValueError, match="another estimator's"):
        ExactEstimator(CODES, 2).log_probs(model, samples, replace(noise, steps=(1,)))
