"""What an image costs, as the README's table has it."""

from __future__ import annotations

import re

import pytest

from scripts import count_flops


def test_the_costs_of_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    count_flops.main(["--model", "mar_mini"])
    lines = capsys.readouterr().out.splitlines()
    costs = [float(found[1]) for line in lines if (found := re.search(r"([\d.e-]+) TFLOP", line))]
    first, second, plain, guided = costs  # 256 iterations are too many for 64 tokens
    assert 0 < first < second  # frozen weights need no gradients
    assert 1.5 * plain < guided < 2 * plain  # the branch without a caption has no cross-attention to compute
    count_flops.main(["--model", "mar_mini", "--num_sampling_steps", "50"])
    fewer = capsys.readouterr().out.splitlines()
    assert fewer[:3] == lines[:3] and fewer[3] != lines[3]
