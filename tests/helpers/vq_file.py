"""A small VQ tokenizer in LlamaGen's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from models.frozen.vq import VqConfig, build_vq, llamagen_checkpoint

TINY_VQ = VqConfig((8, 16), 1, 8, 32, 4, norm_num_groups=4)  # stride 2, 32 codes


def write_vq(path: Path, config: VqConfig = TINY_VQ) -> Path:
    """Random weights: every image has many codes, none of them sensible."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_vq(config)
        network.quantize.embedding.weight.data.normal_()
    torch.save(llamagen_checkpoint(network, torch.float32), path)
    return path
