"""Image quality beside the layout numbers: Frechet distances to the real images, and CLIP score; what was asked for.

Every process takes its share of the pictures; statistics are merged, so the numbers do not depend on their number.
Distances of several seeds are means of one per seed: pooling seeds would change N, and with it the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.eval.frechet import FrechetStatistics, collect_statistics, frechet_distance
from engine.eval.pictures import PictureOf
from engine.eval.targets import EvalSet, Target
from models.frozen.clip_score import ClipScorer, load_clip
from models.frozen.features import FeatureExtractor, load_detector_features
from models.frozen.inception import load_inception
from util.distributed import DistInfo, gather_objects

CLIP_BATCH = 32


@dataclass(frozen=True)
class QualityMetrics:
    """extractors: one Frechet distance each, named by it. clip: None without CLIP score."""

    extractors: tuple[FeatureExtractor, ...]
    clip: ClipScorer | None

    def references(self, eval_set: EvalSet, dist: DistInfo) -> list[FrechetStatistics]:
        """The statistics of the real images, one for each extractor."""
        return [_statistics(extractor, eval_set.targets, eval_set.picture, dist) for extractor in self.extractors]

    def measure(
        self,
        targets: Sequence[Target],
        sources: Sequence[PictureOf],
        references: Sequence[FrechetStatistics],
        dist: DistInfo,
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Number by name, and what each rests on. sources: the row's pictures, by seed."""
        values: dict[str, float] = {}
        notes: dict[str, str] = {}
        for extractor, reference in zip(self.extractors, references, strict=True):
            found = [frechet_distance(_statistics(extractor, targets, source, dist), reference) for source in sources]
            values[extractor.name] = float(np.mean([each.value for each in found]))
            notes[extractor.name] = found[0].note
        if self.clip is not None:
            with_text = [target for target in targets if target.scene.prompt.strip()]
            means = [_clip_mean(self.clip, with_text, source, dist) for source in sources]
            values[self.clip.name] = float(np.mean(means))
            notes[self.clip.name] = f"{len(with_text)} pictures with captions"
        return values, notes


def load_quality_metrics(
    inception: str | None, features: str | None, clip: str | None, device: torch.device
) -> QualityMetrics:
    """From files, each optional. Raises FileNotFoundError or ValueError naming what is missing or does not fit."""
    extractors = []
    if inception:
        extractors.append(load_inception(inception, device))
    if features:
        extractors.append(load_detector_features(features, device))
    return QualityMetrics(tuple(extractors), load_clip(clip, device) if clip else None)


def _statistics(
    extractor: FeatureExtractor, targets: Sequence[Target], source: PictureOf, dist: DistInfo
) -> FrechetStatistics:
    own = collect_statistics(extractor, (source(target) for target in targets[dist.rank :: dist.world_size]))
    merged = FrechetStatistics.empty(extractor.dim)
    for part in gather_objects(own):
        merged = merged.merged(part)
    return merged


def _clip_mean(clip: ClipScorer, targets: Sequence[Target], source: PictureOf, dist: DistInfo) -> float:
    own = targets[dist.rank :: dist.world_size]
    scores: list[float] = []
    for start in range(0, len(own), CLIP_BATCH):
        batch = own[start : start + CLIP_BATCH]
        prompts = [target.scene.prompt for target in batch]
        scores += clip.clip_scores([source(target) for target in batch], prompts).tolist()
    return float(np.mean([score for part in gather_objects(scores) for score in part]))
