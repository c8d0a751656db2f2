"""A trace of some steps by torch.profiler (--profile_steps), for chrome://tracing or https://ui.perfetto.dev.

torch is imported where a run is profiled: the flag is checked before.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from util.output import UNFINISHED, writing

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps left out where only a number is asked for: the first ones are slower


def profiled_steps(text: str, start: int) -> range:
    """The steps that "A:B" (from step A up to, not including, step B) or "N" (N steps, soon after `start`) asks for.

    Steps are counted from 0, as many as are done before. Raises ValueError for anything else.
    """
    found = re.fullmatch(r"(?:(\d{1,12}):)?(\d{1,12})", text)
    if found is None:
        raise ValueError(f"--profile_steps must be a number of steps or FIRST:END, got {text!r}")
    first, end = found[1], int(found[2])
    steps = range(start + WARM_UP, start + WARM_UP + end) if first is None else range(int(first), end)
    if not steps:
        raise ValueError(f"--profile_steps {text} has no step in it")
    return steps


class StepProfiler:
    """Writes <folder>/steps-FIRST-END.json once the last of `steps` is done, or when the run ends before."""

    def __init__(self, steps: range, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self._profile: Any = None
        self._end = 0

    def before(self, step: int) -> None:
        """Before the step after `step` steps."""
        if step in self.steps and self._profile is None:
            import torch.profiler as torch_profiler  # slow to import: only where it is used

            self.steps = range(step, self.steps.stop)
            self._profile = torch_profiler.profile(record_shapes=True, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Once `step` steps are done."""
        self._end = step
        if step >= self.steps.stop:
            self.close()

    def close(self) -> None:
        if self._profile is None:
            return
        profile, self._profile, first = self._profile, None, self.steps.start
        self.steps = range(0)  # one trace a run
        profile.stop()
        path = self.folder / f"steps-{first}-{self._end}.json"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + UNFINISHED)
            profile.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        logger.info("trace of steps %d to %d: %s", first, self._end, path)


def build_profiler(steps: str, start: int, output_dir: str | Path, is_main: bool) -> StepProfiler | None:
    """On rank 0, where steps are asked for. steps: of `profiled_steps`, "" for none; start: the first one to come."""
    if not steps or not is_main:
        return None
    return StepProfiler(profiled_steps(steps, start), Path(output_dir) / "profile")
