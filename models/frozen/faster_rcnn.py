"""The detectors that score and reward generated images: frozen, from a local file.

A file `*.onnx` is one of `onnx_detector.py`'s kinds; any other one is torchvision's Faster R-CNN, in one of three
architectures: `fasterrcnn_resnet50_fpn_v2` (torchvision's, with its COCO weights file as it is downloaded: a bare state
dict, whose 91 labels are COCO's category ids), and two for small images. `SMALL` is seven plain convolutions of stride
8 with BatchNorm. `SMALL_FPN` has residual blocks with GroupNorm, a pyramid of strides 4 and 8, another input size and
other anchors, so that its errors are less like those of `SMALL`: where one is the reward, the other judges. The small
ones' files state architecture and categories, {"model", "arch", "categories"}; the large one's may too.

Images go in at any size, [3, H, W] in [0, 1]; boxes come out in pixels of that size. Training is torchvision's own
(`detector.model(images, targets)` gives the losses).

Shape letters: n detections of an image, B images, C and D channels, K labels (categories and the background).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from models.config import DETECTORS, RESNET50_FPN_V2, SMALL, SMALL_FPN
from models.frozen.detections import BoxDetector as BoxDetector
from models.frozen.detections import Detections as Detections
from models.frozen.detections import DetectorSettings as DetectorSettings
from models.frozen.detections import coco_categories, fitting_batches
from models.frozen.onnx_detector import OnnxDetector
from util.checkpoint import load_plain, sha256_file
from util.types import Category, require_distinct
from util.weights import tensor_problem

SMALL_INPUT_SIDE = 128
_SMALL_LAYERS = ((24, 2), (32, 1), (48, 2), (64, 1), (96, 2), (96, 1), (96, 1))  # channels, stride
_SMALL_HEAD_WIDTH = 128
_SMALL_ANCHOR_SIDES = (22, 38, 66)
_SMALL_ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width

SMALL_FPN_INPUT_SIDE = 96
_FPN_STEM_WIDTH = 32
_FPN_LEVEL_WIDTHS = (48, 96)  # of strides 4 and 8
_FPN_WIDTH = 64
_FPN_HEAD_WIDTH = 128
_FPN_POOLED_SIDE = 6
_FPN_ANCHOR_SIDES = ((16, 24), (34, 50))  # by level, pixels of the input
_FPN_ANCHOR_RATIOS = (0.6, 1.0, 1.7)
_FPN_SPLIT_SIDE = 30  # regions of this side (root of the area) and more are read from stride 8, others from stride 4
_CLASSIFIER_WEIGHT = "roi_heads.box_predictor.cls_score.weight"
_WHERE_TO_GET = (
    f"{RESNET50_FPN_V2}'s is https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"
)


class SmallBackbone(nn.Sequential):
    """Seven 3x3 convolutions with BatchNorm and ReLU: [B, 3, H, W] -> [B, 96, H / 8, W / 8]."""

    def __init__(self) -> None:
        layers, width_in = [], 3
        for width, stride in _SMALL_LAYERS:
            convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            width_in = width
        super().__init__(*layers)
        self.out_channels = width_in  # torchvision's FasterRCNN asks for it


def _build_small(num_classes: int) -> FasterRCNN:
    backbone = SmallBackbone()
    pooled = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    return FasterRCNN(
        backbone,
        min_size=SMALL_INPUT_SIDE,
        max_size=SMALL_INPUT_SIDE,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        rpn_anchor_generator=AnchorGenerator((_SMALL_ANCHOR_SIDES,), (_SMALL_ANCHOR_RATIOS,)),
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=150,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=60,
        rpn_batch_size_per_image=128,
        box_roi_pool=pooled,
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, _SMALL_HEAD_WIDTH),
        box_predictor=SmallPredictor(_SMALL_HEAD_WIDTH, num_classes),
        box_batch_size_per_image=64,
        box_detections_per_img=50,
    )


class NormalizedConv(nn.Sequential):
    """3x3 convolution without bias and GroupNorm in groups of 8 channels: [B, C, H, W] -> [B, D, H / s, W / s]."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False), nn.GroupNorm(width // 8, width))


