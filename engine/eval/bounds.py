"""Detections in real images, kept for other evaluations: a bound is the same for every model, and costs as much.

One file for each bound, named by a hash of all that its detections depend on: the photographs' contents, the profile,
the detector with the categories asked of it, the VAE of a round trip, and what computes. So another detector, profile
or photograph finds no file. A file that does not hold what its name says is replaced by what is detected anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.eval.ap import check_detections
from engine.eval.judge import Json, Judge
from engine.eval.targets import EvalSet
from util.distributed import DistInfo, gather_objects
from util.output import write_text_atomic
from util.read import read_bytes, read_json

logger = logging.getLogger(__name__)

BOUND_FORMAT = "structmar-bound-1"


@dataclass(frozen=True)
class BoundStore:
    """A folder of bounds that several evaluations share; made when the first one is kept."""

    folder: Path

    def detections(
        self, identity: Json, image_ids: Sequence[int], detect: Callable[[], list[Json]], dist: DistInfo
    ) -> list[Json]:
        """What is kept for `identity` (`bound_identity`), else what `detect` gives, which is kept then.

        Called by all processes: rank 0 reads and writes, and `detect` is called by all or none.
        """
        path = self.folder / f"{_digest(identity)[:24]}.json"
        kept = gather_objects(self._read(path, identity, image_ids) if dist.is_main else None)[0]
        if kept is not None:
            logger.info("%s: detections of an earlier evaluation, %s", identity["row"], path)
            return kept
        found = detect()
        if dist.is_main:
            content = {"format": BOUND_FORMAT, "identity": identity, "sha256": _digest(found), "detections": found}
            write_text_atomic(path, json.dumps(content, allow_nan=False) + "\n")
        return found

    def _read(self, path: Path, identity: Json, image_ids: Sequence[int]) -> list[Json] | None:
        if not path.exists():
            return None
        try:
            content = read_json(path, "bound")
            _require_fitting(content, identity)
            check_detections(content["detections"], image_ids)
        except (ValueError, FileNotFoundError) as error:
            logger.warning("%s; the bound is detected anew", error)
            return None
        detections: list[Json] = content["detections"]
        return detections


def bound_identity(row: str, eval_set: EvalSet, judge: Judge, made_of: Json, device: torch.device) -> Json:
    """All that the row's detections depend on, as plain values. made_of: what the photographs went through."""
    return {
        "row": row,
        **made_of,
        "photographs": _photographs_sha256(eval_set),
        "profile": eval_set.profile.hash,
        "detector": judge.detector.id,
        "categories": _digest(sorted(judge.dataset_id.items()))[:24],
        "torch": torch.__version__,
        "device": device.type,
    }


def _photographs_sha256(eval_set: EvalSet) -> str:
    """Of the targets' ids and their photographs' contents. Raises FileNotFoundError or ValueError naming a file."""
    digest = hashlib.sha256()
    for target in eval_set.targets:
        content = read_bytes(eval_set.root / eval_set.split / target.file_name, "image")
        digest.update(f"{target.image_id} {target.source_size} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _require_fitting(content: Any, identity: Json) -> None:
    if not isinstance(content, dict) or content.get("format") != BOUND_FORMAT:
        raise ValueError(f"a bound of {identity['row']} was expected, in format {BOUND_FORMAT}")
    if content.get("identity") != identity:
        raise ValueError(f"a bound of {identity} was expected, found {content.get('identity')}")
    if content.get("sha256") != _digest(content.get("detections")):
        raise ValueError(f"the bound of {identity['row']} was changed: its checksum does not fit")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
