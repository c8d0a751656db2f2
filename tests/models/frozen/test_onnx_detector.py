"""What each kind of ONNX detector is shown, and how its numbers become boxes. Files: `test_onnx_session.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from models.frozen.detections import DetectorSettings, coco_categories
from models.frozen.onnx_detector import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NUM_CLASSES,
    Detr,
    Kind,
    OnnxDetector,
    Yolov8,
    Yolox,
    letterbox,
    num_cells,
    suppress,
)
from models.frozen.onnx_session import OnnxSession

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2
STOP_SIGN, APPLE = 11, 47  # positions among the 80 classes; COCO's ids are 13 and 53


class FakeSession:
    """Says what `answer` gives for a picture's pixels, and keeps what it was shown."""

    def __init__(self, answer: Callable[[np.ndarray], list[np.ndarray]]) -> None:
        self.answer = answer
        self.file, self.id = Path("fake.onnx"), "id"
        self.blobs: list[np.ndarray] = []

    def run(self, pixels: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        self.blobs += pixels
        return [self.answer(each) for each in pixels]


def detector_of(kind: Kind, *outputs: np.ndarray, **settings: Any) -> OnnxDetector:
    """Gives the same numbers for every picture."""
    session = FakeSession(lambda _: list(outputs))
    return OnnxDetector(cast(OnnxSession, session), kind, DetectorSettings(**settings) if settings else None)


def shown(kind: Kind, image: Tensor, *outputs: np.ndarray) -> np.ndarray:
    """[3, H, W]: what the model gets to see."""
    detector = detector_of(kind, *outputs)
    detector([image])
    return cast(FakeSession, detector.session).blobs[0]


# --- YOLOX ---------------------------------------------------------------------------------------------------------


def silent() -> np.ndarray:
    """Raw outputs [M, 85] without any objectness."""
    return np.zeros((CELLS, 5 + NUM_CLASSES), dtype=np.float32)


def say(raw: np.ndarray, cell: int, size: tuple[float, float], index: int, score: float, stride: int) -> None:
    """Cell `cell` claims a box of `size` pixels, centred half a stride inside the cell."""
    raw[cell, :5] = [0.5, 0.5, math.log(size[0] / stride), math.log(size[1] / stride), 0.5]
    raw[cell, 5 + index] = 2 * score


def slow_decode(raw: np.ndarray, side: int) -> tuple[list[list[float]], list[list[float]]]:
    """The formulas, one number at a time."""
    boxes, scores = [], []
    position = 0
    for stride in (8, 16, 32):
        for row in range(side // stride):
            for column in range(side // stride):
                tx, ty, tw, th, objectness, *classes = (float(value) for value in raw[position])
                x, y = (tx + column) * stride, (ty + row) * stride
                width, height = math.exp(tw) * stride, math.exp(th) * stride
                boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
                scores.append([objectness * value for value in classes])
                position += 1
    assert position == len(raw)
    return boxes, scores


@pytest.mark.parametrize("side", [64, 96])
def test_decode_equals_the_slow_reference(side: int) -> None:
    raw = torch.randn(num_cells(side), 85, generator=torch.Generator().manual_seed(1))
    boxes, scores = Yolox(side).decode([raw.numpy()])
    expected_boxes, expected_scores = slow_decode(raw.numpy(), side)
    torch.testing.assert_close(boxes, torch.tensor(expected_boxes, dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor(expected_scores, dtype=torch.float64))


def test_decode_by_hand() -> None:
    raw = torch.zeros(num_cells(416), 85)
    raw[52 + 3] = 0.5  # stride 8, row 1, column 3
    boxes, scores = Yolox(416).decode([raw.numpy()])
    half = 4 * math.exp(0.5)
    assert boxes[55].tolist() == pytest.approx([28 - half, 12 - half, 28 + half, 12 + half])
    assert boxes[-1].tolist() == [12 * 32 - 16, 12 * 32 - 16, 12 * 32 + 16, 12 * 32 + 16]
    assert scores[55].tolist() == [0.25] * 80


def test_yolox_sees_bgr_padded_below_and_knows_its_scale() -> None:
    picture = np.full((30, 50, 3), (10, 20, 30), dtype=np.uint8)
    placed = Yolox(SIDE).place(picture)
    assert placed.blob.shape == (3, SIDE, SIDE) and placed.blob.dtype == np.float32
    assert (placed.scale, placed.offset) == ((64 / 50, 38 / 30), (0, 0))  # 30 * 1.28 = 38.4
    assert (placed.blob[:, :38] == np.array([30, 20, 10])[:, None, None]).all()
    assert (placed.blob[:, 38:] == 114).all()
    tall = Yolox(SIDE).place(picture.transpose(1, 0, 2))
    assert tall.scale == (38 / 30, 64 / 50)
    assert (tall.blob[:, :, 38:] == 114).all() and (tall.blob[0, :, :38] == 30).all()


@pytest.mark.parametrize("is_centred", [False, True])
def test_letterbox_keeps_the_pixels_of_a_picture_that_fits(is_centred: bool) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, SIDE, 3), dtype=np.uint8)
    padded, scale, (left, top) = letterbox(picture, SIDE, is_centred)
    assert scale == (1.0, 1.0) and (left, top) == (0, 12 if is_centred else 0)
    assert np.array_equal(padded[top : top + 40], picture)


def test_a_line_of_pixels_survives_letterboxing() -> None:
    padded, scale, _ = letterbox(np.zeros((1, 1000, 3), dtype=np.uint8), SIDE)
    assert scale == (64 / 1000, 1.0)
    assert (padded[0] == 0).all() and (padded[1:] == 114).all()


def test_boxes_come_back_in_each_pictures_pixels_clipped_and_best_first() -> None:
    raw = silent()
    say(raw, 8 + 2, (16, 8), APPLE, 0.4, stride=8)  # centre (20, 12)
    say(raw, 0, (40, 40), STOP_SIGN, 0.8, stride=8)  # centre (4, 4): reaches out of the picture
    say(raw, CELLS - 1, (8, 8), APPLE, 0.9, stride=32)  # centre (48, 48): in the padding of the second picture
    detector = detector_of(Yolox(SIDE), raw, min_score=0.1)
    square, wide = detector([torch.rand(3, 128, 128), torch.rand(3, 64, 128)])
    assert square.boxes_px.tolist() == [[88, 88, 104, 104], [0, 0, 48, 48], [24, 16, 56, 32]]
    assert square.category_ids.tolist() == [53, 13, 53]
    assert square.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert wide.boxes_px.tolist() == [[0, 0, 48, 48], [24, 16, 56, 32]]
    assert wide.boxes_px.dtype == wide.scores.dtype == torch.float32
    few = detector_of(Yolox(SIDE), raw, min_score=0.1, max_detections=1)
    assert few([torch.rand(3, 64, 128)])[0].category_ids.tolist() == [13]  # the one in the padding takes no place
    assert [len(found.scores) for found in few([])] == []


def test_scaling_back_is_exact_in_both_directions() -> None:
    raw = silent()
    say(raw, 8 + 2, (16, 8), APPLE, 0.4, stride=8)  # (12, 8) to (28, 16) of 64 x 38 pixels, a picture of 50 x 30
    (found,) = detector_of(Yolox(SIDE), raw)([torch.rand(3, 30, 50)])
    assert found.boxes_px[0].tolist() == pytest.approx([12 * 50 / 64, 8 * 30 / 38, 28 * 50 / 64, 16 * 30 / 38])


def test_a_picture_without_objects_has_no_detections() -> None:
    (found,) = detector_of(Yolox(SIDE), silent())([torch.rand(3, 30, 50)])
    assert found.boxes_px.shape == (0, 4) and found.category_ids.shape == (0,) and found.scores.shape == (0,)


def test_the_net_sees_levels_from_0_to_255() -> None:
    image = torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, SIDE, SIDE)  # R, G, B
    assert shown(Yolox(SIDE), image, silent())[:, 5, 5].tolist() == [255, 51, 0]


# --- YOLOv8 --------------------------------------------------------------------------------------------------------


def test_yolov8_sees_rgb_in_the_middle_and_its_boxes_come_back() -> None:
    image = torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, 32, 64)  # fits; 16 rows of padding above and below
    raw = np.zeros((4 + NUM_CLASSES, 3), dtype=np.float32)
    raw[:4, 0] = [20, 26, 16, 8]  # (12, 22) to (28, 30) of the square
    raw[4 + APPLE, 0], raw[4 + STOP_SIGN, 0] = 0.9, 0.3
    raw[:4, 1] = [20, 5, 10, 10]  # in the padding
    raw[4 + APPLE, 1] = 0.8
    blob = shown(Yolov8(SIDE), image, raw)
    assert blob[:, 20, 5].tolist() == pytest.approx([0, 0.2, 1.0])
    assert blob[:, 15, 5].tolist() == blob[:, 48, 5].tolist() == pytest.approx([114 / 255] * 3)
    (found,) = detector_of(Yolov8(SIDE), raw, min_score=0.1)([torch.rand(3, 64, 128)])  # twice as large
    assert found.boxes_px.tolist() == [[24, 12, 56, 28]] * 2
    assert found.category_ids.tolist() == [53, 13] and found.scores.tolist() == pytest.approx([0.9, 0.3])


