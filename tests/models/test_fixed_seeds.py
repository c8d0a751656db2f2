"""What fixed seeds give: numbers that a change of structure must not change.

They were written down before `prepare` and `predict` became the one pass over the backbone. A change that means to give
other losses or images writes them anew and says why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.policy.base import Estimator, collect_samples
from models.policy.elbo import ElboEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from tests.helpers import reference
from tests.helpers.structured import generator, some_layout, some_text, structured_model

QUICK = SamplingConfig(num_iter=5, num_sampling_steps=6, t_max=950, clip_x0=5.0)
GUIDED = replace(QUICK, cfg_text=1.5, cfg_layout=3.0)

IMAGES: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [0.000352, 0.588933, -2.683439]),
    ({"cfg_text": 3.0, "cfg_layout": 3.0}, [-0.020519, 0.673173, -2.249366]),
    (
        {"cfg_text": 1.5, "cfg_layout": 3.0, "cfg_schedule": "constant", "temperature": 0.9},
        [-0.033513, 0.597942, -1.413931],
    ),
    ({"num_sampling_steps_last": 2, "t_max": None}, [0.024577, 0.623392, 0.022951]),
    ({"order": "gtr"}, [-0.01319, 0.586493, -1.127813]),
    ({"order": "halton"}, [0.01601, 0.571294, -1.574269]),
    ({"cfg_text": 3.0, "guidance_interval": (0.2, 0.7)}, [-0.006124, 0.618842, -1.89593]),
    ({"num_iter": 9, "cfg_text": 3.0, "uncond_refresh": 3}, [0.016958, 0.638024, -1.193259]),
]


def generators() -> list[torch.Generator]:
    return [generator(1), generator(2)]


def described(x: Tensor) -> list[float]:
    """Mean, deviation, and the sum of every 97th value: another image has others."""
    return [float(value) for value in (x.mean(), x.std(), x.flatten()[::97].sum())]


@pytest.mark.parametrize(("options", "expected"), IMAGES, ids=lambda each: str(each) if isinstance(each, dict) else "")
def test_images(options: dict[str, Any], expected: list[float]) -> None:
    output = sample(structured_model(), replace(QUICK, **options), generators(), some_text(), some_layout())
    assert described(output.latents) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_images_of_classes() -> None:
    model, config = reference.tiny_model(), replace(QUICK, cfg_text=2.0)
    output = sample(model, config, generators(), labels=torch.tensor([3, 5]))
    assert described(output.latents) == pytest.approx([-0.033602, 0.690055, 1.997757], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("is_conditioned", "loss", "gradient"),
    [(True, 0.3920269012451172, 1.342244883389697), (False, 0.3203721046447754, 0.7555766696113886)],
)
def test_losses_and_gradients(is_conditioned: bool, loss: float, gradient: float) -> None:
    model = structured_model()
    text, layout = (some_text(), some_layout()) if is_conditioned else (None, None)
    noise = model.sample_training_noise(2, generator(5), 0.7)
    found = model(reference.tensors()["train.latents"], noise, text=text, layout=layout)
    found.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(gradient, rel=1e-4)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (ElboEstimator(5, 2, 2), [-6.537733554840088, -3.716876983642578]),
        (TrajectoryEstimator(GUIDED, 2, skipped=1), [-7.404165267944336, -6.635262489318848]),
    ],
    ids=["elbo", "trajectory"],
)
def test_log_probabilities(estimator: Estimator, expected: list[float]) -> None:
    model, text, layout = structured_model(), some_text(), some_layout()
    samples = collect_samples(sample(model, GUIDED, generators(), text, layout, record=True), text, layout)
    with torch.no_grad():
        passes = [estimator.log_probs(model, samples, each) for each in estimator.draw_noise(samples, generator(3))]
    assert [float(each.log_prob.mean()) for each in passes] == pytest.approx(expected, rel=1e-3)
