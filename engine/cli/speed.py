"""`--speed`: named sets of sampling options, for people who do not want to choose them one by one.

A preset stands right under what it is given beside: on the command line it yields to the flags there and wins over the
YAML file, in the file it yields to the file's other keys. It lowers numbers of iterations and steps and never raises
them. Its cost in quality is measured by `scripts.evaluate_layout` and `scripts.compare_heads` (README).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAST = {"precision": "bf16", "num_sampling_steps": 50, "num_sampling_steps_last": 5, "uncond_refresh": 4}
SPEEDS: dict[str, dict[str, Any]] = {"exact": {}, "fast": FAST, "faster": {**FAST, "num_iter": 32}}
LOWERED = ("num_sampling_steps", "num_iter")


def speed_preset(name: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, given the values that stand now (which it needs for those that it only lowers)."""
    preset = SPEEDS[name]
    return {key: min(value, current[key]) if key in LOWERED else value for key, value in preset.items()}
