"""ONNX files: small ones of every kind, a real one, wrong ones; devices; what does not depend on the batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torchvision.ops import box_iou

from models.frozen import onnx_session
from models.frozen.faster_rcnn import DetectorSettings, load_detector
from models.frozen.onnx_detector import IMAGENET_MEAN, IMAGENET_STD, OnnxDetector
from models.frozen.onnx_session import OnnxSession
from tests.helpers.onnx_file import FLOAT16, UINT8, write_onnx
from tests.models.frozen.test_onnx_detector import SIDE, STOP_SIGN, say, silent
from util.boxes import xywh_to_xyxy
from util.checkpoint import sha256_file
from util.images import load_image
from util.types import Category

WHITE = torch.ones(3, 128, 128)
SQUARE = (1, 3, SIDE, SIDE)


def yolox_outputs() -> dict[str, np.ndarray]:
    """What a YOLOX says to a white picture: a stop sign at (24, 16) to (56, 32) of 128 pixels, score 0.4."""
    raw = silent()
    say(raw, 8 + 2, (16, 8), STOP_SIGN, 0.4, stride=8)
    return {"output": raw[None] / 255}  # a white picture has the mean 255


def yolov8_outputs() -> dict[str, np.ndarray]:
    raw = np.zeros((1, 84, 84), dtype=np.float32)
    raw[0, :4, 7], raw[0, 4 + STOP_SIGN, 7] = [20, 12, 16, 8], 0.4
    return {"output0": raw}


def detr_outputs(num_logits: int, index: int, mean: float) -> dict[str, np.ndarray]:
    """mean: of a white picture as it goes in."""
    boxes = np.zeros((1, 5, 4), dtype=np.float32)
    boxes[0, 2] = [20 / 64, 12 / 64, 16 / 64, 8 / 64]
    logits = np.full((1, 5, num_logits), -50, dtype=np.float32)
    if num_logits in (81, 92):
        logits[..., -1] = np.log(0.6)
        logits[0, 2, index] = np.log(0.4)
    else:
        logits[0, 2, index] = np.log(0.4 / 0.6)
    return {"logits": logits / mean, "pred_boxes": boxes / mean}


IMAGENET = float(((1 - IMAGENET_MEAN) / IMAGENET_STD).mean())
FILES = [
    ("yolox", yolox_outputs(), {}),
    ("yolov8", yolov8_outputs(), {}),
    ("detr", detr_outputs(80, STOP_SIGN, 1), {}),
    ("detr", detr_outputs(80, STOP_SIGN, IMAGENET), {"normalize": "imagenet"}),
    ("detr", detr_outputs(81, STOP_SIGN, IMAGENET), {}),
    ("detr", detr_outputs(91, 13, IMAGENET), {}),
    ("detr", detr_outputs(91, 13, 1), {"normalize": "none"}),
    ("detr", detr_outputs(92, 13, IMAGENET), {}),
]


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize(("arch", "outputs", "metadata"), FILES)
def test_a_file_says_which_kind_it_is(
    tmp_path: Path, arch: str, outputs: dict[str, np.ndarray], metadata: dict[str, str], batch: int | str
) -> None:
    path = write_onnx(tmp_path / "SMALL.ONNX", outputs, (batch, *SQUARE[1:]), metadata=metadata)
    detector = load_detector(path, settings=DetectorSettings(min_score=0.1))
    assert isinstance(detector, OnnxDetector)
    assert (detector.arch, detector.id) == (arch, sha256_file(path))
    assert len(detector.categories) == 80 and detector.categories[STOP_SIGN] == Category(13, "stop sign")
    (found,) = detector([WHITE])
    torch.testing.assert_close(found.boxes_px, torch.tensor([[24.0, 16.0, 56.0, 32.0]]), atol=1e-4, rtol=0)
    assert found.category_ids.tolist() == [13]
    assert found.scores.tolist() == pytest.approx([0.4], abs=1e-5)
    assert len(load_detector(path, settings=DetectorSettings(min_score=0.5))([WHITE])[0].scores) == 0


def equal(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return all(
        torch.equal(one.boxes_px, other.boxes_px)
        and torch.equal(one.category_ids, other.category_ids)
        and torch.equal(one.scores, other.scores)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("run_size", [1, 3])
def test_what_is_found_does_not_depend_on_the_batch(tmp_path: Path, run_size: int) -> None:
    """run_size: of the session's runs, as on a GPU; a run that is not full is filled up with blank pictures."""
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), ("batch", *SQUARE[1:]))
    detector = OnnxDetector.load(path, settings=DetectorSettings(min_score=0.01))
    detector.session.batch = run_size
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 64), (30, 90), (90, 30), (64, 64), (7, 7))]
    alone = [detector([image])[0] for image in images]
    assert len({found.scores[0].item() for found in alone}) == len(alone)  # each picture has its own answer
    for size in (2, 3, 5):
        starts = range(0, len(images), size)
        assert equal([each for start in starts for each in detector(images[start : start + size])], alone)


