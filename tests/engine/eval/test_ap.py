"""Average precision by hand, and resampling against pycocotools on images that are really repeated."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.eval.ap import METRICS, ApResult, average_precision

HALF = (51 + 50 * 2 / 3) / 101  # precision 1 up to recall .5, then 2/3


def truth(*boxes: tuple[int, int, list[float], int], num_images: int = 2) -> dict[str, Any]:
    """Boxes are (image_id, category_id, xywh, iscrowd)."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(1, num_images + 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for i, (image, c, box, crowd) in enumerate(boxes)  # from 0, which pycocotools takes for "no match"
        ],
    }


def found(image_id: int, category_id: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


A, B, FAR = [10.0, 10.0, 20.0, 20.0], [60.0, 60.0, 30.0, 30.0], [0.0, 80.0, 10.0, 10.0]
TWO = truth((1, 1, A, 0), (1, 1, B, 0))


def scored(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], ids: Sequence[int] = (1, 2), **settings: Any
) -> ApResult:
    """The result, after a check that counting every image once changes nothing."""
    result = average_precision(ground_truth, detections, ids, **settings)
    once = result.resample(np.ones((1, len(ids)), dtype=np.int64))
    for name, values in once.items():
        np.testing.assert_allclose(values, [result.values[name]], rtol=0, atol=1e-12)
    return result


def test_perfect_detections() -> None:
    ground_truth = truth((1, 1, A, 0), (1, 5, B, 0), (2, 1, B, 0))
    detections = [found(1, 1, A, 0.9), found(1, 5, B, 0.3), found(2, 1, B, 0.1)]
    values = scored(ground_truth, detections).values
    assert tuple(values) == METRICS
    assert [values[name] for name in ("AP", "AP50", "AP75", "APs", "AR100")] == pytest.approx([1.0] * 5)
    assert math.isnan(values["APm"]) and math.isnan(values["APl"])


def test_precision_recall_curve_by_hand() -> None:
    result = scored(TWO, [found(1, 1, A, 0.9), found(1, 1, FAR, 0.8), found(1, 1, B, 0.7)])
    assert result.values["AP"] == pytest.approx(HALF)
    assert result.per_class[1] == pytest.approx({"AP": HALF, "AP50": HALF})
    assert set(result.per_class) == {1, 5} and math.isnan(result.per_class[5]["AP"])


def test_iou_decides_which_thresholds_are_reached() -> None:
    shifted = [10.0, 10.0, 20.0, 15.5]  # IoU .775 with A: right at .5, .55, ..., .75
    values = scored(truth((1, 1, A, 0)), [found(1, 1, shifted, 0.5)]).values
    assert (values["AP"], values["AP50"], values["AP75"], values["AR100"]) == pytest.approx((0.6, 1, 1, 0.6))


def test_an_object_found_twice_counts_once() -> None:
    result = scored(TWO, [found(1, 1, A, 0.9), found(1, 1, A, 0.8), found(1, 1, B, 0.7)])
    assert result.values["AP50"] == pytest.approx(HALF)


def test_wrong_class_in_the_right_box_is_nothing() -> None:
    values = scored(TWO, [found(1, 5, A, 0.9), found(1, 5, B, 0.9)]).values
    assert values["AP"] == values["AP50"] == values["AR100"] == 0.0


def test_equal_scores_keep_their_order() -> None:
    single = truth((1, 1, A, 0))
    right, wrong = found(1, 1, A, 0.5), found(1, 1, FAR, 0.5)
    assert scored(single, [right, wrong]).values["AP50"] == pytest.approx(1.0)
    assert scored(single, [wrong, right]).values["AP50"] == pytest.approx(0.5)
    elsewhere = found(2, 1, FAR, 0.5)  # after image 1, wherever it stands in the list and in the ids
    assert scored(single, [elsewhere, right], (2, 1)).values["AP50"] == pytest.approx(1.0)


