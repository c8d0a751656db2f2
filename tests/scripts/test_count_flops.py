"""What an image costs, as the README's table has it."""

from __future__ import annotations

import re

import pytest

from models.config import preset_config
from models.flops import meta_model
from scripts import count_flops


def test_the_costs_of_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    count_flops.main(["--model", "mar_mini"])
    lines = capsys.readouterr().out.splitlines()
    costs = [float(found[1]) for line in lines if (found := re.search(r"([\d.e-]+) TFLOP", line))]
    first, second, plain, guided, distill, few_step, gradient, *stage_3 = (
        costs  # 256 iterations are too many for 64 tokens
    )
    assert 0 < first < second  # frozen weights need no gradients
    assert 1.5 * plain < guided < 2 * plain  # the branch without a caption has no cross-attention to compute
    grpo, nft, best_of, *few = stage_3  # with rollouts
    assert all(after < before for before, after in zip(stage_3[:3], few, strict=True)) and few_step > 0
    assert second < distill < best_of < nft < grpo and gradient > 0.5  # one pass more; half a TFLOP is the decoder's
    count_flops.main(["--model", "mar_mini", "--num_sampling_steps", "50"])
    fewer = capsys.readouterr().out.splitlines()
    assert fewer[:3] == lines[:3] and fewer[3] != lines[3]


GIGA = {"base": 53, "large": 174, "xlarge": 399, "xxlarge": 731}


@pytest.mark.parametrize("size", GIGA)
def test_a_pass_costs_what_the_released_model_costs(size: str) -> None:
    """One slot for the class, no text, no layout."""
    model = meta_model(preset_config(f"maskgil_{size}", buffer_size=1, max_objects=1))
    assert count_flops.logits_flops(model, num_text=1) / 1e9 == pytest.approx(GIGA[size], rel=0.01)


def test_the_costs_of_a_model_of_codes(capsys: pytest.CaptureFixture[str]) -> None:
    count_flops.main(["--model", "maskgil_mini"])
    costs = [float(found) for found in re.findall(r"([\d.e-]+) TFLOP", capsys.readouterr().out)]
    first, second, one_pass, few, few_guided, many, many_guided, distill, grpo = costs
    assert one_pass < first < second < 4 * one_pass
    assert 7 * one_pass < few < 8.1 * one_pass and few < few_guided < 2 * few
    assert many < 4 * few and many_guided < 4 * few_guided
    assert second < distill < grpo