def test_threads_follow_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = write_onnx(tmp_path / "m.onnx", yolox_outputs(), SQUARE), []
    make = onnxruntime.InferenceSession

    def noting(content: bytes, options: Any, **others: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return make(content, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    OnnxSession(path)
    assert seen == [3]


def test_a_device_without_provider_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), SQUARE)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(
            ValueError, match=rf"m\.onnx cannot be run on {device}: .* has CPUExecutionProvider; for CUDA"
        ):
            load_detector(path, device)
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    provider = onnx_session._provider(path, onnxruntime, torch.device("cuda:1"))
    assert provider == ("CUDAExecutionProvider", {"device_id": 1})
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ValueError, match=r"m\.onnx cannot be run on cuda: .* not start CUDA"),
    ):
        load_detector(path, "cuda")  # which onnxruntime says it has, and then does not


def test_without_onnxruntime_it_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), SQUARE)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError, match=r"m\.onnx.* need the package onnxruntime, .* -m pip install onnxruntime==\d"
    ) as e:
        load_detector(path)
    assert "\n" not in str(e.value)


# --- wrong files ---------------------------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    """One line that names the file."""
    with pytest.raises(ValueError, match=message) as error:
        load_detector(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no detector at .*nowhere\.onnx"):
        load_detector(tmp_path / "nowhere.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no detector at .*folder\.onnx"):
        load_detector(tmp_path / "folder.onnx")
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), SQUARE)
    whole = path.read_bytes()
    for content in (b"", b"<html>not found</html>", *(whole[: len(whole) * k // 7] for k in range(1, 7)), whole[:-9]):
        (tmp_path / "bad.onnx").write_bytes(content)
        refused(tmp_path / "bad.onnx", r"bad\.onnx is not an ONNX model that onnxruntime can read")


@pytest.mark.parametrize("outputs", [yolox_outputs(), yolov8_outputs(), detr_outputs(91, 13, IMAGENET)])
def test_a_damaged_file_works_or_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], outputs: dict[str, np.ndarray]
) -> None:
    """Bytes of the graph (not of the weights) are replaced: names, types, sizes, lengths."""
    whole = write_onnx(tmp_path / "whole.onnx", outputs, SQUARE).read_bytes()
    draw, path, said = np.random.default_rng(0), tmp_path / "m.onnx", []
    places = [*range(450), *range(len(whole) - 200, len(whole))]
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.choice(places, 2):
            damaged[place] = int(draw.integers(256))
        path.write_bytes(damaged)
        try:
            load_detector(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all(str(path) in each and "\n" not in each for each in said)
    assert capfd.readouterr() == ("", "")


def test_weights_in_another_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is the file's, so what is beside it may not count: whether it is there or not."""
    monkeypatch.chdir(tmp_path)
    outputs = yolox_outputs()
    path = write_onnx(tmp_path / "m.onnx", outputs, SQUARE, external="weights.bin")
    refused(path, r"m\.onnx keeps weights in another file")
    (tmp_path / "weights.bin").write_bytes(outputs["output"].astype("<f4").tobytes())
    refused(path, r"m\.onnx keeps weights in another file")


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        ((1, 3, "height", "width"), r"\[1, 3, \?, \?\]"),
        ((1, 3, 64, 96), r"\[1, 3, 64, 96\]"),
        ((1, 1, 64, 64), r"\[1, 1, 64, 64\]"),
        ((8, 3, 64, 64), r"\[8, 3, 64, 64\]"),
        ((1, 3, 72, 72), r"\[1, 3, 72, 72\]"),
        ((1, 3, 65536, 65536), r"\[1, 3, 65536, 65536\]"),
    ],
)
def test_models_of_another_input_are_refused(tmp_path: Path, shape: tuple[int | str, ...], known: str) -> None:
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), shape)
    refused(path, rf"m\.onnx takes an input of shape {known}.*\[1, 3, S, S\]")


