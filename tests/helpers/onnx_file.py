"""ONNX files of a few kilobytes, written without the package `onnx`: a YOLOX that always says the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_FLOAT, _INT64_LIST, _INT64 = 1, 7, 2  # TensorProto.FLOAT, AttributeProto.INTS and INT


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def part(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    groups = []
    while True:
        value, group = value >> 7, value & 0x7F
        groups.append(group | (0x80 if value else 0))
        if not value:
            return bytes(groups)


def value_info(name: str, shape: Sequence[int | str]) -> bytes:
    """A dimension is a size or a name."""
    dims = b"".join(part(1, number(1, size) if isinstance(size, int) else part(2, size)) for size in shape)
    return part(1, name) + part(2, part(1, number(1, _FLOAT) + part(2, dims)))


def write_yolox(
    path: Path, raw: np.ndarray, input_shape: Sequence[int | str], weights_are_inputs: bool = False
) -> Path:
    """A model whose output is `raw` times the mean of its input; `weights_are_inputs`: as exporters did before 2019."""
    weights = b"".join(number(1, size) for size in raw.shape) + number(2, _FLOAT) + part(8, "raw")
    weights += part(9, raw.astype("<f4").tobytes())
    axes = part(1, "axes") + b"".join(number(8, axis) for axis in (1, 2, 3)) + number(20, _INT64_LIST)
    keep = part(1, "keepdims") + number(3, 0) + number(20, _INT64)
    mean = part(1, "images") + part(2, "mean") + part(3, "a") + part(4, "ReduceMean") + part(5, axes) + part(5, keep)
    product = part(1, "raw") + part(1, "mean") + part(2, "output") + part(3, "b") + part(4, "Mul")
    graph = (
        part(1, mean) + part(1, product) + part(2, "g") + part(5, weights) + part(11, value_info("images", input_shape))
    )
    if weights_are_inputs:
        graph += part(11, value_info("raw", raw.shape))
    graph += part(12, value_info("output", raw.shape))
    path.write_bytes(number(1, 7) + part(7, graph) + part(8, number(2, 11)))
    return path
