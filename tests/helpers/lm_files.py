"""A tiny causal language model's files, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scripts.mini.lm_training import build_tokenizer
from util.rng import derive_seed

TEXTS = ("a red dog", "a dog", "red red dog a", "一个红色的苹果", "两个苹果")
WIDTH, MAX_POSITIONS = 24, 160
SIZES = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN_NAMES = {"gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": MAX_POSITIONS}}


def tiny_lm(kind: str = "qwen2", vocab_size: int = 300, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Weights large enough for words to matter."""
    sizes = OWN_NAMES.get(kind, {**SIZES, "max_position_embeddings": MAX_POSITIONS})
    if kind in ("qwen2", "llama", "gemma3_text"):
        sizes = {**sizes, "num_key_value_heads": 1, "head_dim": 12}
    if kind == "gpt_neox":
        sizes = {**sizes, "rotary_pct": 1.0}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes, **special, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("tiny_lm", kind, seed))
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_lm(directory: Path, kind: str = "qwen2", seed: int = 0, max_shard_size: str = "1GB", **settings: Any) -> Path:
    """A folder with model and tokenizer. The tokenizer has no pad token of its own."""
    tokenizer = build_tokenizer(TEXTS, 300)
    tokenizer.pad_token = None
    tiny_lm(kind, len(tokenizer), seed, **settings).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory
