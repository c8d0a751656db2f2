"""Credit by region: what a box earned goes to its tokens, and to no others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.rl.credit import RegionRewards, region_advantages
from models.layout import cells_inside
from util.types import Layout, LayoutBatch

GRID = (4, 4)
LEFT, RIGHT, DOT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5], [0.26, 0.26, 0.28, 0.28]
BOXES = torch.tensor([LEFT, RIGHT, DOT])
GROUP = 3


def layout_of(boxes_xyxy: Tensor, count: int = GROUP) -> LayoutBatch:
    one = Layout(boxes_xyxy, torch.zeros(len(boxes_xyxy), dtype=torch.int64))
    return LayoutBatch.collate([one] * count, 5)


def regions_of(of_boxes: Tensor) -> list[RegionRewards]:
    """of_boxes: [n, k]; without unclaimed detections."""
    return [RegionRewards(row, torch.zeros(0, 4), torch.zeros(0)) for row in of_boxes]


def credit(regions: list[RegionRewards], boxes_xyxy: Tensor = BOXES, norm: str = "zscore") -> Tensor:
    return region_advantages(regions, layout_of(boxes_xyxy, len(regions)), GRID, GROUP, norm)


def earned(seed: int = 0, count: int = GROUP) -> Tensor:
    return torch.rand(count, len(BOXES), generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    of_boxes = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 3.0]])
    found = credit(regions_of(of_boxes), norm="center").view(GROUP, *GRID)  # [G, h, w]
    expected = torch.zeros(GROUP, *GRID)
    expected[:, :, :2] = torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    expected[:, 1, 1] += torch.tensor([-1.0, -1.0, 2.0])  # the small box lies in the large one
    torch.testing.assert_close(found, expected)


def test_groups_stand_alone() -> None:
    both = credit(regions_of(torch.cat([earned(0), earned(1)])))
    for number in range(2):
        assert torch.equal(both[3 * number : 3 * number + 3], credit(regions_of(earned(number))))


def test_the_order_of_boxes_does_not_matter() -> None:
    order = torch.tensor([2, 0, 1])
    first, again = credit(regions_of(earned())), credit(regions_of(earned()[:, order]), BOXES[order])
    torch.testing.assert_close(again, first, rtol=0, atol=1e-6)


def test_equal_rewards_give_exactly_nothing() -> None:
    same = [RegionRewards(torch.full((3,), 0.1), BOXES[:1], torch.tensor([0.3]))] * GROUP
    assert torch.equal(credit(same), torch.zeros(GROUP, 16))


def test_a_change_in_one_box_moves_its_tokens_alone() -> None:
    inside = cells_inside(BOXES[None], GRID)[0]  # [L, k]
    before = credit(regions_of(earned()))
    for box in range(len(BOXES)):
        changed = earned()
        changed[1, box] += 5
        moved = (credit(regions_of(changed)) != before).any(0)  # [L]
        assert torch.equal(moved, inside[:, box])


def test_unclaimed_detections_cost_where_they_are() -> None:
    plain = regions_of(earned())
    extra = [replace(plain[0], extra_xyxy=torch.tensor([RIGHT, RIGHT]), extra_presence=torch.tensor([0.6, 0.3]))]
    change = credit(extra + plain[1:]) - credit(plain)  # [G, L]
    over = cells_inside(torch.tensor([RIGHT])[None], GRID)[0, :, 0].float()  # [L]
    torch.testing.assert_close(change, torch.tensor([-0.6, 0.3, 0.3])[:, None] * over)


def test_credit_is_bounded() -> None:
    of_boxes = torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 90.0], [0.0, 0.0, 0.0]])
    found = region_advantages(regions_of(of_boxes), layout_of(BOXES), GRID, GROUP, "center", clip=2.0)
    assert found.abs().max() == 2.0
