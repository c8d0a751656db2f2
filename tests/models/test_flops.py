"""What is said of an image's FLOPs against PyTorch's own counter on whole passes, and against whole rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.blocks import Block
from models.config import StructMARConfig
from models.flops import META, ScoringFlops, meta_conditions, meta_model, sampling_flops, second_degree
from models.heads.adaln_mlp import ResBlock
from models.heads.packed import PackedLinear
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from tests.helpers import tiny
from tests.helpers.family import CODEBOOK, family_config
from util.flops import count_flops

NUM_TEXT = 5
CONFIG = replace(tiny.CONFIG, img_size=16, encoder_depth=2, decoder_depth=1, diffloss_d=1)  # 16 tokens
MAR_CONFIG = replace(tiny.MAR_CONFIG, img_size=16, encoder_depth=1)
SHORT = SamplingConfig(num_iter=2, num_sampling_steps=3)


def test_a_polynomial_is_found_from_few_sizes() -> None:
    asked = []

    def count(n: int, p: int) -> int:
        asked.append((n, p))
        return 7 + 3 * n + 5 * p + 2 * n * n + 11 * n * p + p * p

    flops = second_degree(count, 8, 3)
    assert sorted(asked) == [(0, 0), (0, 3), (0, 6), (8, 0), (8, 3), (16, 0)]
    assert [flops(n, p) for n, p in ((0, 0), (1, 1), (5, 7), (16, 6))] == [count(0, 0), 29, count(5, 7), count(16, 6)]


# --- passes that are learned from ------------------------------------------------------------------------------------


def counted_scoring(config: StructMARConfig, n: int, m: int, p: int, draws: int) -> tuple[int, int]:
    """(forward, backward and recomputation) of n images with m tokens hidden, p of them scored `draws` times each."""
    model, conditions = meta_model(config), meta_conditions(config, n, NUM_TEXT)
    kept_ids = torch.zeros(n, config.num_tokens - m, dtype=torch.int64, device=META)
    token_ids = torch.zeros(n, p, dtype=torch.int64, device=META)
    tokens = torch.zeros(n, config.num_tokens, config.token_dim, device=META)
    noisy = torch.zeros(n, p, draws, config.token_dim, device=META)
    timesteps = torch.zeros(n, p, draws, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        output = model.denoise(tokens, kept_ids, token_ids, noisy, timesteps, **conditions)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        MAR_CONFIG,
        replace(CONFIG, cross_attn_every=2, layout_fourier=False, decoder_embed_dim=64, mlp_ratio=2.0, rope_mode="off"),
    ],
    ids=["all parts", "bare MAR", "odd sizes"],
)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_a_scoring_pass(config: StructMARConfig, grad_checkpointing: bool) -> None:
    config = replace(config, grad_checkpointing=grad_checkpointing)
    flops = ScoringFlops(meta_model(config), NUM_TEXT)
    for num_masked in (10, 13):
        found = flops.at(num_masked, num_rows=5 * 4)
        assert (2 * found.forward, 2 * found.backward) == counted_scoring(config, n=2, m=num_masked, p=5, draws=4)


@pytest.mark.parametrize("width", [32, 64])
def test_a_row_of_codes_is_one_product_with_all_codes(width: int) -> None:
    """Forwards, and twice backwards: gradients of the matrix and of the row."""
    sizes: dict[str, int] = {"encoder_embed_dim": width, "decoder_embed_dim": width}
    row = ScoringFlops(meta_model(family_config(**sizes)), NUM_TEXT).row
    assert (row.forward, row.backward) == (2 * width * CODEBOOK, 4 * width * CODEBOOK)


# --- rollouts --------------------------------------------------------------------------------------------------------


def counted_rollout(config: StructMARConfig, sampling: SamplingConfig, n: int) -> int:
    model = meta_model(config)
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    conditions = meta_conditions(config, n, NUM_TEXT)
    return count_flops(lambda: sample(model, sampling, generators, **conditions))[1]


def counted_per_image(config: StructMARConfig, sampling: SamplingConfig) -> int:
    """What a further image adds: some work is done once per batch."""
    return counted_rollout(config, sampling, 2) - counted_rollout(config, sampling, 1)


def estimated(config: StructMARConfig, sampling: SamplingConfig) -> float:
    return sampling_flops(meta_model(config), sampling, NUM_TEXT)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, cross_attn_every=0), MAR_CONFIG], ids=["", "pooled", "MAR"])
def test_an_unguided_rollout(config: StructMARConfig) -> None:
    assert estimated(config, SHORT) == counted_per_image(config, SHORT)
    assert 3 * estimated(config, SHORT) == pytest.approx(counted_rollout(config, SHORT, 3), rel=0.02)


def test_merged_steps_are_not_counted() -> None:
    cut = replace(SHORT, t_max=400)
    assert estimated(CONFIG, cut) == counted_per_image(CONFIG, cut) < estimated(CONFIG, SHORT)


@pytest.mark.parametrize(("cfg_text", "cfg_layout", "branches"), [(3.0, 3.0, 2), (1.0, 3.0, 2), (3.0, 5.0, 3)])
def test_a_guided_rollout_counts_every_branch(cfg_text: float, cfg_layout: float, branches: int) -> None:
    sampling = replace(SHORT, cfg_text=cfg_text, cfg_layout=cfg_layout)
    flops = estimated(CONFIG, sampling)
    assert flops == counted_per_image(CONFIG, sampling)
    assert flops == pytest.approx(branches * estimated(CONFIG, SHORT), rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_sampling_steps": 6, "num_sampling_steps_last": 2},
        {"guidance_interval": (0.2, 0.8), "cfg_text": 3.0, "cfg_layout": 3.0},
        {"uncond_refresh": 3, "cfg_text": 3.0, "cfg_layout": 5.0},
    ],
    ids=str,
)
def test_options_that_spend_less(options: dict[str, Any]) -> None:
    sampling = replace(SamplingConfig(num_iter=10, num_sampling_steps=3), **options)
    off = replace(sampling, num_sampling_steps_last=None, guidance_interval=(0.0, 1.0), uncond_refresh=1)
    flops = estimated(CONFIG, sampling)
    assert flops == counted_per_image(CONFIG, sampling)
    assert flops < estimated(CONFIG, off)


# --- what is not asked for -------------------------------------------------------------------------------------------


def test_other_blocks_are_counted_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the backbone runs its MLP twice, every block of the head too."""
    width, head_width, num_blocks = CONFIG.encoder_embed_dim, CONFIG.diffloss_w, 3
    run, forward = Block.run, ResBlock.forward

    def run_more(block: Block, x: Tensor, *args: Any) -> Tensor:
        return block.mlp(run(block, x, *args))

    def forward_more(block: ResBlock, x: Tensor, *args: Any) -> Tensor:
        return block.mlp(forward(block, x, *args))

    plain, plain_rollout = ScoringFlops(meta_model(CONFIG), NUM_TEXT).at(10, 3), estimated(CONFIG, SHORT)
    monkeypatch.setattr(Block, "run", run_more)
    monkeypatch.setattr(ResBlock, "forward", forward_more)
    more = ScoringFlops(meta_model(CONFIG), NUM_TEXT).at(10, 3)
    seen = 2 * (CONFIG.buffer_size + 6) + CONFIG.buffer_size + 16  # two blocks of the encoder, one of the decoder
    added = 2 * seen * 2 * 4 * width**2 + 3 * 2 * 2 * head_width**2
    assert num_blocks == CONFIG.encoder_depth + CONFIG.decoder_depth
    assert more.forward - plain.forward == added and more.backward - plain.backward == 2 * added
    assert estimated(CONFIG, SHORT) == counted_per_image(CONFIG, SHORT) > plain_rollout


def test_counting_draws_nothing() -> None:
    """Counts are printed in the middle of a run."""
    before = torch.get_rng_state()
    ScoringFlops(meta_model(CONFIG), NUM_TEXT)
    estimated(CONFIG, SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_packed_linears() -> None:
    packed = PackedLinear(torch.nn.Linear(5, 7), with_silu=True)
    with torch.no_grad():
        assert count_flops(lambda: packed(torch.ones(2, 3, 5)))[1] == 2 * 6 * 5 * 7
