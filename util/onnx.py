"""The input shape of an ONNX file, read from its protobuf bytes: OpenCV runs such files, but does not tell it.

Only as much of the two formats as that takes. Wire format: https://protobuf.dev/programming-guides/encoding; field
numbers: `onnx.proto` of https://github.com/onnx/onnx.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 1


def read_input_shape(path: str | Path) -> tuple[int | None, ...]:
    """The shape of the only input of an ONNX model; None where a dimension has a name instead of a size.

    Raises ValueError naming the file if it is not ONNX or has another number of inputs than one.
    """
    try:
        inputs = _input_shapes(memoryview(Path(path).read_bytes()))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or not an ONNX file ({error})") from error
    if len(inputs) != 1:
        raise ValueError(f"{path}: expected an ONNX graph with one input, found {sorted(inputs) or 'none'}")
    return next(iter(inputs.values()))


def _input_shapes(model: memoryview) -> dict[str, tuple[int | None, ...]]:
    """Old exporters list the weights among the inputs: they are left out."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for graph in _parts(model, _MODEL_GRAPH):
        weights = {_text(tensor, _TENSOR_NAME) for tensor in _parts(graph, _GRAPH_INITIALIZER)}
        for value in _parts(graph, _GRAPH_INPUT):
            name = _text(value, _VALUE_NAME)
            if name not in weights:
                shapes[name] = tuple(_dim_value(dim) for dim in _follow(value, _VALUE_TYPE, _TYPE_TENSOR))
    return shapes


def _follow(value: memoryview, *path: int) -> list[memoryview]:
    """The dimensions of a graph's value."""
    messages = [value]
    for number in (*path, _TENSOR_SHAPE, _SHAPE_DIM):
        messages = [part for message in messages for part in _parts(message, number)]
    return messages


def _dim_value(dim: memoryview) -> int | None:
    sizes = [value for number, value in _fields(dim) if number == _DIM_VALUE and isinstance(value, int)]
    return sizes[-1] if sizes and sizes[-1] > 0 else None


def _text(message: memoryview, number: int) -> str:
    return "".join(str(part, "utf-8") for part in _parts(message, number))


def _parts(message: memoryview, number: int) -> list[memoryview]:
    """The bytes of every field `number`: strings or messages."""
    return [value for found, value in _fields(message) if found == number and isinstance(value, memoryview)]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message, in order. Raises IndexError where its bytes make no message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise IndexError(f"{size} bytes wanted at byte {at} of {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