def test_yolov8_scores_that_are_none_are_refused() -> None:
    raw = np.full((4 + NUM_CLASSES, 3), 1.5, dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"^fake\.onnx gives class scores of a YOLOv8 from 1\.5 to 1\.5, expected are 0"
    ):
        detector_of(Yolov8(SIDE), raw)([torch.rand(3, 64, 64)])


# --- DETR ----------------------------------------------------------------------------------------------------------


def detr(num_logits: int, boxes_come_first: bool = False, is_imagenet: bool = True) -> Detr:
    return Detr(96, 64, num_logits, boxes_come_first, is_imagenet)


BOXES = np.array([[0.5, 0.5, 0.25, 0.5], [0.0, 0.5, 0.5, 1.0]], dtype=np.float32)  # centre and size


@pytest.mark.parametrize(("num_logits", "apple", "stop_sign"), [(80, APPLE, STOP_SIGN), (91, 53, 13)])
@pytest.mark.parametrize("boxes_come_first", [False, True])
def test_sigmoid_queries_guess_every_class(num_logits: int, apple: int, stop_sign: int, boxes_come_first: bool) -> None:
    logits = np.full((2, num_logits), -20, dtype=np.float32)
    logits[0, apple], logits[0, stop_sign], logits[1, apple] = 1.0, 2.0, 3.0
    outputs = (BOXES, logits) if boxes_come_first else (logits, BOXES)
    (found,) = detector_of(detr(num_logits, boxes_come_first), *outputs)([torch.rand(3, 100, 200)])
    assert found.boxes_px.tolist() == [[0, 0, 50, 100], [75, 25, 125, 75], [75, 25, 125, 75]]
    assert found.category_ids.tolist() == [53, 13, 53]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-each)) for each in (3.0, 2.0, 1.0)])