class ResidualLevel(nn.Module):
    """A strided convolution, then one residual block: [B, C, H, W] -> [B, D, H / 2, W / 2]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.down = NormalizedConv(width_in, width, 2)
        self.first = NormalizedConv(width, width, 1)
        self.second = NormalizedConv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.down(x))  # [B, D, H / 2, W / 2]
        return F.silu(x + self.second(F.silu(self.first(x))))  # [B, D, H / 2, W / 2]


class SmallPyramid(nn.Module):
    """A feature pyramid of two levels: [B, 3, H, W] -> {"0": [B, C, H / 4, W / 4], "1": [B, C, H / 8, W / 8]}."""

    def __init__(self) -> None:
        super().__init__()
        fine, coarse = _FPN_LEVEL_WIDTHS
        self.stem = NormalizedConv(3, _FPN_STEM_WIDTH, 2)
        self.fine = ResidualLevel(_FPN_STEM_WIDTH, fine)
        self.coarse = ResidualLevel(fine, coarse)
        self.pyramid = FeaturePyramidNetwork([fine, coarse], _FPN_WIDTH)
        self.out_channels = _FPN_WIDTH  # torchvision's FasterRCNN asks for it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(F.silu(self.stem(x)))  # [B, 48, H / 4, W / 4]
        levels: dict[str, Tensor] = self.pyramid(OrderedDict([("0", fine), ("1", self.coarse(fine))]))
        return levels


def _build_small_fpn(num_classes: int) -> FasterRCNN:
    backbone = SmallPyramid()
    pooled = MultiScaleRoIAlign(
        ["0", "1"], _FPN_POOLED_SIDE, sampling_ratio=2, canonical_scale=_FPN_SPLIT_SIDE, canonical_level=3
    )
    return FasterRCNN(
        backbone,
        min_size=SMALL_FPN_INPUT_SIDE,
        max_size=SMALL_FPN_INPUT_SIDE,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        rpn_anchor_generator=AnchorGenerator(_FPN_ANCHOR_SIDES, (_FPN_ANCHOR_RATIOS,) * 2),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=150,
        rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=80,
        rpn_batch_size_per_image=128,
        box_roi_pool=pooled,
        box_head=TwoMLPHead(_FPN_WIDTH * _FPN_POOLED_SIDE**2, _FPN_HEAD_WIDTH),
        box_predictor=SmallPredictor(_FPN_HEAD_WIDTH, num_classes),
        box_batch_size_per_image=64,
        box_detections_per_img=50,
    )


class SmallPredictor(nn.Module):
    """Class scores [n, K] and a box per class [n, 4 K] from features [n, width]; torchvision's parameter names."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes)
        self.bbox_pred = nn.Linear(width, 4 * num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features), self.bbox_pred(features)  # [n, K], [n, 4 K]


def build_detector(arch: str, num_classes: int) -> FasterRCNN:
    """A Faster R-CNN with new weights for `num_classes` labels, the background (0) among them; nothing is downloaded.

    Raises ValueError for an unknown `arch` or fewer than two labels.
    """
    if num_classes < 2:
        raise ValueError(f"a detector needs at least 2 labels (one is the background), got num_classes={num_classes}")
    if arch == SMALL:
        return _build_small(num_classes)
    if arch == SMALL_FPN:
        return _build_small_fpn(num_classes)
    if arch == RESNET50_FPN_V2:
        return fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=num_classes)
    raise ValueError(f"unknown detector {arch!r}; known are {', '.join(DETECTORS)}")


