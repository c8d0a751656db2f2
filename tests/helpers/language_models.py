"""Tiny causal language models of many families, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from models.mars.model import Mars, MarsConfig

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.2,  # so that attention is far from even
}
Builder = Callable[..., Any]


def _family(model_class: Any, config_class: Any, **own: Any) -> Builder:
    def build(dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any) -> Any:
        config = config_class(**{**SIZES, **own, **options}, attn_implementation=attention)
        return model_class(config).to(dtype).eval()

    return build


FAMILIES: dict[str, Builder] = {
    "qwen2": _family(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False),
    "qwen2 tied": _family(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),
    "qwen3": _family(Qwen3ForCausalLM, Qwen3Config, head_dim=4),
    "llama": _family(LlamaForCausalLM, LlamaConfig),
    "mistral": _family(MistralForCausalLM, MistralConfig, sliding_window=None),
    "gemma3": _family(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=4, sliding_window=600),
    "phi3": _family(Phi3ForCausalLM, Phi3Config),
    "olmo2": _family(Olmo2ForCausalLM, Olmo2Config),
    "smollm3": _family(SmolLM3ForCausalLM, SmolLM3Config),
    "gpt_neox": _family(GPTNeoXForCausalLM, GPTNeoXConfig, attention_dropout=0.5, hidden_dropout=0.5),
    "opt": _family(OPTForCausalLM, OPTConfig, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5),
}
DEFAULT = "qwen2"
GRID = (2, 4)
NUM_CODES = 8


def tiny_mars(
    family: str = DEFAULT,
    grid: tuple[int, int] = GRID,
    seed: int = 0,
    low_grid: tuple[int, int] | None = None,
    **options: Any,
) -> Mars:
    """Experts and head moved away from where they start, so that nothing is equal by accident."""
    config = MarsConfig(NUM_CODES, grid, low_grid=low_grid)
    return moved(Mars(FAMILIES[family](**options), config, torch.Generator().manual_seed(seed)), seed)


@torch.no_grad()
def moved(model: Mars, seed: int = 0, size: float = 0.1) -> Mars:
    """Adds noise to all that trains, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()
