"""The detector: built without downloads, trains, survives its file, finds what it was taught, refuses wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.config import RESNET50_FPN_V2, SMALL, SMALL_FPN
from models.frozen.detections import fitting_batches
from models.frozen.faster_rcnn import (
    Detections,
    DetectorSettings,
    build_detector,
    detector_checkpoint,
    load_detector,
    load_faster_rcnn,
)
from scripts.mini import detector_training, train_detector
from scripts.mini.dataset import DatasetSettings, make_dataset
from scripts.mini.detector_training import match_iou, soften
from scripts.mini.scenes import render_scene
from tests.conftest import ROOT
from util.checkpoint import save_atomic
from util.rng import generator
from util.types import Category

CATEGORIES = [Category(13, "stop sign"), Category(53, "apple"), Category(85, "clock")]


def images(count: int) -> list[Tensor]:
    return list(torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def write(path: Path, model_arch: str = SMALL, **changes: object) -> Path:
    content = detector_checkpoint(build_detector(model_arch, 4), model_arch, CATEGORIES, torch.float16)
    save_atomic({**content, **changes}, path)
    return path


def test_mini_is_small() -> None:
    assert sum(p.numel() for p in build_detector(SMALL, 13).parameters()) <= 1_200_000
    assert sum(p.numel() for p in build_detector(SMALL_FPN, 13).parameters()) <= 750_000


def test_the_two_small_ones_share_no_layer_and_no_anchor() -> None:
    plain, pyramid = build_detector(SMALL, 4), build_detector(SMALL_FPN, 4)
    assert {type(m) for m in plain.backbone.modules()} & {torch.nn.BatchNorm2d, torch.nn.GroupNorm} == {
        torch.nn.BatchNorm2d
    }
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in pyramid.modules())
    assert plain.transform.min_size != pyramid.transform.min_size
    sides = [
        {side / model.transform.max_size for level in model.rpn.anchor_generator.sizes for side in level}
        for model in (plain, pyramid)
    ]
    assert not sides[0] & sides[1]


def test_the_pyramid_has_strides_4_and_8() -> None:
    levels = build_detector(SMALL_FPN, 4).backbone(torch.zeros(1, 3, 96, 64))
    assert {name: level.shape for name, level in levels.items()} == {"0": (1, 64, 24, 16), "1": (1, 64, 12, 8)}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown detector 'yolo'; known are fasterrcnn_mini"):
        build_detector("yolo", 4)
    with pytest.raises(ValueError, match="at least 2 labels.*num_classes=1"):
        build_detector(SMALL, 1)
    with pytest.raises(ValueError, match="3 labels, 3 categories"):
        detector_checkpoint(build_detector(SMALL, 3), SMALL, CATEGORIES, torch.float16)


@pytest.mark.parametrize("arch", [SMALL, SMALL_FPN])
def test_a_step_lowers_the_loss_and_every_parameter_learns(arch: str) -> None:
    model = build_detector(arch, 4).train()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 44.0], [2.0, 30.0, 14.0, 41.0]])  # one for each level of the pyramid
    targets = [{"boxes": boxes, "labels": torch.tensor([2, 1])} for _ in range(2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        losses = model(images(2), targets)
        assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("arch", [SMALL, SMALL_FPN])
def test_file_round_trip(tmp_path: Path, arch: str) -> None:
    model = build_detector(arch, 4).eval()
    save_atomic(detector_checkpoint(model, arch, CATEGORIES, torch.float32), tmp_path / "detector.pth")
    detector = load_faster_rcnn(tmp_path / "detector.pth")
    assert detector.categories == tuple(CATEGORIES)
    assert detector.arch == arch
    assert len(detector.id) == 64
    assert not any(p.requires_grad for p in detector.model.parameters())
    with torch.no_grad():
        expected = [model([image])[0] for image in images(2)]
    for found, output in zip(detector(images(2)), expected, strict=True):
        assert len(found.scores) > 0
        assert torch.equal(found.boxes_px, output["boxes"])
        assert torch.equal(found.scores, output["scores"])
        assert found.category_ids.tolist() == [CATEGORIES[label - 1].id for label in output["labels"].tolist()]


def test_half_precision_file_loads_as_single_precision(tmp_path: Path) -> None:
    path = write(tmp_path / "detector.pth")
    assert path.stat().st_size < 2.5 * 2**20
    assert all(p.dtype == torch.float32 for p in load_faster_rcnn(path).model.parameters())


def test_a_file_of_one_small_one_is_no_file_of_the_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"does not fit {SMALL}: lacks backbone"):
        load_detector(write(tmp_path / "detector.pth", SMALL_FPN, arch=SMALL))
    (found,) = load_detector(write(tmp_path / "detector.pth", SMALL_FPN), settings=DetectorSettings())(images(1))
    assert len(found.scores) > 0


def test_torchvisions_coco_file_loads(tmp_path: Path) -> None:
    torch.save(build_detector(RESNET50_FPN_V2, 91).state_dict(), tmp_path / "coco.pth")
    detector = load_faster_rcnn(tmp_path / "coco.pth")
    assert detector.arch == RESNET50_FPN_V2
    assert len(detector.categories) == 80
    assert Category(13, "stop sign") in detector.categories
    assert Category(90, "toothbrush") in detector.categories
    assert detector.category_ids[13] == 13
    assert detector.category_ids[12] == 0  # an id that COCO never used


def test_the_committed_judge_is_not_the_reward_and_agrees_with_it_on_a_drawing() -> None:
    folder = ROOT / "pretrained_models/mini"
    reward, judge = (load_faster_rcnn(folder / f"fasterrcnn_mini{suffix}.pth") for suffix in ("", "_judge"))
    assert (reward.arch, judge.arch) == (SMALL, SMALL_FPN)
    assert reward.categories == judge.categories and len(judge.categories) == 12
    scene = render_scene(np.random.default_rng(3))
    picture = torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255
    boxes = torch.tensor([item.bbox for item in scene.objects])  # xywh
    boxes[:, 2:] += boxes[:, :2]
    category_ids = torch.tensor([item.category_id for item in scene.objects])
    for detector in (reward, judge):
        (found,) = detector([picture])
        assert min(match_iou(boxes, category_ids, found, min_score=0.5)) > 0.5


def test_settings_change_the_thresholds(tmp_path: Path) -> None:
    """Random weights score all classes about 1/4, and a low IoU threshold leaves few boxes of each."""
    path = write(tmp_path / "detector.pth")

    def count(settings: DetectorSettings | None) -> int:
        (found,) = load_detector(path, settings=settings)(images(1))
        assert (found.scores.diff() <= 0).all()
        return len(found.scores)

    assert count(None) == 50  # as many as the architecture allows
    assert count(DetectorSettings()) > 50
    assert count(DetectorSettings(max_detections=7)) == 7
    assert count(DetectorSettings(min_score=0.9)) == 0
    assert 0 < count(DetectorSettings(nms_iou=0.01)) < count(DetectorSettings(nms_iou=0.5))


def test_settings_reach_every_threshold_and_none_leaves_the_files_own(tmp_path: Path) -> None:
    path = write(tmp_path / "detector.pth")
    own = load_faster_rcnn(path).model.roi_heads
    assert (own.score_thresh, own.nms_thresh, own.detections_per_img) == (0.05, 0.5, 50)
    heads = load_faster_rcnn(path, settings=DetectorSettings(0.002, None, 30)).model.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.002, 0.5, 30)
    heads = load_faster_rcnn(path, settings=DetectorSettings(0.002, 0.7, 30)).model.roi_heads
    assert heads.nms_thresh == 0.7


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_score must be within 0 and 1, got -0.1"):
        DetectorSettings(min_score=-0.1)
    with pytest.raises(ValueError, match="min_score.*got nan"):
        DetectorSettings(min_score=float("nan"))
    with pytest.raises(ValueError, match="nms_iou must be above 0 and at most 1, or None, got 0"):
        DetectorSettings(nms_iou=0.0)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        DetectorSettings(max_detections=0)


def test_images_of_different_sizes_keep_their_pixels(tmp_path: Path) -> None:
    detector = load_detector(write(tmp_path / "detector.pth"), settings=DetectorSettings())
    small, wide = torch.rand(3, 40, 40), torch.rand(3, 48, 96)
    found_small, found_wide = detector([small, wide])
    assert found_small.boxes_px.max() <= 40
    assert 48 < found_wide.boxes_px[:, 2].max() <= 96
    assert found_wide.boxes_px[:, 3].max() <= 48


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*download\.pytorch\.org"):
        load_detector(tmp_path / "nowhere.pth")
    path = write(tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated"):
        load_detector(path)


def test_wrong_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    save_atomic({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"other\.pth is not a Faster R-CNN"):
        load_detector(path)
    save_atomic({"model": {}, "arch": SMALL}, path)
    with pytest.raises(ValueError, match="no entry 'categories'"):
        load_detector(path)
    with pytest.raises(ValueError, match="detector 'yolo'; known are"):
        load_detector(write(path, arch="yolo"))
    with pytest.raises(ValueError, match='"categories" must be a list'):
        load_detector(write(path, categories=["apple"]))
    with pytest.raises(ValueError, match="4 labels in .*but 1 categories"):
        load_detector(write(path, categories=[{"id": 1, "name": "person"}]))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    state = detector_checkpoint(build_detector(SMALL, 4), SMALL, CATEGORIES, torch.float16)["model"]
    bias = "roi_heads.box_head.fc6.bias"
    with pytest.raises(ValueError, match=f"does not fit {SMALL}: lacks {bias}$"):
        load_detector(write(path, model={name: value for name, value in state.items() if name != bias}))
    with pytest.raises(ValueError, match="has surplus besides"):
        load_detector(write(path, model={**state, "surplus": torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"{bias} has shape \(7,\), not \(128,\)"):
        load_detector(write(path, model={**state, bias: torch.zeros(7)}))
    with pytest.raises(ValueError, match=f"{bias} is not finite"):
        load_detector(write(path, model={**state, bias: torch.full((128,), torch.nan)}))


def test_matching_wants_class_place_and_score() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    half = torch.tensor([[0.0, 0.0, 10.0, 5.0]])
    for category_id, score, expected in ((13, 0.9, 0.5), (53, 0.9, 0.0), (13, 0.4, 0.0)):
        found = Detections(half, torch.tensor([category_id]), torch.tensor([score]))
        assert match_iou(box, torch.tensor([13]), found, min_score=0.5) == [pytest.approx(expected)]


def test_softening_keeps_size_and_range() -> None:
    image = images(1)[0]
    soft = soften(image, torch.Generator().manual_seed(1))
    assert soft.shape == image.shape
    assert soft.min() >= 0
    assert soft.max() <= 1
    assert soft.diff(dim=2).abs().mean() < image.diff(dim=2).abs().mean()


def test_training_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps at once, and four steps cut off after the state of the second, write the same weights."""
    make_dataset(tmp_path / "data", DatasetSettings(num_train=8, num_val=4, size=64), num_workers=1)
    common = [
        "--data",
        str(tmp_path / "data"),
        "--arch",
        SMALL_FPN,
        "--steps",
        "4",
        "--batch_size",
        "4",
        "--save_freq",
        "2",
    ]
    whole, resumed = tmp_path / "whole.pth", tmp_path / "resumed.pth"
    train_detector.main([*common, "--output", str(whole)])

    def stop(step_of_state: Path, *args: object, **kwargs: object) -> None:
        original(step_of_state, *args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    original = detector_training.save_state
    monkeypatch.setattr(detector_training, "save_state", stop)
    with pytest.raises(SystemExit, match="130"):
        train_detector.main([*common, "--output", str(resumed)])
    assert not resumed.exists()
    monkeypatch.setattr(detector_training, "save_state", original)
    train_detector.main([*common, "--output", str(resumed)])
    expected, found = load_faster_rcnn(whole).model.state_dict(), load_faster_rcnn(resumed).model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert load_faster_rcnn(whole).arch == SMALL_FPN
    settings = json.loads((tmp_path / "whole.json").read_text())["settings"]
    assert settings["arch"] == SMALL_FPN
    assert not detector_training.state_file(resumed).exists()


@pytest.mark.parametrize("arch", [SMALL, SMALL_FPN])
def test_an_image_is_not_changed_by_the_others_of_its_call(tmp_path: Path, arch: str) -> None:
    """Unlike sizes would be padded to a common one, which changes what is found."""
    save_atomic(detector_checkpoint(build_detector(arch, 4), arch, CATEGORIES, torch.float32), tmp_path / "d.pth")
    detector = load_faster_rcnn(tmp_path / "d.pth", settings=DetectorSettings(min_score=0.0))
    sizes = ((64, 64), (48, 96), (64, 64), (96, 48))
    mixed = [torch.rand(3, *size, generator=generator("image", index)) for index, size in enumerate(sizes)]
    for image, together in zip(mixed, detector(mixed), strict=True):
        (alone,) = detector([image])
        assert len(alone.scores) > 0
        assert torch.equal(alone.boxes_px, together.boxes_px) and torch.equal(alone.scores, together.scores)


def test_only_images_of_one_size_share_a_batch() -> None:
    """On a GPU (here: without memory); on a CPU every image is alone."""
    sizes = ((64, 64), (48, 96), (64, 64), (96, 48), (48, 96))
    on_device = [torch.empty(3, *size, device="meta") for size in sizes]
    assert fitting_batches(on_device) == [[0, 2], [1, 4], [3]]
    assert fitting_batches([torch.empty(3, *size) for size in sizes]) == [[0], [1], [2], [3], [4]]
