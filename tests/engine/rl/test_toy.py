"""GRPO learns: a model of Gaussian tokens, or of codes, comes to draw what is rewarded, and the KL holds it back."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.inputs import StepInputs
from engine.rl.objectives import BestOf, Clipped, Nft
from engine.train.optim import build_optimizer
from engine.train.state import Position
from models.policy.base import Estimator
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig, default_sampling
from models.structmar import StructMAR, StructMARConfig
from models.weights import select_trainable
from tests.helpers.rl_world import grpo_step, worker_of
from util.rng import generator

CONFIG = StructMARConfig(
    img_size=16,
    vae_stride=8,
    vae_embed_dim=2,
    encoder_embed_dim=16,
    encoder_depth=1,
    encoder_num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    class_num=1,
    buffer_size=1,
    diffloss_d=1,
    diffloss_w=32,
    rope_mode="off",
)
SAMPLING = SamplingConfig(num_iter=2, num_sampling_steps=8, t_max=950, clip_x0=3.0)
ESTIMATORS: dict[str, tuple[Estimator, float]] = {  # with the clip range that engine/cli/build_rl.py gives each
    "elbo": (ElboEstimator(num_iter=2, num_masks=2, num_draws=4), 0.05),
    "trajectory": (TrajectoryEstimator(SAMPLING, num_masks=2), 0.2),
    "exact": (ExactEstimator(default_sampling("discrete", num_iter=2, order="random"), num_masks=2), 0.2),
}
CODEBOOK_SIZE, BRIGHT = 6, 5
CODES = replace(CONFIG, head="discrete", codebook_size=CODEBOOK_SIZE, vae_embed_dim=1)
PROMPTS, GROUP = 8, 4


def share_of_bright_tokens(tokens: Tensor) -> Tensor:
    return (tokens[..., 0] > 0.5).float().mean(1)  # [n], in [0, 1]


def share_of_bright_codes(tokens: Tensor) -> Tensor:
    return (tokens[..., 0] == BRIGHT).float().mean(1)  # [n], in [0, 1]; a sixth at first


@lru_cache
def pretrained() -> dict[str, Tensor]:
    """Weights of a model of four tokens from N(0, .5^2): 16 % of them are bright."""
    torch.manual_seed(0)
    model = StructMAR(CONFIG)
    optimizer = build_optimizer(select_trainable(model, "full"), 5e-3, 0.0)
    for step in range(150):
        draws = generator("pretraining", step)
        latents = 0.5 * torch.randn(64, 2, 2, 2, generator=draws)  # [64, C, h, w]
        noise = model.sample_training_noise(64, draws, 0.5)
        model(latents, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def start_of(estimator: Estimator) -> StructMAR:
    """A model of codes begins with all equally likely: it needs no pretraining."""
    torch.manual_seed(1)
    model = StructMAR(CODES if estimator.head == "discrete" else CONFIG)
    if estimator.head == "diffusion":
        model.load_state_dict(pretrained())
    select_trainable(model, "full")
    return model


def run(name: str, num_updates: int, **settings: Any) -> list[dict[str, float]]:
    """What every update logged."""
    estimator, clip_range = ESTIMATORS[name]
    options = {"inner_epochs": 2, "grad_clip": 1.0, "objective": Clipped(clip_range)} | settings
    reward = share_of_bright_codes if estimator.head == "discrete" else share_of_bright_tokens
    lr = 3e-3 if estimator.head == "discrete" else 1e-3  # codes that are all equally likely take longer to part
    step = grpo_step(start_of(estimator), estimator, reward, lr=lr, **options)
    worker = worker_of(step)
    worker.group_size = GROUP
    worker.config = estimator.config if isinstance(estimator, ExactEstimator) else SAMPLING
    logged = []
    for number in range(num_updates):
        step.take(Position(0, number, number), iter([StepInputs(torch.zeros(PROMPTS, 2, 2, 2))]))
        logged.append(step.read())
    return logged


def mean(logged: list[dict[str, float]], name: str) -> float:
    return sum(values[name] for values in logged) / len(logged)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_reward_rises_and_the_kl_stays_bounded(name: str) -> None:
    logged = run(name, 24)
    start, end = logged[0]["reward"], mean(logged[-5:], "reward")
    assert 0.0 < start < 0.35
    assert end > start + 0.3
    assert logged[0]["kl"] < 0.01
    assert 0.0 < mean(logged[-10:], "kl") < 3.0 and max(values["kl"] for values in logged) < 6.0
    assert not any(values["skipped"] for values in logged)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("elbo", {"objective": Nft(), "kl_estimator": "eps"}),
        ("elbo", {"objective": BestOf()}),
        ("exact", {"objective": BestOf()}),
    ],
    ids=["nft", "best_of", "best_of codes"],
)
def test_the_other_objectives_learn_it_too(name: str, settings: dict[str, Any]) -> None:
    logged = run(name, 24, inner_epochs=1, **settings)
    assert mean(logged[-5:], "reward") > logged[0]["reward"] + 0.3
    assert not any(values["skipped"] for values in logged)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_large_kl_coefficient_holds_the_policy_at_its_reference(name: str) -> None:
    free, held = run(name, 12, kl_coef=0.001), run(name, 12, kl_coef=20.0)
    assert mean(held[-4:], "kl") < 0.25 * mean(free[-4:], "kl")
    assert mean(held[-4:], "reward") < mean(free[-4:], "reward") - 0.1


def test_without_differences_in_reward_nothing_moves() -> None:
    """Equal rewards and weights equal to the reference: no gradient at all."""
    model = StructMAR(CONFIG)
    model.load_state_dict(pretrained())
    select_trainable(model, "full")
    step = grpo_step(model, ESTIMATORS["trajectory"][0], lambda tokens: torch.full((len(tokens),), 0.7))
    worker_of(step).config = SAMPLING
    step.take(Position(), iter([StepInputs(torch.zeros(2, 2, 2, 2))]))
    values = step.read()
    assert values["zero_std_share"] == 1.0 and values["grad_norm"] == values["loss"] == values["kl"] == 0.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, pretrained()[name]), name
