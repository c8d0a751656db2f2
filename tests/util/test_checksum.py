"""A bit that flips anywhere in a file of weights is an error, which names the file and the tensor it is in, if any."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from util.checkpoint import load_plain, safetensors_metadata, save_atomic, save_safetensors_atomic

TENSORS = {"first": torch.arange(5.0), "second": torch.ones(2, 3), "third": torch.full((4,), 0.5).half()}
CONTENT = {"model": TENSORS, "step": 3, "args": {"lr": 0.1, "name": "abc"}}
METADATA = {"config": '{"a": 1}', "stage": "full", "step": "3"}


def write(path: Path) -> Path:
    save_safetensors_atomic(TENSORS, path, METADATA) if path.suffix == ".safetensors" else save_atomic(CONTENT, path)
    return path


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_every_byte_counts(tmp_path: Path, name: str) -> None:
    whole, damaged, rng = write(tmp_path / name), tmp_path / f"damaged{name[1:]}", random.Random(0)
    load_plain(whole, mmap=True)
    size = whole.stat().st_size
    for byte in sorted({*range(0, size, 3), *range(size - 60, size)}):
        damaged.write_bytes(whole.read_bytes())
        flipped(damaged, 8 * byte + rng.randrange(8))
        with pytest.raises(ValueError, match=f"damaged{name[1:]}") as caught:
            load_plain(damaged, mmap=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_the_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    where = path.read_bytes().index(TENSORS["second"].numpy().tobytes())
    flipped(path, 8 * where + 3)
    with pytest.raises(ValueError, match=r"x\.\w+ is damaged: (model/)?second is not what was written"):
        load_plain(path, mmap=True)


def test_files_of_pytorch_alone_have_the_checksums_of_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(CONTENT, path)
    load_plain(path, mmap=True)
    flipped(path, 8 * path.read_bytes().index(TENSORS["first"].numpy().tobytes()) + 70)
    with pytest.raises(ValueError, match=r"x\.pth is damaged: model/first is not what was written"):
        load_plain(path, mmap=True)


def test_files_without_checksums_load(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", METADATA)
    assert load_plain(tmp_path / "x.safetensors").keys() == TENSORS.keys()


def test_written_again_by_the_library_it_is_the_same_to_a_checksum(tmp_path: Path) -> None:
    """It is of the content, not of the header's order."""
    path = write(tmp_path / "x.safetensors")
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert b'"checksums"' in path.read_bytes()[8 : 8 + length]
    assert safetensors_metadata(path) == METADATA
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_plain(path), tmp_path / "again.safetensors", metadata)
    assert load_plain(tmp_path / "again.safetensors").keys() == TENSORS.keys()
    save_file(load_plain(path) | {"first": torch.zeros(5)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=r"other\.safetensors is damaged: first"):
        load_plain(tmp_path / "other.safetensors")


def test_a_tensor_changed_by_another_program_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors_atomic({"weight": torch.ones(3)}, path, {"step": "1"})
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
    save_file({"weight": torch.full((3,), math.nan)}, path, metadata)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: weight .* \(weight is not finite"):
        load_plain(path)
