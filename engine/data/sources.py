"""What a cached latent was made of: size, time, content and dimensions of its picture file.

A file with the size and time that were noted counts as the same; where these differ, as after copying, its content
decides.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.coco import CocoIndex

DIGEST_BYTES = 16
FACTS = ("bytes", "mtime_ns", "width", "height")


@dataclass(frozen=True, slots=True)
class Photograph:
    """An image of a split. size: (width, height) as the split's json says; None where there is no json."""

    id: int
    path: Path
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Source:
    """A picture file as it was when it was read. digest: of its content."""

    num_bytes: int
    mtime_ns: int
    size: tuple[int, int]
    digest: bytes

    @staticmethod
    def of(content: bytes, status: os.stat_result, size: tuple[int, int]) -> Source:
        """size: (width, height) of the picture that `content` is."""
        return Source(len(content), status.st_mtime_ns, size, content_digest(content))

    def to_tensors(self) -> tuple[Tensor, Tensor]:
        """-> facts [4] int64 in the order of FACTS, digest [16] uint8."""
        facts = torch.tensor([self.num_bytes, self.mtime_ns, *self.size], dtype=torch.int64)
        return facts, torch.tensor(list(self.digest), dtype=torch.uint8)

    @staticmethod
    def from_rows(facts: np.ndarray, digest: np.ndarray) -> Source:
        """The inverse, of rows of a shard."""
        num_bytes, mtime_ns, width, height = facts.tolist()
        return Source(num_bytes, mtime_ns, (width, height), bytes(digest.tolist()))

    def difference(self, photograph: Photograph) -> str | None:
        """What is another picture now, both values; None if it is the same. Raises FileNotFoundError or another OSError
        where the file cannot be read."""
        if photograph.size is not None and photograph.size != self.size:
            return f"{_words(self.size)} when it was cached, {_words(photograph.size)} in the split's json"
        status = os.stat(photograph.path)
        if (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.mtime_ns):
            return None
        digest = content_digest(photograph.path.read_bytes())
        if digest == self.digest:
            return None
        then, now = self.digest.hex()[:12], digest.hex()[:12]
        return f"{self.num_bytes} bytes with digest {then} when it was cached, {status.st_size} with {now} now"


def content_digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def photographs_of(index: CocoIndex) -> list[Photograph]:
    """All images of the index, in its order."""
    return [
        Photograph(image.id, index.image_path(position), (image.width, image.height))
        for position, image in enumerate(index.images)
    ]


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
