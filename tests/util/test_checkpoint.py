"""Checkpoint files: atomic whatever kills the writer, plain, refused with one line naming the file."""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT
from util.checkpoint import (
    load_plain,
    safetensors_metadata,
    save_atomic,
    save_safetensors_atomic,
    sha256_file,
    sha256_tensors,
)

STATE: dict[str, Any] = {
    "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), half=torch.ones(2, dtype=torch.bfloat16)),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
    "epoch": 2,
    "note": None,
}


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "new" / "folders" / "checkpoint-last.pth"
    save_atomic(STATE, path)
    for source in (path, path.parent, str(path)):  # a folder stands for its checkpoint-last.pth
        loaded = load_plain(source, mmap=mmap)
        assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
        assert loaded["model"]["half"].dtype == torch.bfloat16
        assert loaded["optimizer"]["param_groups"] == STATE["optimizer"]["param_groups"]
        assert loaded["epoch"] == 2 and loaded["note"] is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_safetensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_safetensors_atomic({"w": torch.arange(6).view(2, 3).t()}, path, {"arch": "mini"})
    assert torch.equal(load_plain(path)["w"], torch.arange(6).view(2, 3).t())
    assert safetensors_metadata(path) == {"arch": "mini"}
    save_file({"w": torch.ones(1)}, path)
    assert safetensors_metadata(path) == {}


def test_mar_checkpoint_with_namespace(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-last.pth"
    args = argparse.Namespace(img_size=256, nested=argparse.Namespace(a=1))
    torch.save({"model": {"w": torch.ones(1)}, "args": args}, path)
    assert load_plain(tmp_path)["args"] == {"img_size": 256, "nested": {"a": 1}}


def test_the_format_before_zip_files_loads(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_plain(tmp_path / "old.ckpt", mmap=True)["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [Path("x")]}, r"checkpoint\['a'\]\[0\] is a pathlib"),
        ({"lr": np.float64(1.0)}, r"checkpoint\['lr'\] is a numpy.float64"),
        ({"args": argparse.Namespace()}, "argparse.Namespace"),
        ({"a": {1.5: 0}}, r"checkpoint\['a'\]: key 1.5 is a float"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path: Path, value: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        save_atomic(value, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    save_atomic({"version": 1}, path)

    def full_disk(obj: object, file: Any) -> None:
        file.write(b"PK\x03\x04 half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_atomic({"version": 2}, path)
    assert load_plain(path) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


# Killed while saving.

KILLED = """
import os, signal, sys, torch
from util import checkpoint

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(obj, file):
    import io
    whole = io.BytesIO()
    save(obj, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()

save = torch.save
path, moment = sys.argv[1:]
checkpoint.save_atomic({"version": 1, "w": torch.full((1000,), 1.0)}, path)
if moment == "write":
    torch.save = write_half
else:
    setattr(checkpoint.os, moment, die)
checkpoint.save_atomic({"version": 2, "w": torch.full((1000,), 2.0)}, path)
"""

LOOPING = """
import itertools, sys, torch
from util.checkpoint import save_atomic
for version in itertools.count(1):
    save_atomic({"version": version, "w": torch.full((1_000_000,), float(version))}, sys.argv[1])
    if version == 1:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_kill_9_at_every_moment_of_saving_keeps_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "checkpoint-last.pth"
    result = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=ROOT, check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-last.pth.tmp").exists()  # it did die in between
    for source in (path, tmp_path):
        loaded = load_plain(source)
        assert loaded["version"] == 1 and torch.equal(loaded["w"], torch.full((1000,), 1.0))
    if moment == "write":
        with pytest.raises(ValueError, match=r"checkpoint-last.pth.tmp is truncated"):
            load_plain(tmp_path / "checkpoint-last.pth.tmp")
    save_atomic({"version": 3}, path)  # the leftover is in nobody's way
    assert load_plain(path) == {"version": 3} and list(tmp_path.iterdir()) == [path]


def test_kill_9_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for delay in (0.0, 0.013, 0.05):
        with subprocess.Popen([sys.executable, "-c", LOOPING, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            process.kill()
        loaded = load_plain(path)
        assert torch.equal(loaded["w"], torch.full((1_000_000,), float(loaded["version"])))


# What is refused.


class _Foreign:
    pass


def _bad_files(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.pth"
    torch.save({"w": torch.ones(1000)}, whole)
    save_file({"w": torch.ones(1000)}, folder / "whole.safetensors")
    contents = {
        "empty.pth": b"",
        "cut.pth": whole.read_bytes()[:2000],
        "cut.safetensors": (folder / "whole.safetensors").read_bytes()[:2000],
        "page.ckpt": b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>",
        "page.safetensors": b"<html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "text.pth": b"not a checkpoint at all",
        "wrong.safetensors": whole.read_bytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save(_Foreign(), folder / "foreign.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(argparse.Namespace(a=1), folder / "namespace.pth")
    old = folder / "old.pth"
    torch.save({"w": torch.ones(1000)}, old, _use_new_zipfile_serialization=False)
    (folder / "cut_old.pth").write_bytes(old.read_bytes()[:-500])
    (folder / "folder").mkdir()
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("missing.pth", FileNotFoundError, "does not exist"),
        ("folder", FileNotFoundError, r"is a folder without checkpoint-last\.pth"),
        ("empty.pth", ValueError, "is empty"),
        ("cut.pth", ValueError, "is truncated"),
        ("cut_old.pth", ValueError, "is truncated or not a checkpoint"),
        ("cut.safetensors", ValueError, "is truncated or not a safetensors file"),
        ("wrong.safetensors", ValueError, "not a safetensors file"),
        ("page.ckpt", ValueError, "is a web page, not weights"),
        ("page.safetensors", ValueError, "is a web page, not weights"),
        ("pointer.pth", ValueError, "is a Git LFS pointer"),
        ("text.pth", ValueError, "is truncated or not a checkpoint"),
        ("foreign.pth", ValueError, r"holds a .*_Foreign, neither a tensor nor a plain value"),
        ("list.pth", ValueError, "holds a list, a checkpoint is a dictionary"),
        ("namespace.pth", ValueError, "holds a Namespace, a checkpoint is a dictionary"),
    ],
)
def test_bad_files_get_one_line_naming_them(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    path = _bad_files(tmp_path).get(name, tmp_path / name)
    with pytest.raises(kind, match=message) as caught:
        load_plain(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(300)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for length in range(0, len(content) - 1, 97):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            load_plain(tmp_path / "cut.pth")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"weights")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"weights").hexdigest()


def test_the_hash_of_tensors_is_of_their_content():
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3, dtype=torch.int64)}
    same = {"a": torch.tensor(3), "b": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)}
    assert sha256_tensors(weights) == sha256_tensors(same)
    others = [
        weights | {"a": torch.tensor(4)},
        weights | {"a": torch.tensor(3, dtype=torch.int32)},
        weights | {"b": weights["b"].reshape(3, 2)},
        {"c": weights["b"], "a": weights["a"]},
    ]
    assert len({sha256_tensors(each) for each in [weights, *others]}) == 5
