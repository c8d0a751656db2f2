"""From images to rewards: the detector's ids and pixels, batches, the quality term, and input that is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.eval.judge import Judge
from engine.rl.rewards import PARTS, LayoutReward, clip_quality
from engine.rl.settings import RewardSettings, RewardWeights
from models.frozen.detections import Detections
from models.frozen.faster_rcnn import load_detector
from tests.helpers.eval_world import COLOURS, ColourDetector, colour_judge, write_detector
from tests.helpers.tiny import CATEGORIES
from util.types import Category, Layout, LayoutBatch

TOP_LEFT, BOTTOM_RIGHT = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]


def layouts(*rows: Sequence[tuple[int, list[float]]]) -> LayoutBatch:
    """Rows of (contiguous index, xyxy)."""
    each = [
        Layout(torch.tensor([box for _, box in row]).reshape(-1, 4), torch.tensor([i for i, _ in row]).long())
        for row in rows
    ]
    return LayoutBatch.collate(each, 4)


def painted(*boxes: tuple[int, list[int]], width: int = 64) -> Tensor:
    """A grey [3, 64, width] picture with rectangles (contiguous index, xyxy in pixels)."""
    image = torch.full((3, 64, width), 0.5)
    for index, (x0, y0, x1, y1) in boxes:
        colour = torch.tensor(COLOURS[CATEGORIES[index].id]) / 255
        image[:, y0:y1, x0:x1] = colour[:, None, None]
    return image


def colour_reward(batch_size: int = 2, **settings: float) -> LayoutReward:
    return LayoutReward(colour_judge(), CATEGORIES, RewardWeights(), RewardSettings(**settings), batch_size)


@pytest.mark.parametrize("extra", [0.0, 0.05])
def test_regions_add_up_to_the_reward(extra: float) -> None:
    """Boxes in the layout's order, extras where they are; a weight of 0 leaves them out."""
    weights = RewardWeights(extra=extra)
    reward = LayoutReward(colour_judge(), CATEGORIES, weights, RewardSettings(), 2)
    wanted = layouts([(2, BOTTOM_RIGHT), (0, TOP_LEFT)])
    found = reward(painted((0, [0, 0, 24, 32]), (1, [32, 0, 64, 32]))[None], wanted, [""])
    (region,) = found.regions
    assert region.of_boxes[0] == pytest.approx(-weights.miss) and region.of_boxes[1] > 0.5
    assert region.extra_xyxy.tolist() == ([[0.5, 0.0, 1.0, 0.5]] if extra else [])
    total = region.of_boxes.mean() - extra * region.extra_presence.sum() / 2
    torch.testing.assert_close(total, found.total[0])


LAYOUT = layouts(
    [(0, [0.0, 0.0, 0.5, 0.5]), (2, [0.5, 0.5, 1.0, 1.0])],
    [(1, [0.25, 0.25, 0.75, 0.75])],
    [(1, [0.25, 0.25, 0.75, 0.75])],
)
IMAGES = torch.stack(
    [
        painted((0, [0, 0, 32, 32]), (2, [32, 32, 64, 64])),  # as asked
        painted((1, [32, 16, 64, 48])),  # 16 px to the right
        painted((0, [16, 16, 48, 48])),  # the wrong class
    ]
)


def test_colours_to_rewards() -> None:
    result = colour_reward()(IMAGES, LAYOUT, ["a", "b", "c"])
    assert list(result.parts) == list(PARTS)
    assert result.total.dtype == torch.float32 and all(part.shape == (3,) for part in result.parts.values())
    shifted = 1 - 0.25 / math.sqrt(2)
    expected = {
        "iou": [1, 1 / 3, 0],
        "confidence": [0.9, 0.9, 0],
        "centroid": [1, shifted, 0],
        "miss": [0, 0, 1],
        "extra": [0, 0, 1],
    }
    for name, values in expected.items():
        torch.testing.assert_close(result.parts[name], torch.tensor(values, dtype=torch.float32))
    totals = torch.tensor([1 + 0.18 + 0.2, 1 / 3 + 0.18 + 0.2 * shifted, -0.15])
    torch.testing.assert_close(result.total, totals)


def test_detections_come_in_pixels_with_the_datasets_ids() -> None:
    found = colour_reward()(IMAGES, LAYOUT, ["a", "b", "c"]).detections
    assert found[1].boxes_px.tolist() == [[32, 16, 64, 48]] and found[1].category_ids.tolist() == [18]
    assert found[0].category_ids.tolist() == [1, 37]


def test_wide_pictures_are_measured_by_both_sides() -> None:
    image = painted((1, [48, 16, 112, 48]), width=128)[None]  # wanted: [32, 16, 96, 48]
    result = colour_reward()(image, layouts([(1, [0.25, 0.25, 0.75, 0.75])]), ["b"])
    assert result.parts["iou"].item() == pytest.approx(48 / 80)
    assert result.parts["centroid"].item() == pytest.approx(1 - 16 / math.hypot(128, 64))


def test_rewards_do_not_depend_on_batches() -> None:
    rows = [colour_reward(batch_size=size)(IMAGES, LAYOUT, ["a", "b", "c"]).total for size in (1, 2, 3, 8)]
    assert all(torch.equal(row, rows[0]) for row in rows)


