"""What a loader asks of a tensor."""

from __future__ import annotations

import math

import pytest
import torch

from util.weights import is_finite, tensor_problem

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_of_many_is_found(dtype: torch.dtype, value: float) -> None:
    for position in (0, 500, 1023):
        tensor = torch.linspace(-1, 1, 1024).to(dtype)
        assert tensor_problem("w", tensor) is None
        tensor[position] = value
        if not math.isnan(float(tensor[position])) and math.isfinite(float(tensor[position])):
            return  # float8_e4m3fn has no infinity
        assert tensor_problem("w", tensor) == "w is not finite (it has NaN or infinite values)"


def test_large_finite_values_are_fine() -> None:
    assert is_finite(torch.full((1000,), torch.finfo(torch.float32).max))
    assert is_finite(torch.empty(0)) and is_finite(torch.empty(3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_are_floating_point(dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    assert tensor_problem("w", torch.ones(2).to(dtype)) == f"w is {kind}, not floating point"


def test_counters_are_whole_numbers() -> None:
    counter = torch.tensor(3)
    assert tensor_problem("n", torch.tensor(7, dtype=torch.int32), counter) is None
    assert tensor_problem("n", torch.tensor(7.0), counter) == "n is float32, not whole numbers"
    assert tensor_problem("n", 7, counter) == "n is a int, not a tensor"