@pytest.mark.parametrize(("num_logits", "apple", "stop_sign"), [(81, APPLE, STOP_SIGN), (92, 53, 13)])
def test_a_softmax_query_guesses_its_likeliest_class(num_logits: int, apple: int, stop_sign: int) -> None:
    logits = np.full((2, num_logits), -20, dtype=np.float32)
    logits[0, apple], logits[0, stop_sign], logits[0, -1] = math.log(2), math.log(3), math.log(5)
    logits[1, -1] = 20.0  # surely no object
    (found,) = detector_of(detr(num_logits), logits, BOXES)([torch.rand(3, 100, 200)])
    assert found.boxes_px.tolist() == [[75, 25, 125, 75]] and found.category_ids.tolist() == [13]
    assert found.scores.tolist() == pytest.approx([0.3])


def test_ids_that_coco_never_used_are_no_detections() -> None:
    named = {category.id for category in coco_categories()}
    (found,) = detector_of(detr(91), np.full((2, 91), 5, dtype=np.float32), BOXES, max_detections=500)(
        [torch.rand(3, 64, 96)]
    )
    assert set(found.category_ids.tolist()) == named and len(found.scores) == 2 * len(named)


def test_detr_sees_the_stretched_picture_with_or_without_imagenets_statistics() -> None:
    image = torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, 30, 30)
    outputs = np.zeros((2, 91), dtype=np.float32), BOXES
    plain = shown(detr(91, is_imagenet=False), image, *outputs)
    assert plain.shape == (3, 64, 96) and np.allclose(plain, np.float32([0, 0.2, 1])[:, None, None])
    normal = shown(detr(91), image, *outputs)
    assert normal.dtype == np.float32 and np.allclose(normal, (plain - IMAGENET_MEAN) / IMAGENET_STD)
    assert normal[:, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_detr_suppresses_only_when_asked_to() -> None:
    logits = np.full((2, 80), -20, dtype=np.float32)
    logits[:, APPLE] = [1.0, 2.0]
    outputs = logits, BOXES[[0, 0]]
    assert len(detector_of(detr(80), *outputs)([torch.rand(3, 64, 96)])[0].scores) == 2
    assert len(detector_of(detr(80), *outputs, nms_iou=0.7)([torch.rand(3, 64, 96)])[0].scores) == 1


def test_boxes_in_pixels_are_no_detrs() -> None:
    with pytest.raises(ValueError, match=r"fake\.onnx gives boxes of a DETR from 0 to 100, expected are 0 to 1"):
        detector_of(detr(80), np.zeros((2, 80), np.float32), 100 * BOXES)([torch.rand(3, 64, 96)])


# --- all -----------------------------------------------------------------------------------------------------------


def test_suppression_within_a_class_only() -> None:
    boxes = torch.tensor([[20, 20, 30, 30], [1, 0, 11, 10], [0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]).double()
    scores = torch.zeros(5, 80, dtype=torch.float64)
    scores[0, 3], scores[1, 3], scores[2, 3], scores[3, 5], scores[4, 3] = 0.6, 0.8, 0.9, 0.7, 0.0005
    kept, classes, values = suppress(boxes, scores, 0.001, 0.65)  # the second and third overlap by 9 / 11
    assert kept.tolist() == boxes[[2, 3, 0]].tolist()
    assert classes.tolist() == [3, 5, 3]
    assert values.tolist() == [0.9, 0.7, 0.6]
    assert suppress(boxes, scores, 0.001, 0.82)[2].tolist() == [0.9, 0.8, 0.7, 0.6]
    assert suppress(boxes, scores, 0.001, None)[2].tolist() == [0.9, 0.8, 0.7, 0.6]
    assert suppress(boxes, scores, 0.65, 0.65)[2].tolist() == [0.9, 0.7]
    assert len(suppress(boxes, scores, 0.95, 0.65)[0]) == 0


def test_suppression_is_exact_beside_a_huge_box() -> None:
    """torchvision offsets each class by the largest coordinate: in single precision that merges these."""
    boxes = torch.tensor([[0, 0, 1e6, 1e6], [0, 0, 10, 10], [4, 0, 14, 10]])  # the last two overlap by 3 / 7
    scores = torch.zeros(3, 80)
    scores[0, 0], scores[1, 79], scores[2, 79] = 0.2, 0.9, 0.8
    assert suppress(boxes.double(), scores.double(), 0.001, 0.45)[1].tolist() == [79, 79, 0]


def test_a_cell_may_name_two_classes() -> None:
    scores = torch.zeros(1, 80, dtype=torch.float64)
    scores[0, 7], scores[0, 8] = 0.4, 0.5
    assert suppress(torch.tensor([[0.0, 0.0, 9.0, 9.0]]).double(), scores, 0.3, 0.65)[1].tolist() == [8, 7]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"floating-point \[3, H, W\], got torch.uint8 \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"got torch.float32 \(1, 3, 4, 4\)"),
        (torch.full((3, 4, 4), -0.5), "within 0 and 1, got -0.5 to -0.5"),
        (torch.full((3, 4, 4), 255.0), "within 0 and 1, got 255 to 255"),
        (torch.full((3, 4, 4), torch.nan), "got nan to nan"),
    ],
)
def test_wrong_images_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector_of(Yolox(SIDE), silent())([image])
