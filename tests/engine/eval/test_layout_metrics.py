"""Layout metrics on hand-made pictures: pairing, ignore regions, ratios, resamples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from engine.data.scenes import text_scene
from engine.eval.layout_metrics import (
    LAYOUT_METRICS,
    ImageScore,
    by_class,
    by_size,
    resample,
    score_image,
    summarize,
)
from engine.eval.targets import Target

CAT, DOG = 3, 17
MATCH_SCORE = 0.3


def target(*boxes: tuple[int, list[float]], ignored: int = 0, crowds: int = 0, image_id: int = 1) -> Target:
    """Boxes are (category_id, xyxy). The last are `crowds`; the `ignored` before them were not given to the model."""
    num_wanted = len(boxes) - ignored - crowds
    return Target(
        image_id=image_id,
        file_name="1.jpg",
        source_size=(60, 80),
        size=(60, 80),  # diagonal 100
        scene=text_scene(""),  # not read
        boxes_px=np.array([box for _, box in boxes], dtype=np.float64).reshape(-1, 4),
        category_ids=np.array([category for category, _ in boxes], dtype=np.int64),
        conditioned=np.array([i < num_wanted for i in range(len(boxes))], dtype=bool),
        crowd=np.array([i >= num_wanted + ignored for i in range(len(boxes))], dtype=bool),
    )


def found(category_id: int, xyxy: list[float], score: float = 0.9, image_id: int = 1) -> dict[str, Any]:
    x0, y0, x1, y1 = xyxy
    return {"image_id": image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}


def scored(wanted: Target, *detections: dict[str, Any]) -> ImageScore:
    return score_image(wanted, list(detections), MATCH_SCORE)


A, B = [0.0, 0.0, 10.0, 10.0], [30.0, 40.0, 50.0, 60.0]


def test_perfect_detections() -> None:
    score = scored(target((CAT, A), (DOG, B)), found(DOG, B, 0.5), found(CAT, A, 0.7))
    np.testing.assert_array_equal(score.category_ids, [CAT, DOG])
    np.testing.assert_allclose(score.areas_px, [100, 400])
    np.testing.assert_allclose(score.ious, [1, 1])
    np.testing.assert_allclose(score.scores, [0.7, 0.5])
    np.testing.assert_allclose(score.distances, [0, 0])
    assert (score.num_detected, score.num_extra) == (2, 0)
    expected = dict.fromkeys(LAYOUT_METRICS, 1.0) | {"extra_rate": 0.0, "centroid_distance": 0.0, "confidence": 0.6}
    assert summarize([score]) == pytest.approx(expected)


def test_one_pair_by_hand() -> None:
    score = scored(target((CAT, A)), found(CAT, [3.0, 4.0, 13.0, 14.0], 0.8))
    np.testing.assert_allclose(score.ious, [7 * 6 / (200 - 42)])
    np.testing.assert_allclose(score.distances, [5 / 100])
    assert (score.num_detected, score.num_extra) == (1, 1)  # IoU < .5: paired, but no success


def test_an_iou_of_one_half_is_a_success() -> None:
    score = scored(target((CAT, A)), found(CAT, [0.0, 0.0, 10.0, 5.0]))
    assert score.ious[0] == 0.5 and score.num_extra == 0
    assert summarize([score])["SR50"] == 1.0


def test_wrong_class_in_the_right_box_is_missing_and_extra() -> None:
    score = scored(target((CAT, A)), found(DOG, A))
    assert score.ious[0] == score.scores[0] == 0.0 and math.isnan(score.distances[0])
    assert (score.num_detected, score.num_extra) == (1, 1)
    summary = summarize([score])
    assert summary["mIoU"] == summary["SR50"] == summary["SR50_image"] == summary["precision"] == 0.0
    assert summary["extra_rate"] == 1.0 and math.isnan(summary["centroid_distance"])


def test_an_object_found_twice_is_one_success_and_one_extra() -> None:
    for first, second in ((0.4, 0.9), (0.9, 0.4)):
        score = scored(target((CAT, A)), found(CAT, A, first), found(CAT, A, second))
        assert score.ious[0] == 1.0 and score.scores[0] == 0.9  # the confident one is the partner
        assert (score.num_detected, score.num_extra) == (2, 1)
        assert summarize([score])["precision"] == 0.5
        beside_a_missing_one = scored(target((CAT, B), (CAT, A)), found(CAT, A, first), found(CAT, A, second))
        np.testing.assert_array_equal(beside_a_missing_one.scores, [0, 0.9])


def test_one_detection_serves_one_of_two_equal_objects() -> None:
    score = scored(target((CAT, A), (CAT, A)), found(CAT, A))
    assert sorted(score.ious) == [0.0, 1.0]


def test_the_best_total_beats_the_best_first() -> None:
    # u overlaps both objects, v the first alone. Greedy gives u to the first (.8) and leaves the second without any;
    # v on the first (.5) and u on the second (.625) are worth more together.
    first, second = [0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 10.0, 10.0]
    u, v = [2.0, 0.0, 10.0, 10.0], [0.0, 0.0, 5.0, 10.0]
    score = scored(target((CAT, first), (CAT, second)), found(CAT, u), found(CAT, v))
    np.testing.assert_allclose(score.ious, [0.5, 0.625])
    assert score.num_extra == 0


def test_pairs_without_overlap_are_no_pairs() -> None:
    score = scored(target((CAT, A)), found(CAT, B), found(CAT, [10.0, 0.0, 20.0, 10.0]))  # far away; touching
    assert score.ious[0] == score.scores[0] == 0.0 and math.isnan(score.distances[0])
    assert (score.num_detected, score.num_extra) == (2, 2)


def test_detections_below_the_threshold_do_not_exist() -> None:
    score = scored(target((CAT, A), (DOG, B)), found(CAT, A, 0.29), found(DOG, B, 0.3))
    np.testing.assert_array_equal(score.ious, [0, 1])
    assert (score.num_detected, score.num_extra) == (1, 0)


@pytest.mark.parametrize("kind", ["ignored", "crowds"])
def test_ignore_regions_are_neither_wanted_nor_extra(kind: str) -> None:
    region = [20.0, 20.0, 60.0, 60.0]
    wanted = target((CAT, A), (CAT, region), **{kind: 1})
    assert len(scored(wanted).ious) == 1
    inside, half, less = [30.0, 30.0, 40.0, 40.0], [10.0, 30.0, 30.0, 40.0], [9.0, 30.0, 29.0, 40.0]
    score = scored(wanted, found(CAT, A), found(CAT, inside), found(CAT, inside), found(CAT, half))
    assert (score.num_detected, score.num_extra) == (1, 0)
    score = scored(wanted, found(CAT, A), found(CAT, less), found(DOG, inside))  # 45 %; another class
    assert (score.num_detected, score.num_extra) == (3, 2)


def test_a_wanted_object_inside_an_ignore_region_counts() -> None:
    score = scored(target((CAT, A), (CAT, [0.0, 0.0, 60.0, 60.0]), ignored=1), found(CAT, A))
    assert score.ious[0] == 1.0 and (score.num_detected, score.num_extra) == (1, 0)


def test_two_regions_are_not_added_up() -> None:
    wanted = target((CAT, [0.0, 0.0, 10.0, 4.0]), (CAT, [0.0, 6.0, 10.0, 10.0]), ignored=2)
    assert scored(wanted, found(CAT, A)).num_extra == 1  # 40 % in each


def test_the_order_of_detections_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    low = draw.integers(0, 30, (24, 2))
    boxes = np.concatenate([low, low + draw.integers(5, 20, (24, 2))], axis=1).astype(float).tolist()
    classes = draw.choice([CAT, DOG], 24).tolist()
    wanted = target(*zip(classes[:10], boxes[:10], strict=True), ignored=2, crowds=1)
    detections = [found(c, box, s) for c, box, s in zip(classes[5:], boxes[5:], draw.uniform(0.2, 1, 19), strict=True)]
    detections += [{**each, "score": 0.9} for each in detections[:6]]  # equal boxes, equal scores
    reference = scored(wanted, *detections)
    assert 0 < reference.num_extra < reference.num_detected
    for seed in range(5):
        shuffled = [detections[i] for i in np.random.default_rng(seed).permutation(len(detections))]
        for name, value in vars(scored(wanted, *shuffled)).items():
            np.testing.assert_array_equal(value, vars(reference)[name], err_msg=name)


def test_empty_pictures() -> None:
    nothing = scored(target((CAT, A), (DOG, B)))
    assert summarize([nothing])["mIoU"] == 0.0 and math.isnan(summarize([nothing])["precision"])
    unwanted = scored(target(), found(CAT, A))
    assert (len(unwanted.ious), unwanted.num_detected, unwanted.num_extra) == (0, 1, 1)
    both = summarize([nothing, unwanted])  # a picture that wants nothing has no success to miss
    assert (both["SR50_image"], both["mIoU_image"], both["extra_rate"]) == (0.0, 0.0, 0.5)
    assert all(math.isnan(value) for value in summarize([]).values())


def test_boxes_without_area_are_extra_not_an_error() -> None:
    wanted = target((CAT, A), (CAT, B), ignored=1)
    score = scored(wanted, found(CAT, [5.0, 5.0, 5.0, 5.0]), found(CAT, [35.0, 45.0, 35.0, 50.0]))
    assert score.ious[0] == 0.0 and score.num_extra == 2


def test_detections_of_another_image_are_refused() -> None:
    with pytest.raises(ValueError, match="image 2: this image is not among"):
        scored(target((CAT, A)), found(CAT, A, image_id=2))
    with pytest.raises(ValueError, match="score must be finite"):
        scored(target((CAT, A)), found(CAT, A, math.nan))


def image(ious: list[float], scores: list[float], num_detected: int, num_extra: int, **fields: Any) -> ImageScore:
    distances = np.where(np.array(ious) > 0, 0.1 * len(ious), np.nan)
    plain = {"category_ids": np.full(len(ious), CAT), "areas_px": np.full(len(ious), 100.0)} | fields
    return ImageScore(1, ious=np.array(ious), scores=np.array(scores), distances=distances, num_detected=num_detected,
                      num_extra=num_extra, **plain)  # fmt: skip


FIRST = image([0.8, 0.0, 0.4], [0.9, 0.0, 0.6], num_detected=4, num_extra=3)
SECOND = image([0.6], [0.5], num_detected=1, num_extra=0)


def test_summary_by_hand() -> None:
    assert summarize([FIRST, SECOND]) == pytest.approx(
        {
            "mIoU": 1.8 / 4,
            "mIoU_image": (0.4 + 0.6) / 2,
            "SR50": 2 / 4,
            "SR50_image": 1 / 2,
            "precision": 2 / 5,
            "extra_rate": 3 / 2,
            "centroid_distance": (0.3 + 0.3 + 0.1) / 3,
            "confidence": 2.0 / 4,
        }
    )


def test_weights_are_repetitions() -> None:
    weights = np.array([[1, 1], [3, 1], [0, 2], [0, 0]])
    rows = resample([FIRST, SECOND], weights)
    assert tuple(rows) == LAYOUT_METRICS
    for row, times in enumerate(weights):
        expected = summarize([FIRST] * times[0] + [SECOND] * times[1])
        assert {name: values[row] for name, values in rows.items()} == pytest.approx(expected, nan_ok=True)
        assert summarize([FIRST, SECOND], times) == pytest.approx(expected, nan_ok=True)


def test_wrong_weights_are_refused() -> None:
    for weights in (np.ones((1, 3)), np.ones(2), np.array([[1, -1]])):
        with pytest.raises(ValueError, match="weights"):
            resample([FIRST, SECOND], weights)
    with pytest.raises(ValueError, match="weights"):
        summarize([FIRST, SECOND], np.ones((1, 2)))


def test_by_class() -> None:
    other = image([0.5, 0.1], [0.5, 0.5], 2, 1, category_ids=np.array([DOG, CAT]))
    table = by_class([FIRST, other])
    assert list(table) == [CAT, DOG]
    assert table[CAT] == pytest.approx({"count": 4, "mIoU": 1.3 / 4, "SR50": 1 / 4})
    assert table[DOG] == pytest.approx({"count": 1, "mIoU": 0.5, "SR50": 1.0})
    assert by_class([]) == {}


def test_by_size_has_its_edges_in_the_upper_class() -> None:
    sizes = image([0.1, 0.2, 0.6, 0.8], [0.5] * 4, 4, 2, areas_px=np.array([99.0, 100.0, 399.0, 400.0]))
    table = by_size([sizes], (10.0, 20.0))
    assert table["small"] == pytest.approx({"count": 1, "mIoU": 0.1, "SR50": 0.0})
    assert table["medium"] == pytest.approx({"count": 2, "mIoU": 0.4, "SR50": 0.5})
    assert table["large"] == pytest.approx({"count": 1, "mIoU": 0.8, "SR50": 1.0})
    empty = by_size([], (10.0, 20.0))["large"]
    assert empty["count"] == 0 and math.isnan(empty["mIoU"])


def test_a_crowd_that_the_model_was_given_is_wanted() -> None:
    crowd = target((CAT, A), crowds=1)
    given = dataclasses.replace(crowd, conditioned=np.array([True]))
    assert len(scored(crowd).ious) == 0
    assert len(scored(given).ious) == 1
