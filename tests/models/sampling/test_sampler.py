"""The sampler: every token once, images apart, guidance, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.heads.base import HeadOutput
from models.heads.diffusion_sampler import DiffusionStep
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from tests.helpers import reference
from tests.helpers.structured import generator, some_layout, some_text, structured_model
from util.types import LayoutBatch, TextContext

QUICK = SamplingConfig(num_iter=4, num_sampling_steps=8, t_max=950, clip_x0=2000.0)


def test_every_token_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the head marks its tokens with its number: as many tokens carry a number as that call unmasked."""
    calls: list[int] = []

    def mark(_step: DiffusionStep, z: Tensor, *_rest: object) -> HeadOutput:
        calls.append(z.shape[1])
        return HeadOutput(torch.full((z.shape[1], 16), float(len(calls))))

    monkeypatch.setattr(DiffusionStep, "sample", mark)
    model = structured_model()
    output = sample(model, replace(QUICK, num_iter=9), [generator(1), generator(2)])
    tokens = model.patchify(output.latents)
    counts = cosine_masked_counts(64, 9)
    assert calls == [2 * (now - after) for now, after in pairwise(counts)]
    for image in range(2):
        marks = tokens[image, :, 0].long()
        assert torch.bincount(marks, minlength=10).tolist() == [0] + [rows // 2 for rows in calls]
        assert marks[output.orders[image]].tolist() == sorted(marks.tolist(), reverse=True)


@pytest.mark.parametrize("guided", [{}, {"cfg_text": 2.0, "cfg_layout": 2.0}, {"cfg_text": 1.5, "cfg_layout": 3.0}])
def test_image_does_not_depend_on_its_batch(guided: dict[str, float]) -> None:
    model, text, layout = structured_model(), some_text(), some_layout()
    config = replace(QUICK, **guided)
    together = sample(model, config, [generator(3), generator(4)], text, layout).latents
    alone = sample(
        model,
        config,
        [generator(4)],
        TextContext(text.tokens[1:], text.valid[1:], text.pooled[1:]),
        LayoutBatch(layout.boxes_xyxy[1:], layout.categories[1:], layout.valid[1:]),
    ).latents
    assert reference.relative_error(together[1:], alone) < 1e-4
    assert reference.relative_error(together[:1], alone) > 1e-2


def test_guidance_formula() -> None:
    """Scales of 1 are no guidance; text and layout alone or apart follow the sum of differences."""
    model, text, layout = structured_model(), some_text(), some_layout()

    def run(**scales: float) -> Tensor:
        return sample(
            model, replace(QUICK, cfg_schedule="constant", **scales), [generator(5)] * 1 + [generator(6)], text, layout
        ).latents

    plain = run()
    assert torch.equal(plain, run(cfg_text=1.0, cfg_layout=1.0))
    assert reference.relative_error(run(cfg_text=3.0, cfg_layout=1.0), plain) > 1e-3
    assert reference.relative_error(run(cfg_text=1.0, cfg_layout=3.0), plain) > 1e-3
    assert reference.relative_error(run(cfg_text=3.0, cfg_layout=1.0), run(cfg_text=1.0, cfg_layout=3.0)) > 1e-3


def test_sample_refuses() -> None:
    model = structured_model()
    with pytest.raises(ValueError, match="text is for 2 images, but there are 1 generators"):
        sample(model, QUICK, [generator()], some_text())
    with pytest.raises(ValueError, match="num_iter must lie between 1 and the number of tokens, 64, got 65"):
        sample(model, replace(QUICK, num_iter=65), [generator()])
    with pytest.raises(ValueError, match="layout has 3 slots, the model 4"):
        sample(model, QUICK, [generator()] * 2, layout=some_layout(3))
    with pytest.raises(ValueError, match="num_sampling_steps must lie between 1 and 1000, got 0"):
        SamplingConfig(num_sampling_steps=0)