def test_inputs_of_another_type_or_number_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for kind, name in ((UINT8, "uint8"), (FLOAT16, "float16")):
        write_onnx(path, yolox_outputs(), SQUARE, input_kind=kind)
        refused(path, rf"m\.onnx takes an input of type tensor\({name}\), expected is tensor\(float\)")
    write_onnx(path, yolox_outputs(), SQUARE, second_input=True)
    refused(path, r"m\.onnx takes 2 inputs \(images \[1, 3, 64, 64\], sizes \[1, 2\]\), expected is one")
    write_onnx(path, yolox_outputs(), SQUARE, weights_are_inputs=True)  # of old exporters: they have their values
    assert load_detector(path).arch == "yolox"


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(80, 85)], r"\[1, 80, 85\]"),
        ([(84, 25)], r"\[1, 84, 25\]"),
        ([(85, 84)], r"\[1, 85, 84\]"),
        ([(300, 6)], r"\[1, 300, 6\]"),
        ([(10, 4), (10, 20)], r"\[1, 10, 4\] and \[1, 10, 20\]"),
        ([(10, 4), (9, 80)], r"\[1, 10, 4\] and \[1, 9, 80\]"),
        ([(10, 4), (10, 80), (10, 80)], r"\[1, 10, 4\] and \[1, 10, 80\] and \[1, 10, 80\]"),
    ],
)
def test_models_of_another_output_are_refused(tmp_path: Path, shapes: list[tuple[int, int]], found: str) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(path, {f"out{at}": np.zeros((1, *shape), np.float32) for at, shape in enumerate(shapes)}, SQUARE)
    refused(
        path, rf"m\.onnx gives {found} for an input of 64.*gives \[1, 84, 85\].*\[1, 84, N\].*80 or 81 or 91 or 92\]"
    )


def test_numbers_that_are_no_outputs_are_refused(tmp_path: Path) -> None:
    path, decoded = tmp_path / "m.onnx", yolox_outputs()
    decoded["output"][..., 2:4] = 200.0 / 114  # times the grey of the picture that tries it
    write_onnx(path, decoded, SQUARE)
    refused(path, r"m\.onnx does not give raw YOLOX outputs: log sizes .* reach 200")
    write_onnx(path, {"output": np.full((1, 84, 84), np.nan)}, SQUARE)
    refused(path, r"m\.onnx gives NaN or infinite numbers")
    write_onnx(path, detr_outputs(91, 13, 1), SQUARE, metadata={"normalize": "clip"})
    refused(path, r"m\.onnx has normalize='clip' in its metadata, known are imagenet, none")


def test_an_open_batch_that_is_none_is_refused(tmp_path: Path) -> None:
    """Some exporters name the batch and then merge its pictures into one."""
    path = write_onnx(tmp_path / "m.onnx", yolox_outputs(), SQUARE)
    session = OnnxSession(path)
    session.batch = 2
    with pytest.raises(ValueError, match=r"m\.onnx cannot be run by onnxruntime"):
        session.run([np.zeros((3, SIDE, SIDE), np.float32)])


def test_a_real_model_finds_the_objects_of_real_photos(shared: Path) -> None:
    """The surest detection is right in 9 of the first 12 photos (67 of all 79); the rest are the model's mistakes.

    It hardly tells RGB from BGR: the tests of the blob do.
    """
    folder = shared / "data" / "coco_mini"
    truth = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    detector = load_detector(shared / "models" / "yolox_nano.onnx", settings=DetectorSettings())
    assert isinstance(detector, OnnxDetector) and (detector.session.width, detector.session.height) == (416, 416)
    assert [(each["id"], each["name"]) for each in truth["categories"]] == [
        (category.id, category.name) for category in detector.categories
    ]
    records = sorted(truth["images"], key=lambda record: record["id"])[:12]
    pixels = [np.array(load_image(folder / "val2017" / record["file_name"])) for record in records]
    images = [torch.from_numpy(each).permute(2, 0, 1) / 255 for each in pixels]
    detections = detector(images)
    assert equal(detections[3:5], [detector([image])[0] for image in images[3:5]])
    num_right = 0
    for record, image, found in zip(records, images, detections, strict=True):
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
