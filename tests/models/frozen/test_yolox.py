"""YOLOX: pixels in and boxes out as the paper's code has them, a small ONNX file, a real one, and wrong ones."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from models.frozen.faster_rcnn import DetectorSettings, load_detector
from models.frozen.yolox import NUM_CLASSES, YoloxDetector, decode, letterbox, num_cells, suppress
from tests.helpers.onnx_file import write_yolox
from util.boxes import xywh_to_xyxy
from util.images import load_image
from util.onnx import read_input_shape
from util.types import Category

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2
STOP_SIGN, APPLE = 11, 47  # positions among the 80 classes; COCO's ids are 13 and 53


def silent() -> np.ndarray:
    """Raw outputs [M, 85] without any objectness."""
    return np.zeros((CELLS, 5 + NUM_CLASSES), dtype=np.float32)


def say(raw: np.ndarray, cell: int, size: tuple[float, float], index: int, score: float, stride: int) -> None:
    """Cell `cell` claims a box of `size` pixels, centred half a stride inside the cell."""
    raw[cell, :5] = [0.5, 0.5, math.log(size[0] / stride), math.log(size[1] / stride), 0.5]
    raw[cell, 5 + index] = 2 * score


class FakeNet:
    """Says the same of every picture and keeps what it was shown."""

    def __init__(self, raw: np.ndarray) -> None:
        self.raw = raw
        self.blobs: list[np.ndarray] = []

    def setInput(self, blob: np.ndarray) -> None:
        self.blobs.append(blob)

    def forward(self) -> np.ndarray:
        return self.raw[None]


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
    boxes, scores = decode(raw, side)
    expected_boxes, expected_scores = slow_decode(raw.numpy(), side)
    torch.testing.assert_close(boxes, torch.tensor(expected_boxes, dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor(expected_scores, dtype=torch.float64))


def test_decode_by_hand() -> None:
    raw = torch.zeros(num_cells(416), 85)
    raw[52 + 3] = 0.5  # stride 8, row 1, column 3
    boxes, scores = decode(raw, 416)
    half = 4 * math.exp(0.5)
    assert boxes[55].tolist() == pytest.approx([28 - half, 12 - half, 28 + half, 12 + half])
    assert boxes[-1].tolist() == [12 * 32 - 16, 12 * 32 - 16, 12 * 32 + 16, 12 * 32 + 16]
    assert scores[55].tolist() == [0.25] * 80


def test_letterbox_pads_below_turns_to_bgr_and_knows_its_scale() -> None:
    picture = np.full((30, 50, 3), (10, 20, 30), dtype=np.uint8)
    blob, scales = letterbox(picture, SIDE)
    assert blob.shape == (1, 3, SIDE, SIDE) and blob.dtype == np.float32
    assert scales == (64 / 50, 38 / 30)  # 30 * 1.28 = 38.4
    assert (blob[0, :, :38] == np.array([30, 20, 10])[:, None, None]).all()
    assert (blob[0, :, 38:] == 114).all()
    tall, scales = letterbox(picture.transpose(1, 0, 2), SIDE)
    assert scales == (38 / 30, 64 / 50)
    assert (tall[0, :, :, 38:] == 114).all() and (tall[0, 0, :, :38] == 30).all()


def test_letterbox_keeps_the_pixels_of_a_picture_that_fits() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, SIDE, 3), dtype=np.uint8)
    blob, scales = letterbox(picture, SIDE)
    assert scales == (1.0, 1.0)
    assert np.array_equal(blob[0, :, :40], picture[..., ::-1].transpose(2, 0, 1))


def test_a_line_of_pixels_survives_letterboxing() -> None:
    blob, scales = letterbox(np.zeros((1, 1000, 3), dtype=np.uint8), SIDE)
    assert scales == (64 / 1000, 1.0)
    assert (blob[0, :, 0] == 0).all() and (blob[0, :, 1:] == 114).all()


def test_suppression_within_a_class_only() -> None:
    boxes = torch.tensor([[20, 20, 30, 30], [1, 0, 11, 10], [0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]).double()
    scores = torch.zeros(5, 80, dtype=torch.float64)
    scores[0, 3], scores[1, 3], scores[2, 3], scores[3, 5], scores[4, 3] = 0.6, 0.8, 0.9, 0.7, 0.0005
    kept, classes, values = suppress(boxes, scores, 0.001, 0.65)  # the second and third overlap by 9 / 11
    assert kept.tolist() == boxes[[2, 3, 0]].tolist()
    assert classes.tolist() == [3, 5, 3]
    assert values.tolist() == [0.9, 0.7, 0.6]
    assert suppress(boxes, scores, 0.001, 0.82)[2].tolist() == [0.9, 0.8, 0.7, 0.6]
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


def test_boxes_come_back_in_each_pictures_pixels_clipped_and_best_first() -> None:
    raw = silent()
    say(raw, 8 + 2, (16, 8), APPLE, 0.4, stride=8)  # centre (20, 12)
    say(raw, 0, (40, 40), STOP_SIGN, 0.8, stride=8)  # centre (4, 4): reaches out of the picture
    say(raw, CELLS - 1, (8, 8), APPLE, 0.9, stride=32)  # centre (48, 48): in the padding of the second picture
    detector = YoloxDetector(FakeNet(raw), SIDE, "id", DetectorSettings(min_score=0.1))
    square, wide = detector([torch.rand(3, 128, 128), torch.rand(3, 64, 128)])
    assert square.boxes_px.tolist() == [[88, 88, 104, 104], [0, 0, 48, 48], [24, 16, 56, 32]]
    assert square.category_ids.tolist() == [53, 13, 53]
    assert square.scores.tolist() == pytest.approx([0.9, 0.8, 0.4])
    assert wide.boxes_px.tolist() == [[0, 0, 48, 48], [24, 16, 56, 32]]
    assert wide.boxes_px.dtype == wide.scores.dtype == torch.float32
    few = YoloxDetector(detector.net, SIDE, "id", DetectorSettings(min_score=0.1, max_detections=1))
    assert few([torch.rand(3, 64, 128)])[0].category_ids.tolist() == [13]  # the one in the padding takes no place
    assert [len(found.scores) for found in few([])] == []


def test_scaling_back_is_exact_in_both_directions() -> None:
    raw = silent()
    say(raw, 8 + 2, (16, 8), APPLE, 0.4, stride=8)  # (12, 8) to (28, 16) of 64 x 38 pixels, a picture of 50 x 30
    (found,) = YoloxDetector(FakeNet(raw), SIDE, "id")([torch.rand(3, 30, 50)])
    assert found.boxes_px[0].tolist() == pytest.approx([12 * 50 / 64, 8 * 30 / 38, 28 * 50 / 64, 16 * 30 / 38])


def test_a_picture_without_objects_has_no_detections() -> None:
    (found,) = YoloxDetector(FakeNet(silent()), SIDE, "id", DetectorSettings())([torch.rand(3, 30, 50)])
    assert found.boxes_px.shape == (0, 4) and found.category_ids.shape == (0,) and found.scores.shape == (0,)


def test_the_net_sees_levels_from_0_to_255() -> None:
    net = FakeNet(silent())
    image = torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, SIDE, SIDE)  # R, G, B
    YoloxDetector(net, SIDE, "id")([image])
    assert net.blobs[0][0, :, 5, 5].tolist() == [255, 51, 0]


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
        YoloxDetector(FakeNet(silent()), SIDE, "id")([image])


def speaking() -> np.ndarray:
    """Raw outputs [1, M, 85] that the file of `write_yolox` gives for a white picture (it multiplies by 255)."""
    raw = silent()
    say(raw, 8 + 2, (16, 8), STOP_SIGN, 0.4, stride=8)
    return raw[None]


@pytest.mark.parametrize("name", ["small.onnx", "SMALL.ONNX"])
def test_an_onnx_file_is_a_yolox(tmp_path: Path, name: str) -> None:
    path = write_yolox(tmp_path / name, speaking() / 255, (1, 3, SIDE, SIDE))
    detector = load_detector(path)
    assert isinstance(detector, YoloxDetector)
    assert (detector.side, detector.arch, len(detector.id)) == (SIDE, "yolox", 64)
    assert len(detector.categories) == 80 and detector.categories[STOP_SIGN] == Category(13, "stop sign")
    (found,) = detector([torch.ones(3, 128, 128)])
    torch.testing.assert_close(found.boxes_px, torch.tensor([[24.0, 16.0, 56.0, 32.0]]))
    assert found.category_ids.tolist() == [13]
    assert found.scores.tolist() == pytest.approx([0.4])
    assert len(load_detector(path, settings=DetectorSettings(min_score=0.5))([torch.ones(3, 128, 128)])[0].scores) == 0


def test_another_device_is_answered_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_yolox(tmp_path / "small.onnx", speaking() / 255, (1, 3, SIDE, SIDE))
    with caplog.at_level(logging.WARNING):
        load_detector(path, "cpu")
        assert caplog.text == ""
        load_detector(path, "cuda")
    assert "runs on the CPU, not on cuda" in caplog.text


def test_input_shapes_are_read(tmp_path: Path) -> None:
    path = write_yolox(tmp_path / "m.onnx", speaking(), ("batch", 3, SIDE, 416), weights_are_inputs=True)
    assert read_input_shape(path) == (None, 3, SIDE, 416)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"m\.onnx is truncated or not an ONNX file"):
        read_input_shape(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"m\.onnx: expected an ONNX graph with one input, found none"):
        read_input_shape(path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no detector at .*nowhere\.onnx"):
        load_detector(tmp_path / "nowhere.onnx")
    path = write_yolox(tmp_path / "m.onnx", speaking() / 255, (1, 3, SIDE, SIDE))
    for content in (b"", b"<html>not found</html>", path.read_bytes()[:5000]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX model that OpenCV can read"):
            load_detector(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        ((1, 3, "height", "width"), r"\[1, 3, \?, \?\]"),
        ((1, 3, 64, 96), r"\[1, 3, 64, 96\]"),
        ((1, 1, 64, 64), r"\[1, 1, 64, 64\]"),
        ((8, 3, 64, 64), r"\[8, 3, 64, 64\]"),
        ((1, 3, 72, 72), r"\[1, 3, 72, 72\]"),
    ],
)
def test_models_of_another_input_are_refused(tmp_path: Path, shape: tuple[int | str, ...], known: str) -> None:
    path = write_yolox(tmp_path / "m.onnx", speaking(), shape)
    with pytest.raises(ValueError, match=rf"m\.onnx takes an input of shape {known}.*\[1, 3, S, S\]"):
        load_detector(path)


def test_models_of_another_output_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for raw, found in ((np.zeros((1, 80, 85)), r"\[1, 80, 85\]"), (np.zeros((1, 84, 25)), r"\[1, 84, 25\]")):
        write_yolox(path, raw, (1, 3, SIDE, SIDE))
        with pytest.raises(ValueError, match=rf"m\.onnx gives {found} for an input of 64.*gives \[1, 84, 85\]"):
            load_detector(path)
    decoded = speaking()
    decoded[..., 2:4] = 200.0 / 114  # times the grey of the picture that tries it
    write_yolox(path, decoded, (1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"m\.onnx does not give raw YOLOX outputs: log sizes .* reach 200"):
        load_detector(path)


def test_a_real_model_finds_the_objects_of_real_photos(shared: Path) -> None:
    """The surest detection is right in 9 of the first 12 photos (67 of all 79); the rest are the model's mistakes.

    It hardly tells RGB from BGR: the tests of the blob do.
    """
    folder = shared / "data" / "coco_mini"
    truth = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    detector = load_detector(shared / "models" / "yolox_nano.onnx", settings=DetectorSettings())
    assert isinstance(detector, YoloxDetector) and detector.side == 416
    assert [(each["id"], each["name"]) for each in truth["categories"]] == [
        (category.id, category.name) for category in detector.categories
    ]
    records = sorted(truth["images"], key=lambda record: record["id"])[:12]
    pixels = [np.array(load_image(folder / "val2017" / record["file_name"])) for record in records]
    images = [torch.from_numpy(each).permute(2, 0, 1) / 255 for each in pixels]
    num_right = 0
    for record, image, found in zip(records, images, detector(images), strict=True):
        assert 0 < len(found.scores) <= 100 and (found.scores.diff() <= 0).all()
        assert found.boxes_px.min() >= 0
        assert (found.boxes_px[:, 2:].amax(dim=0) <= torch.tensor([image.shape[2], image.shape[1]])).all()
        own_class = [
            each["bbox"]
            for each in truth["annotations"]
            if each["image_id"] == record["id"] and each["category_id"] == found.category_ids[0]
        ]
        true_px = xywh_to_xyxy(torch.tensor(own_class).reshape(-1, 4))
        num_right += bool((box_iou(found.boxes_px[:1], true_px) > 0.5).any())
    assert num_right >= 8
