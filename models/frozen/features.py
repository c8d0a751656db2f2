"""Frozen networks as functions of pictures: feature vectors for a Frechet distance.

    pictures -> FeatureExtractor -> features [B, D] -> engine.eval.frechet.frechet_distance

A distance is called FID only over the features that define it (`inception.py`). Any other weights, and a detector's
backbone (here), give a number under another name. All weights are local files, loaded strictly; nothing is downloaded.

Left out: PIL's antialiased resizing (clean-fid), TensorFlow's own bilinear kernel, spatial features (sFID).

Shape letters: B pictures, C channels, D features, H and W pixels, h and w cells of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from models.frozen.faster_rcnn import Detector, load_detector
from util.images import Picture, to_model_range
from util.weights import tensor_problem


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network as a function of pictures.

    name: what a Frechet distance over these features is called. id: the file's sha256. dim: D.
    extract: B >= 1 pictures -> [B, D] on any device; a picture's features do not depend on its batch mates.
    """

    name: str
    id: str
    dim: int
    extract: Callable[[Sequence[Picture]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """uint8 [H, W, 3] pictures of any sizes, all at once -> float32 [B, D] on the CPU.

        Raises ValueError for something that is no picture.
        """
        check_pictures(pictures)
        if not pictures:
            return torch.zeros(0, self.dim)  # [0, D]
        features = self.extract(pictures).float().cpu()  # [B, D]
        assert features.shape == (len(pictures), self.dim), features.shape
        return features


def check_pictures(pictures: Sequence[Picture]) -> None:
    """Raises ValueError for the first that is not a uint8 [H, W, 3] array."""
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"picture {index} must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}")


def fitted_state(
    source: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor], ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors of `found` under the names of `wanted`, floating-point ones as float32.

    The only differences allowed are BatchNorm's step counters, which inference does not read and older files lack,
    and names in `found` that end in one of `ignored`. Raises ValueError naming `source` and listing all others.
    """
    counters = {name for name in wanted if name.endswith(".num_batches_tracked")}
    problems = [f"lacks {name}" for name in wanted if name not in found and name not in counters]
    problems += [f"has {name} besides" for name in found if name not in wanted and not name.endswith(tuple(ignored))]
    state = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    for name, tensor in wanted.items():
        value = found.get(name)
        if value is None:
            continue
        if isinstance(value, Tensor) and value.shape != tensor.shape:
            problems.append(f"{name} is {tuple(value.shape)}, not {tuple(tensor.shape)}")
        elif (problem := tensor_problem(name, value, tensor)) is not None:
            problems.append(problem)
        else:
            state[name] = value.float() if value.is_floating_point() else value
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit {what}: {'; '.join(problems[:3])}{more}")
    return state


def load_detector_features(path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The last feature map of a Faster R-CNN's backbone, averaged over the picture: a stand-in for Inception.

    The name is "Frechet distance (<architecture> features)": such numbers compare with one another, never with an FID.
    Pictures are resized and normalised as the detector does it. Of a pyramid, the last level with its own convolution.
    Raises FileNotFoundError or ValueError, one line naming the file, if it is no Faster R-CNN.
    """
    detector = load_detector(path, device)
    if not isinstance(detector, Detector):
        raise ValueError(f"{path} is no Faster R-CNN, it has no backbone whose features could be read")
    model = detector.model

    def extract(pictures: Sequence[Picture]) -> Tensor:
        features = torch.zeros(len(pictures), model.backbone.out_channels, device=device)  # [B, D]
        for rows in _rows_by_shape(pictures):  # of several sizes, the smaller ones would be padded
            images = [(to_model_range(pictures[row]).to(device) + 1) / 2 for row in rows]  # each [3, H, W]
            features[rows] = _backbone_means(model, images)  # [len(rows), D]
        return features

    name = f"Frechet distance ({detector.arch} features)"
    return FeatureExtractor(name, detector.id, int(model.backbone.out_channels), extract)


def _rows_by_shape(pictures: Sequence[Picture]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(row)
    return list(groups.values())


def _backbone_means(model: FasterRCNN, images: list[Tensor]) -> Tensor:
    """images: B of one size [3, H, W] in [0, 1] -> [B, D], the mean over the cells that do not lie in the padding."""
    batch, _ = model.transform(images)
    padded_height, padded_width = batch.tensors.shape[-2:]
    maps = model.backbone(batch.tensors)
    if not isinstance(maps, Tensor):
        maps = [level for name, level in maps.items() if name != "pool"][-1]  # [B, D, h, w]
    height, width = batch.image_sizes[0]
    h = math.ceil(height * maps.shape[2] / padded_height)
    w = math.ceil(width * maps.shape[3] / padded_width)
    return maps[:, :, :h, :w].mean((2, 3))  # [B, D]