class OtherIds(ColourDetector):
    """The same eyes with ids of its own, and one category that the dataset does not have."""

    id = "1" * 64
    categories: tuple[Category, ...] = (
        Category(1, "dog"),
        Category(2, "person"),
        Category(3, "sports ball"),
        Category(4, "tree"),
    )

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        own_id = {1: 2, 18: 1, 37: 3}
        found = []
        for each in super().__call__(images):
            ids = torch.tensor([own_id[category_id] for category_id in each.category_ids.tolist()] + [4])
            tree = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
            scores = torch.cat([each.scores, torch.tensor([0.9])])
            found.append(Detections(torch.cat([each.boxes_px, tree]), ids, scores))
        return found


def test_the_detectors_ids_become_the_datasets() -> None:
    other = LayoutReward(Judge.of(OtherIds(), CATEGORIES), CATEGORIES, RewardWeights(), RewardSettings(), 2)
    expected = colour_reward()(IMAGES, LAYOUT, ["a", "b", "c"])
    result = other(IMAGES, LAYOUT, ["a", "b", "c"])  # trees are nobody's business
    assert torch.equal(result.total, expected.total)
    assert result.detections[1].category_ids.tolist() == [18]
    assert other.detector_id == "1" * 64


def test_a_network_as_detector(tmp_path: Path) -> None:
    detector = load_detector(write_detector(tmp_path / "detector.pth"))
    reward = LayoutReward(Judge.of(detector, CATEGORIES), CATEGORIES, RewardWeights(), RewardSettings(), 2)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    result = reward(images, LAYOUT, ["a", "b", "c"])
    assert result.total.isfinite().all() and not result.total.requires_grad
    assert {category_id for each in result.detections for category_id in each.category_ids.tolist()} <= {1, 18, 37}
    assert all((result.parts["miss"] >= 0) & (result.parts["miss"] <= 1))


def test_quality_is_a_weighted_part() -> None:
    seen: list[tuple[int, list[str]]] = []

    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((len(images), list(prompts)))
        return images.mean((1, 2, 3))

    weights = RewardWeights(quality=2.0)
    reward = LayoutReward(colour_judge(), CATEGORIES, weights, RewardSettings(), 2, brightness)
    result = reward(IMAGES, LAYOUT, ["a", "b", "c"])
    assert seen == [(2, ["a", "b"]), (1, ["c"])]
    torch.testing.assert_close(result.parts["quality"], IMAGES.mean((1, 2, 3)))
    plain = colour_reward()(IMAGES, LAYOUT, ["a", "b", "c"]).total
    torch.testing.assert_close(result.total, plain + 2 * IMAGES.mean((1, 2, 3)))


def test_clip_quality_hands_over_pictures_and_prompts() -> None:
    class Scorer:
        def clip_scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
            assert all(picture.dtype == np.uint8 and picture.shape == (64, 64, 3) for picture in pictures)
            assert list(prompts) == ["a", "b", "c"]
            return torch.tensor([picture[20, 20, 0] for picture in pictures], dtype=torch.float32)

    quality = clip_quality(Scorer())  # type: ignore[arg-type]
    assert quality(IMAGES, ["a", "b", "c"]).tolist() == [220, 128, 220]  # red of a person, of grey, of a person


@pytest.mark.parametrize(
    "values", [torch.zeros(3), torch.zeros(2, 1), torch.tensor([0.0, math.nan])], ids=["count", "shape", "nan"]
)
def test_quality_must_be_one_finite_number_per_image(values: Tensor) -> None:
    judge = colour_judge()
    reward = LayoutReward(judge, CATEGORIES, RewardWeights(), RewardSettings(), 8, lambda images, prompts: values)
    with pytest.raises(ValueError, match=r"quality must be \[2\] finite"):
        reward(IMAGES[:2], layouts([(0, TOP_LEFT)], [(1, BOTTOM_RIGHT)]), ["a", "b"])


def test_reward_refuses() -> None:
    reward = colour_reward()
    with pytest.raises(ValueError, match=r"row 1 has no boxes \(prompt: 'b'\)"):
        reward(IMAGES[:2], layouts([(0, TOP_LEFT)], []), ["a", "b"])
    with pytest.raises(ValueError, match="3 images, 3 layouts and 2 prompts"):
        reward(IMAGES, LAYOUT, ["a", "b"])
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].* -1.0"):
        reward(2 * (IMAGES > 0.6) - 1.0, LAYOUT, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"\[n, 3, H, W\].*\[3, 64, 64\]"):
        reward(IMAGES[0], LAYOUT, ["a", "b", "c"])


def test_construction_refuses() -> None:
    judge, settings = colour_judge(), RewardSettings()
    with pytest.raises(ValueError, match="quality is 0.5, but there is no quality function"):
        LayoutReward(judge, CATEGORIES, RewardWeights(quality=0.5), settings, 2)
    more = [*CATEGORIES, Category(40, "unicorn")]
    blind = Judge.of(ColourDetector(), more, skipped=["unicorn"])
    with pytest.raises(ValueError, match=r"\(colours\) cannot reward unicorn"):
        LayoutReward(blind, more, RewardWeights(), settings, 2)
