"""A trainer that dies in the middle, and the same command again."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest


class Killed(BaseException):
    """What ends it."""


def run_killed_and_again(
    program: ModuleType, module: ModuleType, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs a trainer that dies right after saving its state, then the same command again. module: what the program
    runs."""
    save_state = module.save_state

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save_state(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_state", save_and_die)
        with pytest.raises(Killed):
            program.main(arguments)
    program.main(arguments)