def test_crowds_are_neither_objects_nor_mistakes() -> None:
    ground_truth = truth((1, 1, A, 0), (1, 1, [40.0, 40.0, 60.0, 60.0], 1))
    inside = [found(1, 1, [50.0, 50.0, 10.0, 10.0], 0.9), found(1, 1, [70.0, 70.0, 10.0, 10.0], 0.8)]
    assert scored(ground_truth, [*inside, found(1, 1, A, 0.5)]).values["AP50"] == pytest.approx(1.0)
    assert scored(ground_truth, inside).values["AP50"] == 0.0
    other_class = found(1, 5, [50.0, 50.0, 10.0, 10.0], 0.9)
    assert scored(ground_truth, [other_class, found(1, 1, A, 0.5)]).values["AP50"] == pytest.approx(1.0)
    outside = found(1, 1, FAR, 0.9)
    assert scored(ground_truth, [outside, found(1, 1, A, 0.5)]).values["AP50"] == pytest.approx(0.5)


def test_only_the_images_asked_for_count() -> None:
    ground_truth = truth((1, 1, A, 0), (2, 1, B, 0), (2, 5, A, 0))
    detections = [found(1, 1, A, 0.9)]
    assert scored(ground_truth, detections, (1,)).values["AP"] == pytest.approx(1.0)
    assert scored(ground_truth, detections, (1, 2)).values["AP"] == pytest.approx((51 / 101 + 0) / 2)


def test_empty_images_and_false_alarms_in_them() -> None:
    ground_truth = truth((1, 1, A, 0), num_images=3)
    right = found(1, 1, A, 0.5)
    assert scored(ground_truth, [right], (1, 2, 3)).values["AP"] == pytest.approx(1.0)
    assert scored(ground_truth, [right, found(3, 1, A, 0.9)], (1, 2, 3)).values["AP"] == pytest.approx(0.5)


def test_no_detections_score_zero_and_no_objects_score_nan() -> None:
    values = scored(TWO, []).values
    assert values["AP"] == values["AP50"] == values["AR100"] == 0.0 and math.isnan(values["APl"])
    assert all(math.isnan(value) for value in scored(TWO, [], (2,)).values.values())
    assert all(math.isnan(value) for value in scored(TWO, [found(2, 1, A, 0.9)], (2,)).values.values())
    only_crowd = scored(truth((1, 1, A, 1)), [found(1, 1, A, 0.9)])
    assert math.isnan(only_crowd.values["AP"])


def test_area_classes_with_edges_of_ones_own() -> None:
    small, medium = [0.0, 0.0, 5.0, 5.0], [50.0, 50.0, 15.0, 15.0]
    ground_truth = truth((1, 1, small, 0), (1, 1, medium, 0))
    values = scored(ground_truth, [found(1, 1, small, 0.9)], area_edges_px=(10, 20)).values
    assert (values["APs"], values["APm"]) == pytest.approx((1.0, 0.0)) and math.isnan(values["APl"])
    values = scored(ground_truth, [found(1, 1, small, 0.9)], area_edges_px=(2, 4)).values
    assert math.isnan(values["APs"]) and math.isnan(values["APm"]) and values["APl"] == pytest.approx(51 / 101)


def test_max_detections_is_per_image_and_class() -> None:
    detections = [found(1, 1, A, 0.9), found(1, 1, B, 0.7)]
    assert scored(TWO, detections, max_detections=1).values["AR100"] == pytest.approx(0.5)
    assert scored(TWO, detections, max_detections=2).values["AR100"] == pytest.approx(1.0)


