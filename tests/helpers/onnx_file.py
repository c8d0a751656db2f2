"""ONNX files of a few kilobytes, written without the package `onnx`: detectors that always say the same.

Wire format: https://protobuf.dev/programming-guides/encoding; field numbers: `onnx.proto` of github.com/onnx/onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FLOAT, UINT8, FLOAT16 = 1, 2, 10  # TensorProto's types
_INT64_LIST, _INT64 = 7, 2  # AttributeProto.INTS and INT


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


def value_info(name: str, shape: Sequence[int | str], kind: int = FLOAT) -> bytes:
    """A dimension is a size or a name."""
    dims = b"".join(part(1, number(1, size) if isinstance(size, int) else part(2, size)) for size in shape)
    return part(1, name) + part(2, part(1, number(1, kind) + part(2, dims)))


def node(name: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    """A node of one output; its attributes as `axis_list` and `integer` make them."""
    words = b"".join(part(1, each) for each in inputs) + part(2, output) + part(3, output) + part(4, name)
    return part(1, words + b"".join(part(5, each) for each in attributes))


def axis_list(name: str, values: Sequence[int]) -> bytes:
    return part(1, name) + b"".join(number(8, value) for value in values) + number(20, _INT64_LIST)


def integer(name: str, value: int) -> bytes:
    return part(1, name) + number(3, value) + number(20, _INT64)


def constant(name: str, values: np.ndarray, external: str | None) -> bytes:
    """An initializer; external: the file that is said to hold its values."""
    head = b"".join(number(1, size) for size in values.shape) + number(2, FLOAT) + part(8, name)
    if external is None:
        return part(5, head + part(9, values.astype("<f4").tobytes()))
    return part(5, head + part(13, part(1, "location") + part(2, external)) + number(14, 1))


def write_onnx(
    path: Path,
    outputs: Mapping[str, np.ndarray],
    input_shape: Sequence[int | str],
    *,
    input_kind: int = FLOAT,
    weights_are_inputs: bool = False,
    second_input: bool = False,
    external: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model whose outputs are the arrays [1, ., .] given, times the mean of its picture.

    weights_are_inputs: as exporters had it before 2019. second_input: an unused one. external: where the weights are.
    """
    graph = node("Cast", ["images"], "floats", integer("to", FLOAT))
    graph += node("ReduceMean", ["floats"], "rows", axis_list("axes", [3]), integer("keepdims", 0))  # [B, 3, H]
    graph += node("ReduceMean", ["rows"], "mean", axis_list("axes", [1, 2]), integer("keepdims", 1))  # [B, 1, 1]
    graph += b"".join(node("Mul", [f"raw_{name}", "mean"], name) for name in outputs) + part(2, "g")
    graph += b"".join(constant(f"raw_{name}", values, external) for name, values in outputs.items())
    graph += part(11, value_info("images", input_shape, input_kind))
    if second_input:
        graph += part(11, value_info("sizes", [1, 2]))
    if weights_are_inputs:
        graph += b"".join(part(11, value_info(f"raw_{name}", values.shape)) for name, values in outputs.items())
    for name, values in outputs.items():
        graph += part(12, value_info(name, [input_shape[0], *values.shape[1:]]))
    notes = b"".join(part(14, part(1, key) + part(2, value)) for key, value in (metadata or {}).items())
    path.write_bytes(number(1, 7) + part(7, graph) + part(8, number(2, 11)) + notes)
    return path
