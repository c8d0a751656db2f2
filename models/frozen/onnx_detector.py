"""Detectors of COCO's classes in ONNX files. What a file gives says which kind it is:

    YOLOX    one output [B, M, 85], raw: (tx, ty, tw, th, objectness, 80 class scores) of each cell, row by row at
             strides 8, 16, 32. centre = (t_xy + cell) * stride, size = exp(t_wh) * stride, score = objectness * class
             score. Ge et al. 2021, arXiv:2107.08430.
    YOLOv8   one output [B, 84, N]: centre and size in pixels of the input, 80 class scores, no objectness (v8 to v12).
    DETR     two outputs, boxes [B, N, 4] as centre and size in [0, 1], and logits [B, N, K]. K = 80: sigmoid (RT-DETR,
             D-FINE). 91: sigmoid, the index is COCO's id (Deformable DETR, RF-DETR). 81 and 92: softmax, the last one
             is "no object" (DETR, with 91 ids as YOLOS has them); a query is then one guess, of its likeliest class.

Pictures go in as each kind's own code has them. YOLOX: BGR in 0..255, in the square's upper left, padded with 114.
YOLOv8: RGB in 0..1, in the square's middle, padded with 114. DETR: RGB, stretched to the input, ImageNet's mean and
standard deviation taken off, but for K = 80, whose models take 0..1; the file's metadata may say otherwise
(`normalize`: `imagenet` or `none`). YOLOs end with non-maximum suppression per class, DETRs without.

Exports with other outputs (boxes decoded or suppressed inside) are refused.

Shape letters: B pictures, M cells, N anchors or queries, K logits of a query, n detections, H x W model's input, S its
side where it is a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from models.frozen.detections import Detections, DetectorSettings, coco_categories
from models.frozen.onnx_session import OnnxSession
from util.boxes import areas, clip_boxes
from util.images import Picture, to_picture

YOLOX, YOLOV8, DETR = "yolox", "yolov8", "detr"
STRIDES = (8, 16, 32)
PAD_VALUE = 114
NUM_CLASSES = 80
COCO_IDS = 91  # 0 to 90, with gaps
IMAGENET_MEAN, IMAGENET_STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[..., None, None]
NORMALIZE_KEY = "normalize"  # of a file's metadata
NORMALIZATIONS = ("imagenet", "none")
_DETR_LOGITS = (NUM_CLASSES, NUM_CLASSES + 1, COCO_IDS, COCO_IDS + 1)
_MAX_LOG_SIZE = 16.0  # a raw log size stays far below; a size in pixels, somewhere in a picture, does not
_NO_GUESS = -1.0  # a score that no threshold lets pass


@dataclass(frozen=True)
class Placed:
    """A picture as the model takes it. blob: float32 [3, H, W]. scale, offset: x' = x * scale + offset, for (x, y)."""

    blob: np.ndarray
    scale: tuple[float, float]
    offset: tuple[int, int] = (0, 0)


