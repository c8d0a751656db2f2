"""--keep_best: the averaged weights of the best evaluation so far, alone, as checkpoint-best.safetensors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import Source, whole_model
from engine.train.parallel import gathered
from engine.train.state import TrainState
from util.checkpoint import safetensors_metadata, save_safetensors_atomic
from util.distributed import DistInfo, failing_together
from util.names import BEST_NAME, LOWER_IS_BETTER

logger = logging.getLogger(__name__)

METADATA_KEY = "best"  # {"name", "value", "step"}, also in training checkpoints: a run that goes on knows what to beat


@dataclass
class BestKeeper:
    """Is told the scores of every evaluation, on every process. name: the score that decides, "" to keep nothing; of
    equal ones the first stays. best: its name, value and step so far."""

    name: str
    state: TrainState
    output_dir: Path
    stage: str
    identity: Identity
    dist: DistInfo
    best: dict[str, Any] | None = None

    def restore(self, source: Source) -> None:
        """What was the best when the run stopped, or of the file itself where a run starts from its own folder's."""
        own = self.output_dir / BEST_NAME
        known: Any = source.state.get(METADATA_KEY) if source.kind == "continue" else None
        if source.kind == "start" and source.path is not None and source.path.resolve() == own.resolve():
            known = json.loads(safetensors_metadata(own).get(METADATA_KEY, "null"))
        if isinstance(known, dict) and known.get("name") == self.name:
            self.best = known

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """scores: by name, `eval/AP50` and so on. Writes the weights if they are the best; every process calls it."""
        value = scores.get(self.name, math.nan)
        if not math.isfinite(value) or not self._is_better(value):
            return
        self.best = {"name": self.name, "value": value, "step": step}
        weights = whole_model(self.state) | gathered(self.state.ema.state_dict())
        identity = replace(self.identity, stage=self.stage, step=step, weights="ema")
        with failing_together():
            if self.dist.is_main:
                metadata = identity.to_metadata() | {METADATA_KEY: json.dumps(self.best)}
                save_safetensors_atomic(weights, self.output_dir / BEST_NAME, metadata)
                logger.info("%s %.4f at step %d is the best so far: %s", self.name, value, step, BEST_NAME)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self.best is None else {METADATA_KEY: self.best}

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value < self.best["value"] if self.name in LOWER_IS_BETTER else value > self.best["value"]
