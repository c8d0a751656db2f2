"""For all tests: one thread, deterministic kernels, a fixed global seed, the optional folder of large fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.use_deterministic_algorithms(True)


def shared_dir() -> Path:
    """The folder of fixtures too large for the repository: $STRUCTMAR_SHARED, or `shared` beside the repository."""
    return Path(os.environ.get("STRUCTMAR_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """`shared_dir()`; skips the test where it does not exist."""
    if not shared_dir().is_dir():
        pytest.skip(f"no shared fixtures at {shared_dir()} (set STRUCTMAR_SHARED)")
    return shared_dir()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Modules are initialised from the global generator: the same way in every test, whatever ran before."""
    torch.manual_seed(0)
