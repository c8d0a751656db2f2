"""Stateless randomness: every draw is keyed by what it is for, never by what was drawn before it.

    noise = torch.randn(shape, generator=generator(seed, "noise", step, rank))

A resumed run, another batch size or another number of workers then makes the same draws, and a checkpoint needs no
generator states. The global generators of torch, numpy and python are never touched.
"""

from __future__ import annotations

import hashlib
import operator

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, its position and its type; the same on every machine.

    Raises TypeError for parts that are neither strings nor whole numbers, ValueError for no parts.
    """
    if not parts:
        raise ValueError("derive_seed needs at least one part")
    digest = hashlib.blake2b(digest_size=8, person=b"structmar")
    for part in parts:
        tagged = "s" + part if isinstance(part, str) else f"i{operator.index(part)}"
        encoded = tagged.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded with `derive_seed(*parts)`. (torch's CPU generator uses the low 32 bits.)"""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