class Kind(Protocol):
    """What one kind of detector takes and gives. category_ids: [C] COCO's ids of its classes, 0 where there is none."""

    arch: str
    own_settings: DetectorSettings
    category_ids: Tensor

    def place(self, picture: Picture) -> Placed: ...

    def decode(self, outputs: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Of one picture -> (boxes_xyxy [N, 4] in pixels of the input, scores [N, C] in [0, 1]), both float64.

        Raises ValueError if the numbers are not such outputs.
        """
        ...


Fit = tuple[Picture, tuple[float, float], tuple[int, int]]


def letterbox(picture: Picture, side: int, is_centred: bool = False) -> Fit:
    """RGB [H, W, 3] fitted into a square -> (uint8 RGB [S, S, 3], scale, offset as of `Placed`).

    The two scales differ by the rounding to whole pixels only.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    fitted = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = ((side - fitted[0]) // 2, (side - fitted[1]) // 2) if is_centred else (0, 0)
    padded = np.full((side, side, 3), PAD_VALUE, dtype=np.uint8)
    resized = cv2.resize(picture, fitted, interpolation=cv2.INTER_LINEAR)
    padded[top : top + fitted[1], left : left + fitted[0]] = resized
    return padded, (fitted[0] / width, fitted[1] / height), (left, top)


def num_cells(side: int) -> int:
    """Cells of a square input of S pixels, over all strides."""
    return sum((side // stride) ** 2 for stride in STRIDES)


class Yolox:
    """Raw YOLOX outputs [M, 85] for a square input."""

    arch = YOLOX
    own_settings = DetectorSettings(min_score=0.01, nms_iou=0.65)  # of its own COCO evaluation

    def __init__(self, side: int) -> None:
        self.side = side
        self.category_ids = _contiguous_ids()
        self.cells, self.strides = _cells(side)  # [M, 2], [M, 1]

    def place(self, picture: Picture) -> Placed:
        padded, scale, offset = letterbox(picture, self.side)
        return Placed(_channels_first(padded[..., ::-1]), scale, offset)

    def decode(self, outputs: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(outputs[0]).double()  # [M, 85]
        largest = values[:, 2:4].max().item()
        if largest > _MAX_LOG_SIZE:
            raise ValueError(
                f"does not give raw YOLOX outputs: log sizes of boxes reach {largest:g}, at most {_MAX_LOG_SIZE:g} are "
                "plausible (an export with --decode_in_inference, perhaps)"
            )
        centres = (values[:, :2] + self.cells) * self.strides  # [M, 2]
        sizes = values[:, 2:4].exp() * self.strides  # [M, 2]
        return _corners(centres, sizes), values[:, 4:5] * values[:, 5:]  # [M, 4], [M, 80]


class Yolov8:
    """YOLOv8 outputs [84, N] for a square input."""

    arch = YOLOV8
    own_settings = DetectorSettings(min_score=0.001, nms_iou=0.7)  # of its own COCO evaluation

    def __init__(self, side: int) -> None:
        self.side = side
        self.category_ids = _contiguous_ids()

    def place(self, picture: Picture) -> Placed:
        padded, scale, offset = letterbox(picture, self.side, is_centred=True)
        return Placed(_channels_first(padded) / 255, scale, offset)

    def decode(self, outputs: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(outputs[0]).double().T  # [N, 84]
        _require_unit("class scores of a YOLOv8", values[:, 4:])
        return _corners(values[:, :2], values[:, 2:4]), values[:, 4:]  # [N, 4], [N, 80]


class Detr:
    """DETR outputs: boxes [N, 4] and logits [N, K], in the order in which the file has them."""

    arch = DETR
    own_settings = DetectorSettings(min_score=0.001, nms_iou=None)

    def __init__(self, width: int, height: int, num_logits: int, boxes_come_first: bool, is_imagenet: bool) -> None:
        self.size = width, height
        self.boxes_come_first = boxes_come_first
        self.is_imagenet = is_imagenet
        self.has_no_object = num_logits in (NUM_CLASSES + 1, COCO_IDS + 1)
        self.category_ids = _contiguous_ids() if num_logits <= NUM_CLASSES + 1 else _ids_with_gaps()

    def place(self, picture: Picture) -> Placed:
        stretched = np.asarray(Image.fromarray(picture).resize(self.size, Image.Resampling.BILINEAR))
        blob = _channels_first(stretched) / 255
        if self.is_imagenet:
            blob = (blob - IMAGENET_MEAN) / IMAGENET_STD
        height, width = picture.shape[:2]
        return Placed(blob, (self.size[0] / width, self.size[1] / height))

    def decode(self, outputs: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        boxes, logits = (torch.from_numpy(output).double() for output in outputs)  # [N, 4], [N, K]
        if not self.boxes_come_first:
            boxes, logits = logits, boxes
        _require_unit("boxes of a DETR", boxes)
        scale = boxes.new_tensor(self.size)
        boxes_xyxy = _corners(boxes[:, :2] * scale, boxes[:, 2:] * scale)  # [N, 4]
        if not self.has_no_object:
            return boxes_xyxy, logits.sigmoid()  # [N, 4], [N, C]
        probs = logits.softmax(dim=1)[:, :-1]  # [N, C]
        is_likeliest = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.argmax(dim=1, keepdim=True), True)
        return boxes_xyxy, probs.where(is_likeliest, _NO_GUESS)  # [N, 4], [N, C]


def _channels_first(picture: Picture) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [3, H, W], in 0..255."""
    return np.ascontiguousarray(picture.astype(np.float32).transpose(2, 0, 1))


def _corners(centres: Tensor, sizes: Tensor) -> Tensor:
    """[N, 2], [N, 2] -> boxes_xyxy [N, 4]."""
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)


def _cells(side: int) -> tuple[Tensor, Tensor]:
    """(column, row) of every cell [M, 2] and its stride [M, 1], float64."""
    places, strides = [], []
    for stride in STRIDES:
        steps = torch.arange(side // stride, dtype=torch.float64)  # [S / stride]
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")  # [S / stride, S / stride] twice
        places.append(torch.stack([columns.flatten(), rows.flatten()], dim=1))  # [(S / stride)^2, 2]
        strides.append(torch.full((len(places[-1]), 1), float(stride), dtype=torch.float64))  # [(S / stride)^2, 1]
    return torch.cat(places), torch.cat(strides)  # [M, 2], [M, 1]


def _contiguous_ids() -> Tensor:
    return torch.tensor([category.id for category in coco_categories()])  # [80]


def _ids_with_gaps() -> Tensor:
    """[91]: an id that names no category is 0."""
    named = {category.id for category in coco_categories()}
    return torch.tensor([index if index in named else 0 for index in range(COCO_IDS)])


def _require_unit(what: str, values: Tensor) -> None:
    if values.numel() and (values.min() < -1e-3 or values.max() > 1 + 1e-3):
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"gives {what} from {low:g} to {high:g}, expected are 0 to 1")


def recognise(session: OnnxSession) -> Kind:
    """The kind of a file, by what it gives for a blank input. Raises ValueError naming that and what is known."""
    (outputs,) = session.run([np.zeros((3, session.height, session.width), dtype=np.float32)])
    shapes = [output.shape for output in outputs]
    kind = _yolo_of(session, shapes[0]) if len(shapes) == 1 else _detr_of(session, shapes)
    if kind is None:
        found = " and ".join(str([session.batch, *shape]) for shape in shapes)
        known = (
            f"a raw YOLOX gives [1, {num_cells(session.width)}, {5 + NUM_CLASSES}], "
            f"a YOLOv8 [1, {4 + NUM_CLASSES}, N], a DETR [1, N, 4] and [1, N, {' or '.join(map(str, _DETR_LOGITS))}]"
        )
        raise ValueError(
            f"{session.file} gives {found} for an input of {session.width} x {session.height}; of the detectors of "
            f"COCO's {NUM_CLASSES} categories that are known, {known}"
        )
    return kind


def _yolo_of(session: OnnxSession, shape: tuple[int, ...]) -> Kind | None:
    side = session.width
    if session.height != side or side % max(STRIDES):
        raise ValueError(
            f"{session.file} takes an input of shape [1, 3, {session.height}, {side}]; with one output a YOLO is "
            f"expected: [1, 3, S, S], S a multiple of {max(STRIDES)}"
        )
    cells, rows = num_cells(side), 4 + NUM_CLASSES
    if shape == (cells, 5 + NUM_CLASSES):
        return Yolox(side)
    if len(shape) != 2 or shape[0] != rows:
        return None
    return Yolov8(side) if cells != rows or shape[1] == cells else None  # 64 px have 84 cells: rows may be cells too


def _detr_of(session: OnnxSession, shapes: Sequence[tuple[int, ...]]) -> Kind | None:
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        return None
    widths = shapes[0][1], shapes[1][1]
    if 4 not in widths or max(widths) not in _DETR_LOGITS:
        return None
    usual = "none" if max(widths) == NUM_CLASSES else "imagenet"
    normalize = session.metadata.get(NORMALIZE_KEY, usual)
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"{session.file} has {NORMALIZE_KEY}={normalize!r} in its metadata, known are {', '.join(NORMALIZATIONS)}"
        )
    return Detr(session.width, session.height, max(widths), widths[0] == 4, normalize == "imagenet")


def suppress(
    boxes_xyxy: Tensor, scores: Tensor, min_score: float, nms_iou: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [N, 4] with scores [N, C] -> (boxes [n, 4], class indices [n], scores [n]), best first.

    Every class of a box that scores at least `min_score` is a guess; of two guesses of one class that overlap by more
    than `nms_iou` the worse is dropped (None: neither).
    """
    rows, classes = (scores >= min_score).nonzero(as_tuple=True)  # [m], [m]
    guesses, values = boxes_xyxy[rows], scores[rows, classes]  # [m, 4], [m]
    if nms_iou is None:
        kept = values.argsort(descending=True, stable=True)  # [m]
    else:
        kept = batched_nms(guesses, values, classes, nms_iou)  # [n]
    return guesses[kept], classes[kept], values[kept]  # [n, 4], [n], [n]


class OnnxDetector:
    """A detector in an ONNX file: `models.frozen.detections.BoxDetector`. What it finds in an image does not depend on
    the others of a call."""

    def __init__(self, session: OnnxSession, kind: Kind, settings: DetectorSettings | None = None) -> None:
        self.session, self.kind = session, kind
        self.id, self.arch = session.id, kind.arch
        self.settings = settings or kind.own_settings
        self.categories = coco_categories()

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", settings: DetectorSettings | None = None
    ) -> OnnxDetector:
        """Tries two blank pictures. Raises FileNotFoundError, or ValueError naming the file and what is wrong."""
        session = OnnxSession(path, device)
        detector = cls(session, recognise(session), settings)
        detector([torch.full((3, session.height, session.width), PAD_VALUE / 255)])
        return detector

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """images: B tensors [3, H, W] in [0, 1], of any sizes and device -> B `Detections` on the images' devices."""
        for image in images:
            _check_image(image)
        placed = [self.kind.place(to_picture(image * 2 - 1)) for image in images]
        outputs = self.session.run([each.blob for each in placed])
        return [self._found(*each) for each in zip(images, placed, outputs, strict=True)]

    def _found(self, image: Tensor, placed: Placed, outputs: Sequence[np.ndarray]) -> Detections:
        try:
            boxes_xyxy, scores = self.kind.decode(outputs)  # [N, 4], [N, C]
        except ValueError as error:
            raise ValueError(f"{self.session.file} {error}") from error
        nms_iou = self.settings.nms_iou or self.kind.own_settings.nms_iou
        boxes_xyxy, classes, scores = suppress(boxes_xyxy, scores, self.settings.min_score, nms_iou)  # [n, 4], [n], [n]
        scale, offset = (boxes_xyxy.new_tensor(pair).repeat(2) for pair in (placed.scale, placed.offset))
        height, width = image.shape[1:]
        boxes_px = clip_boxes((boxes_xyxy - offset) / scale, width, height)  # [n, 4]
        category_ids = self.kind.category_ids[classes]  # [n]
        is_box = (areas(boxes_px) > 0) & (category_ids > 0)  # [n]
        kept = is_box.nonzero()[: self.settings.max_detections, 0]  # [n]
        found = boxes_px[kept].float(), category_ids[kept], scores[kept].float()  # [n, 4], [n], [n]
        return Detections(*(tensor.to(image.device) for tensor in found))


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or image.numel() == 0:
        raise ValueError(f"an image must be floating-point [3, H, W], got {image.dtype} {tuple(image.shape)}")
    low, high = image.min().item(), image.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also if they are NaN
        raise ValueError(f"an image must lie within 0 and 1, got {low:g} to {high:g}")
