"""`--speed`: named sets of sampling options, for people who do not want to choose them one by one.

A preset on the command line wins over the YAML file, but every other flag on the command line wins over the preset.
A preset in the YAML file loses to every other key of that file. A preset lowers numbers of iterations and steps; where
the number is lower already, it stays. What a preset costs in quality is measured by `scripts.evaluate_layout` and
`scripts.compare_heads` (models/sampling/README.md). Weights with a few-step head draw with it in all presets but exact,
unless the command line or its file asks for guidance, which that head does not take (engine/cli/sampling.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAST = {"precision": "bf16", "num_sampling_steps": 50, "num_sampling_steps_last": 5, "uncond_refresh": 4}
SPEEDS: dict[str, dict[str, Any]] = {"exact": {}, "fast": FAST, "faster": {**FAST, "num_iter": 32}}
LOWERED = ("num_sampling_steps", "num_iter")


def speed_preset(name: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset. current: the values without it; of LOWERED, a smaller number stays."""
    preset = SPEEDS[name]
    return {
        key: min(value, current[key]) if key in LOWERED and current[key] is not None else value
        for key, value in preset.items()
    }