class Detector:
    """A frozen Faster R-CNN together with its file's id and categories.

    Attributes: model; arch; id (the file's sha256); categories (sorted by id); category_ids [K] (label -> the dataset's
    id; 0 for the background and for labels without a category).
    """

    def __init__(self, model: FasterRCNN, arch: str, category_of_label: Mapping[int, Category], file_id: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.arch = arch
        self.id = file_id
        self.categories = tuple(sorted(category_of_label.values(), key=lambda category: category.id))
        device = next(model.parameters()).device
        num_labels = model.roi_heads.box_predictor.cls_score.out_features
        ids = [category_of_label[label].id if label in category_of_label else 0 for label in range(num_labels)]
        self.category_ids = torch.tensor(ids, device=device)  # [K]

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """images: B tensors [3, H, W] in [0, 1] on the detector's device -> B `Detections`, each of its image alone."""
        found: dict[int, Detections] = {}
        for positions in fitting_batches(images):
            outputs = self.model([images[position] for position in positions])
            for position, output in zip(positions, outputs, strict=True):
                category_ids = self.category_ids[output["labels"]]  # [n]
                named = category_ids > 0  # [n]
                boxes_px, scores = output["boxes"][named], output["scores"][named]  # [n, 4], [n]
                found[position] = Detections(boxes_px, category_ids[named], scores)
        return [found[position] for position in range(len(images))]


def detector_checkpoint(
    model: FasterRCNN, arch: str, categories: Sequence[Category], dtype: torch.dtype
) -> dict[str, Any]:
    """What a detector file holds: floating-point tensors as `dtype`, the architecture, and the categories.

    Label k + 1 is `categories[k]`. Raises ValueError if their number does not fit the model.
    """
    num_labels = model.roi_heads.box_predictor.cls_score.out_features
    if num_labels != len(categories) + 1:
        raise ValueError(
            f"the detector has {num_labels} labels, {len(categories)} categories and the background need one each"
        )
    state = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    return {"model": state, "arch": arch, "categories": [{"id": c.id, "name": c.name} for c in categories]}


def load_detector(
    path: str | Path, device: torch.device | str = "cpu", settings: DetectorSettings | None = None
) -> BoxDetector:
    """An `OnnxDetector` from a file `*.onnx`, else a Faster R-CNN; settings None: the detector's own thresholds.

    Raises FileNotFoundError or ValueError, one line that names the file and what is wrong with it.
    """
    if Path(path).suffix.lower() == ".onnx":
        return OnnxDetector.load(path, device, settings)
    return load_faster_rcnn(path, device, settings)


def load_faster_rcnn(
    path: str | Path, device: torch.device | str = "cpu", settings: DetectorSettings | None = None
) -> Detector:
    """Loads a file of `detector_checkpoint` or torchvision's COCO weights of `fasterrcnn_resnet50_fpn_v2`, strictly.

    Raises FileNotFoundError or ValueError, one line that names the file and what is wrong with it.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no detector at {file} ({_WHERE_TO_GET})")
    content = load_plain(file)
    if "model" in content:
        state, arch, category_of_label = _read_described(file, content)
    else:
        state, arch, category_of_label = (
            content,
            RESNET50_FPN_V2,
            {category.id: category for category in coco_categories()},
        )
    num_labels = _count_labels(file, state)
    if max(category_of_label) >= num_labels or ("model" in content and len(category_of_label) != num_labels - 1):
        raise ValueError(
            f"{file}: {num_labels} labels in {_CLASSIFIER_WEIGHT}, but {len(category_of_label)} categories"
        )
    model = build_detector(arch, num_labels)
    _check_state(file, arch, state, model.state_dict())
    model.load_state_dict(state, strict=True)
    if settings is not None:
        _apply_settings(model, settings)
    return Detector(model.to(device), arch, category_of_label, sha256_file(file))


def _apply_settings(model: FasterRCNN, settings: DetectorSettings) -> None:
    """Changes the thresholds of the last stage; those of the region proposals stay."""
    model.roi_heads.score_thresh = settings.min_score
    model.roi_heads.detections_per_img = settings.max_detections
    if settings.nms_iou is not None:
        model.roi_heads.nms_thresh = settings.nms_iou


def _read_described(file: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, dict[int, Category]]:
    missing = [key for key in ("arch", "categories") if key not in content]
    if missing:
        raise ValueError(f"{file} is not a detector: it has no entry {' and no entry '.join(map(repr, missing))}")
    if not isinstance(content["model"], Mapping):
        raise ValueError(f'{file}: "model" must be a state dict, got a {type(content["model"]).__name__}')
    arch = content["arch"]
    if arch not in DETECTORS:
        raise ValueError(f"{file} holds a detector {arch!r}; known are {', '.join(DETECTORS)}")
    try:
        categories = [Category(int(entry["id"]), str(entry["name"])) for entry in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{file}: "categories" must be a list of {{"id", "name"}}, got {content["categories"]!r:.80}'
        ) from error
    if not categories or min(category.id for category in categories) < 1:
        raise ValueError(f"{file}: categories need ids from 1 on, got {[category.id for category in categories]}")
    require_distinct(categories, str(file))
    return dict(content["model"]), arch, dict(enumerate(categories, start=1))


def _count_labels(file: Path, state: Mapping[str, Any]) -> int:
    weight = state.get(_CLASSIFIER_WEIGHT)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{file} is not a Faster R-CNN: it has no {_CLASSIFIER_WEIGHT}")
    return weight.shape[0]


def _check_state(file: Path, arch: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Names, shapes and finiteness; one line for whatever does not fit."""
    problems = [f"lacks {name}" for name in wanted if name not in found]
    problems += [f"has {name} besides" for name in found if name not in wanted]
    for name, tensor in wanted.items():
        value = found.get(name)
        if isinstance(value, Tensor) and value.shape != tensor.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
        elif name in found and (problem := tensor_problem(name, value, tensor)) is not None:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{file} does not fit {arch}: {'; '.join(problems[:3])}{more}")
