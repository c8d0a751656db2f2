"""YOLOX (Ge et al. 2021, arXiv:2107.08430) from an ONNX file, run by OpenCV on the CPU.

Any export for COCO's 80 classes with raw outputs [1, M, 85], as the official exporter writes it. Per cell, row by row
at strides 8, 16 and 32: (tx, ty, tw, th, objectness, 80 class scores), the scores after their sigmoid. Then

    centre = (t_xy + cell) * stride      size = exp(t_wh) * stride      score = objectness * class score

followed by non-maximum suppression per class; one cell may name several classes. Exports that decode boxes themselves
(`--decode_in_inference`) are refused. Pictures go in as BGR in 0..255, fitted into the model's square at its top left
and padded with 114, without mean or scale (the official preprocessing).

Shape letters: M cells of a picture, n detections in it, S side of the model's square input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from models.frozen.detections import Detections, DetectorSettings, coco_categories
from util.boxes import areas, clip_boxes
from util.checkpoint import sha256_file
from util.images import Picture, to_picture
from util.onnx import read_input_shape

YOLOX = "yolox"
OWN_SETTINGS = DetectorSettings(min_score=0.01, nms_iou=0.65)  # of YOLOX's own COCO evaluation
STRIDES = (8, 16, 32)
PAD_VALUE = 114
NUM_CLASSES = 80
_MAX_LOG_SIZE = 16.0  # a raw log size stays far below; a size in pixels, somewhere in a picture, does not


class Net(Protocol):
    """The part of cv2.dnn.Net that is used here."""

    def setInput(self, blob: Any) -> None: ...

    def forward(self) -> Any: ...


def letterbox(picture: Picture, side: int) -> tuple[np.ndarray, tuple[float, float]]:
    """RGB [H, W, 3] -> (blob float32 [1, 3, S, S], BGR in 0..255; its pixels per pixel of the picture, in x and y).

    The two scales differ by the rounding to whole pixels only.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    fitted = max(round(width * scale), 1), max(round(height * scale), 1)
    padded = np.full((side, side, 3), PAD_VALUE, dtype=np.uint8)
    resized = cv2.resize(picture, fitted, interpolation=cv2.INTER_LINEAR)
    padded[: fitted[1], : fitted[0]] = resized[..., ::-1]
    blob = padded.astype(np.float32).transpose(2, 0, 1)[None]
    return np.ascontiguousarray(blob), (fitted[0] / width, fitted[1] / height)