def test_inputs_stay_as_they_are_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, detections = copy.deepcopy(TWO), [found(1, 1, A, 0.9)]
    before = copy.deepcopy((ground_truth, detections))
    average_precision(ground_truth, detections, [1, 2])
    assert (ground_truth, detections) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("detection", "ids", "message"),
    [
        (found(2, 1, A, 0.9), (1,), "detection 0 of image 2: this image is not among the 1"),
        (found(1, 3, A, 0.9), (1,), "category_id 3 is not in the ground truth"),
        (found(1, 1, A, math.nan), (1,), "score must be finite, got nan"),
        (found(1, 1, [0.0, 0.0, -1.0, 1.0], 0.9), (1,), "bbox must be finite"),
        (found(1, 1, A, 0.9), (1, 1), "2 ids, 1 different"),
        (found(1, 1, A, 0.9), (1, 7), r"not in the ground truth: \[7\]"),
        (found(1, 1, A, 0.9), (), "image_ids is empty"),
    ],
)
def test_mistakes_are_named(detection: dict[str, Any], ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(TWO, [detection], ids)


def test_wrong_weights_are_refused() -> None:
    result = average_precision(TWO, [], [1, 2])
    for weights in (np.ones((1, 3), dtype=int), np.ones(2, dtype=int), np.ones((1, 2)), np.array([[1, -1]])):
        with pytest.raises(ValueError, match="weights"):
            result.resample(weights)


IDS = (70, 20, 90, 10, 30, 50, 80, 40)  # not sorted: weights follow this order


def random_data(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects, crowds and detections near them, of classes 1..4. Scores tie across images, not within one."""
    draw = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id in IDS[:-1]:  # the last stays empty
        for _ in range(draw.integers(1, 7)):
            category_id = int(draw.integers(1, 4))
            box = np.concatenate([draw.uniform(0, 60, 2), draw.uniform(5, 40, 2)])
            annotations.append(
                {"image_id": image_id, "category_id": category_id, "bbox": box.tolist(), "area": float(box[2] * box[3])}
                | {"iscrowd": int(draw.random() < 0.2), "id": len(annotations) + 1}
            )
            for _ in range(draw.integers(0, 4)):
                near = np.abs(box + draw.normal(0, 2, 4))
                category = category_id if draw.random() < 0.8 else 4
                detections.append(found(image_id, category, near.tolist(), 0.0))
    for image_id in IDS:
        own = [each for each in detections if each["image_id"] == image_id]
        for each, step in zip(own, draw.permutation(max(len(own), 20)), strict=False):
            each["score"] = step / 100
    images = [{"id": i, "width": 100, "height": 100} for i in IDS]
    categories = [{"id": i, "name": str(i)} for i in range(1, 5)]
    return {"images": images, "categories": categories, "annotations": annotations}, detections


def repeated(entries: list[dict[str, Any]], key: str, weights: np.ndarray) -> list[dict[str, Any]]:
    """The entries of every copy of their image; copies of an image have neighbouring new ids."""
    times = dict(zip(IDS, weights, strict=True))
    return [{**each, key: each[key] * 1000 + copy_} for each in entries for copy_ in range(times[each[key]])]


def plain_pycocotools(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> np.ndarray:
    """AP, AP50, AP75 of its own summary."""
    index = COCO()
    index.dataset = copy.deepcopy(ground_truth)
    for i, annotation in enumerate(index.dataset["annotations"], 1):
        annotation["id"] = i
    index.createIndex()
    evaluation = COCOeval(index, index.loadRes(copy.deepcopy(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:3]


@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_plain_pycocotools(seed: int) -> None:
    ground_truth, detections = random_data(seed)
    result = scored(ground_truth, detections, IDS)
    expected = plain_pycocotools(ground_truth, detections)
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_allclose([result.values[name] for name in METRICS[:3]], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_resampling_equals_repeating_images(seed: int) -> None:
    ground_truth, detections = random_data(seed)
    weights = np.random.default_rng(seed + 100).integers(0, 4, (30, len(IDS)))  # more rows than one block
    weights[1] = np.eye(len(IDS), dtype=int)[0]  # one image: classes drop out
    resampled = average_precision(ground_truth, detections, IDS).resample(weights)
    for row in (0, 1, 29):
        copies = {
            "images": repeated(ground_truth["images"], "id", weights[row]),
            "categories": ground_truth["categories"],
            "annotations": repeated(ground_truth["annotations"], "image_id", weights[row]),
        }
        expected = plain_pycocotools(copies, repeated(detections, "image_id", weights[row]))
        got = [resampled[name][row] for name in METRICS[:3]]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_a_resample_without_objects_is_nan() -> None:
    result = average_precision(TWO, [found(1, 1, A, 0.9)], [1, 2])
    np.testing.assert_allclose(result.resample(np.array([[0, 2], [2, 0]]))["AP"], [math.nan, 51 / 101])
    assert result.resample(np.zeros((0, 2), dtype=int))["AP"].shape == (0,)
