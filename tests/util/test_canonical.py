"""Equal contents give equal bytes, however often and in whatever order they were put together, read and written."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from util.canonical import MAX_DEPTH, canonical
from util.checkpoint import load_plain, save_atomic, save_safetensors_atomic

WORDS = ("cpu", "storage", "model", "0", "12", "exp_avg", "a b", "ü", "", "cuda:0")


def content(rng: random.Random) -> dict[str, Any]:
    """Words that PyTorch's pickle uses too, values that repeat, tensors of several types and shapes."""
    tensors = {f"w{k}": torch.arange(6.0).view(2, 3) * k for k in range(3)}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.empty(0), "half": torch.ones(1, 4, dtype=torch.bfloat16)}
    args = {word: rng.choice([*WORDS, 1, 1.5, None, True, (1, "cpu"), [1, "12"], b"ab", b"a"]) for word in WORDS}
    groups = [{"params": list(WORDS), "betas": (0.9, 0.95)}, {"params": list(WORDS), "betas": (0.9, 0.95)}]
    return {"model": tensors, "args": args, "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "groups": groups}}


def put_together_otherwise(value: Any, rng: random.Random) -> Any:
    """The same content: keys in another order, strings that are objects of their own or one, tensors that are views."""
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        kind = rng.choice([dict, OrderedDict])
        return kind((put_together_otherwise(k, rng), put_together_otherwise(value[k], rng)) for k in keys)
    if isinstance(value, list | tuple):
        return type(value)(put_together_otherwise(entry, rng) for entry in value)
    if isinstance(value, str):
        return "".join(list(value)) if rng.random() < 0.7 else value
    if isinstance(value, torch.Tensor):
        return rng.choice([same, as_parameter, as_column, as_view])(value)
    return value


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(tensor.clone())


def as_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.clone()


def as_view(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor + 1])[0]


@pytest.mark.parametrize("seed", range(20))
def test_the_bytes_are_a_function_of_the_content(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    value = content(rng)
    files = [tmp_path / f"{number}.pth" for number in range(5)]
    save_atomic(value, files[0])
    for before, file in itertools.pairwise(files):
        value = put_together_otherwise(load_plain(before, mmap=rng.random() < 0.5), rng)
        save_atomic(value, file)
    assert {file.read_bytes() for file in files} == {files[0].read_bytes()}


def test_one_storage_under_two_names_is_written_as_two(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    save_atomic({"a": tensor, "b": tensor}, tmp_path / "shared.pth")
    save_atomic({"a": tensor, "b": tensor.clone()}, tmp_path / "apart.pth")
    assert (tmp_path / "shared.pth").read_bytes() == (tmp_path / "apart.pth").read_bytes()


def test_other_content_gives_other_bytes(tmp_path: Path) -> None:
    values = [1, 1.0, True, "1", [1], (1,), torch.tensor(1), torch.tensor(1.0), torch.tensor([1])]
    for number, value in enumerate(values):
        save_atomic({"x": value}, tmp_path / f"{number}.pth")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == len(values)


def test_exported_weights_too(tmp_path: Path) -> None:
    tensors = {f"w{k}": torch.arange(6.0).view(2, 3).t() + k for k in range(4)}
    metadata = {f"key {k}": str(k) for k in range(8)}
    save_safetensors_atomic(tensors, tmp_path / "0.safetensors", metadata)
    for number in range(1, 6):
        turned = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
        save_safetensors_atomic(turned[0], tmp_path / f"{number}.safetensors", turned[1])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_tensors_that_are_whole_are_not_copied() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert canonical({"w": tensor})["w"].data_ptr() == tensor.data_ptr()


def test_endless_depth_is_refused() -> None:
    value: dict[str, Any] = {}
    for _ in range(MAX_DEPTH + 2):
        value = {"a": value}
    with pytest.raises(ValueError, match=rf"lies deeper than {MAX_DEPTH} levels"):
        canonical(value)
