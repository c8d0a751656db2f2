"""Packages that only some commands need: imported when they are, asked for by name where they are missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def import_extra(package: str, purpose: str) -> ModuleType:
    """The package, for `purpose` ("plots", say). Raises ValueError, one line with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{purpose} need the package {package.split('.')[0]}, which cannot be imported ({error}); "
            f"install it: python -m pip install {pinned(package.split('.')[0])}"
        ) from error


def pinned(package: str) -> str:
    """The package with the version that requirements.txt names (without one where the file is not at hand)."""
    lines = _REQUIREMENTS.read_text(encoding="utf-8").splitlines() if _REQUIREMENTS.is_file() else []
    return next((line.strip() for line in lines if line.split("==")[0] == package), package)