def num_cells(side: int) -> int:
    """Cells of a square input of S pixels, over all strides."""
    return sum((side // stride) ** 2 for stride in STRIDES)


def decode(raw: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """raw: [M, 85] -> (boxes_xyxy [M, 4] in pixels of the letterboxed picture, scores [M, 80]), both float64."""
    cells, strides = _cells(side)  # [M, 2], [M, 1]
    values = raw.double()  # [M, 85]
    centres = (values[:, :2] + cells) * strides  # [M, 2]
    halves = values[:, 2:4].exp() * strides / 2  # [M, 2]
    scores = values[:, 4:5] * values[:, 5:]  # [M, 80]
    return torch.cat([centres - halves, centres + halves], dim=1), scores  # [M, 4], [M, 80]


def _cells(side: int) -> tuple[Tensor, Tensor]:
    """(column, row) of every cell [M, 2] and its stride [M, 1], float64."""
    places, strides = [], []
    for stride in STRIDES:
        steps = torch.arange(side // stride, dtype=torch.float64)  # [S / stride]
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")  # [S / stride, S / stride] twice
        places.append(torch.stack([columns.flatten(), rows.flatten()], dim=1))  # [(S / stride)^2, 2]
        strides.append(torch.full((len(places[-1]), 1), float(stride), dtype=torch.float64))  # [(S / stride)^2, 1]
    return torch.cat(places), torch.cat(strides)  # [M, 2], [M, 1]


def suppress(boxes_xyxy: Tensor, scores: Tensor, min_score: float, nms_iou: float) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [M, 4] with scores [M, 80] -> (boxes [n, 4], class indices [n], scores [n]), best first.

    Every class of a box that scores at least `min_score` is a guess; of two guesses of one class that overlap by more
    than `nms_iou` the worse is dropped.
    """
    cells, classes = (scores >= min_score).nonzero(as_tuple=True)  # [m], [m]
    guesses, values = boxes_xyxy[cells], scores[cells, classes]  # [m, 4], [m]
    kept = batched_nms(guesses, values, classes, nms_iou)  # [n]
    return guesses[kept], classes[kept], values[kept]  # [n, 4], [n], [n]


class YoloxDetector:
    """A YOLOX ONNX model: `models.frozen.detections.BoxDetector`. It computes on the CPU, wherever the images are."""

    arch = YOLOX

    def __init__(self, net: Net, side: int, file_id: str, settings: DetectorSettings | None = None) -> None:
        self.net = net
        self.side = side
        self.id = file_id
        self.settings = settings or OWN_SETTINGS
        self.categories = coco_categories()
        self.category_ids = torch.tensor([category.id for category in self.categories])  # [80]

    @classmethod
    def load(cls, path: str | Path, settings: DetectorSettings | None = None) -> YoloxDetector:
        """Raises FileNotFoundError, or ValueError naming the file if it is not ONNX or not a raw YOLOX for COCO."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no detector at {file}: a YOLOX export in ONNX is expected there")
        try:
            net = cv2.dnn.readNetFromONNX(str(file))
        except cv2.error as error:
            raise ValueError(f"{file} is not an ONNX model that OpenCV can read ({_one_line(error)})") from error
        side = _input_side(file)
        _check_output(file, net, side)
        return cls(net, side, sha256_file(file), settings)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """images: B tensors [3, H, W] in [0, 1], of any sizes and device -> B `Detections` on the images' devices."""
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> Detections:
        _check_image(image)
        height, width = image.shape[1:]
        blob, scales = letterbox(to_picture(image * 2 - 1), self.side)
        self.net.setInput(blob)
        boxes_xyxy, scores = decode(torch.from_numpy(self.net.forward()[0]), self.side)  # [M, 4], [M, 80]
        nms_iou = self.settings.nms_iou or OWN_SETTINGS.nms_iou
        assert nms_iou is not None
        boxes_xyxy, classes, scores = suppress(boxes_xyxy, scores, self.settings.min_score, nms_iou)  # [n, 4], [n], [n]
        boxes_px = clip_boxes(boxes_xyxy / boxes_xyxy.new_tensor(scales).repeat(2), width, height)  # [n, 4]
        kept = (areas(boxes_px) > 0).nonzero()[: self.settings.max_detections, 0]  # [n]
        category_ids = self.category_ids[classes[kept]]  # [n]
        found = boxes_px[kept].float(), category_ids, scores[kept].float()  # [n, 4], [n], [n]
        return Detections(*(tensor.to(image.device) for tensor in found))


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or image.numel() == 0:
        raise ValueError(f"an image must be floating-point [3, H, W], got {image.dtype} {tuple(image.shape)}")
    low, high = image.min().item(), image.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also if they are NaN
        raise ValueError(f"an image must lie within 0 and 1, got {low:g} to {high:g}")


def _input_side(file: Path) -> int:
    """S of an input [batch, 3, S, S]; the batch may be left open."""
    shape = read_input_shape(file)
    side = shape[-1] if len(shape) == 4 else None
    if side is None or side % max(STRIDES) or shape[0] not in (1, None) or shape[1:] != (3, side, side):
        known = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{file} takes an input of shape [{known}]; a YOLOX with a fixed square input is expected: "
            f"[1, 3, S, S], S a multiple of {max(STRIDES)}"
        )
    return side


def _check_output(file: Path, net: Net, side: int) -> None:
    """Runs an empty picture: the output's shape, and that its boxes are not decoded yet."""
    net.setInput(np.full((1, 3, side, side), PAD_VALUE, dtype=np.float32))
    try:
        output = net.forward()
    except cv2.error as error:
        raise ValueError(f"{file} cannot be run by OpenCV ({_one_line(error)})") from error
    expected = (1, num_cells(side), 5 + NUM_CLASSES)
    if output.shape != expected:
        raise ValueError(
            f"{file} gives {list(output.shape)} for an input of {side}; "
            f"a YOLOX with raw outputs for COCO's {NUM_CLASSES} classes gives {list(expected)}"
        )
    largest = float(output[..., 2:4].max())
    if not np.isfinite(output).all() or largest > _MAX_LOG_SIZE:
        raise ValueError(
            f"{file} does not give raw YOLOX outputs: log sizes of boxes reach {largest:g}, at most {_MAX_LOG_SIZE:g} "
            "are plausible (an export with --decode_in_inference, perhaps)"
        )


def _one_line(error: cv2.error) -> str:
    return " ".join(str(error).split())[-160:]
