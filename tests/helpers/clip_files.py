"""A tiny CLIP text model's files."""

from __future__ import annotations

import json
from pathlib import Path

BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def write_tokenizer(directory: Path) -> int:
    """A byte-level CLIP tokenizer with three merged words; returns its size."""
    merges = ["r e", "re d</w>", "d o", "do g</w>"]
    tokens = [*BYTES, *(byte + "</w>" for byte in BYTES), "re", "red</w>", "do", "dog</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return len(tokens)


def text_settings(vocab_size: int) -> dict[str, int]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    return {**sizes, **special, "vocab_size": vocab_size, "max_position_embeddings": 12, "projection_dim": 8}
