"""Operations are counted by their shapes, on the CPU as on the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from util.flops import FlopCounter, count_flops


def test_a_product() -> None:
    left, right, bias = torch.ones(3, 5), torch.ones(7, 5), torch.ones(7)
    result, flops = count_flops(lambda: F.linear(left, right, bias).relu())
    assert result.shape == (3, 7) and flops == 2 * 3 * 5 * 7


def test_attention_on_the_cpu() -> None:
    """Its backward pass computes the logits again."""
    query, key = torch.ones(2, 4, 6, 8, requires_grad=True), torch.ones(2, 4, 10, 8, requires_grad=True)
    one_product = 2 * 2 * 4 * 6 * 10 * 8
    for bias in (None, torch.zeros(2, 1, 6, 10)):
        result, flops = count_flops(lambda bias=bias: F.scaled_dot_product_attention(query, key, key, attn_mask=bias))
        assert flops == 2 * one_product
        assert count_flops(result.sum().backward)[1] == 5 * one_product


class Network(nn.Module):
    """Some of everything: convolution, attention, checkpointing, operations that change a tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolution(x).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x.contiguous().add_(1).exp().sum()


@pytest.mark.parametrize("size", [9, 12])
def test_it_agrees_with_pytorchs_counter_on_the_meta_device(size: int) -> None:
    with torch.device("meta"):
        network, images = Network(), torch.zeros(2, 3, size, size)
    with FlopCounterMode(display=False) as expected:
        network(images).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    for _ in range(2):  # the second time every result is known
        network.zero_grad()
        assert count_flops(lambda: network(images).backward())[1] == expected.get_total_flops()
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            assert gradient is not None and parameter.grad is not None
            assert (parameter.grad.shape, parameter.grad.dtype) == (gradient.shape, gradient.dtype)


def test_results_have_the_dtype_of_their_arguments() -> None:
    """1 and 1.0 are equal, and so are their hashes."""
    x = torch.zeros(3, dtype=torch.int64, device="meta")
    with FlopCounter():
        assert [(x + each).dtype for each in (1, 1.0, True, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
            torch.int64,
        ]


def test_numbers_stay_numbers() -> None:
    """Whatever has values is computed."""
    with FlopCounter():
        drawn = torch.randn(4, generator=torch.Generator().manual_seed(1))
        assert drawn.to("meta").is_meta
        assert torch.stack([drawn, drawn]).sum().item() == pytest.approx(2 * float(drawn.sum()))
