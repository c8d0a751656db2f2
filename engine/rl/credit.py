"""Whose credit a reward is: of all tokens of an image alike, or of the tokens where it was earned.

Images of a group have one layout, so each wanted box can be compared with itself. With r_bgj what box j earned in image
g of prompt b, and u_bgl the presence of the unclaimed detections over cell l:

    A_bgl = sum over boxes j that hold cell l of (r_bgj - mean_g r_bj) / std_g r_bj  -  (u_bgl - mean_g u_bl)

Tokens of no box and no unclaimed detection get 0, as does all that is equal over the group. Biased: what one region
does to another (an object drawn so that its neighbour is missed) is nobody's credit.

Shape letters: B prompts, G samples per prompt, n = B * G images, L tokens, N slots for boxes, k boxes of one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rl.grpo import group_advantages
from models.layout import cells_inside
from util.types import LayoutBatch


@dataclass(frozen=True)
class RegionRewards:
    """Of one image. of_boxes: [k] float32, what each wanted box earned, in the layout's order. extra_xyxy: [m, 4]
    float32 in [0, 1], detections that no wanted box claimed; extra_presence: [m] float32, how much each counts."""

    of_boxes: Tensor
    extra_xyxy: Tensor
    extra_presence: Tensor


def region_advantages(
    regions: Sequence[RegionRewards],
    layout: LayoutBatch,
    grid: tuple[int, int],
    group_size: int,
    norm: str,
    clip: float = 5.0,
) -> Tensor:
    """See the module's docstring. regions, layout: n rows on the CPU, groups in a row; norm: of `group_advantages` for
    each box, without "batch"; -> [n, L] float32 within -clip and clip."""
    inside = cells_inside(layout.boxes_xyxy, grid) & layout.valid[:, None]  # [n, L, N]
    credit = torch.zeros(inside.shape[:2], dtype=torch.float64)  # [n, L]
    for start in range(0, len(regions), group_size):
        rows = slice(start, start + group_size)
        own = torch.stack([each.of_boxes for each in regions[rows]])  # [G, k]
        of_boxes = group_advantages(own.T, norm, clip=clip).T.double()  # [G, k]
        credit[rows] = torch.einsum("glk,gk->gl", inside[rows, :, : own.shape[1]].double(), of_boxes)  # [G, L]
    extra = torch.stack([_extra_over_cells(each, grid) for each in regions])  # [n, L]
    grouped = extra.view(-1, group_size, extra.shape[1]).transpose(1, 2)  # [B, L, G]
    centred = group_advantages(grouped.flatten(0, 1), "center", clip=clip).view_as(grouped)  # [B, L, G]
    credit -= centred.transpose(1, 2).flatten(0, 1)  # [n, L]
    return credit.clamp(-clip, clip).float()  # [n, L]


def _extra_over_cells(region: RegionRewards, grid: tuple[int, int]) -> Tensor:
    """[L] float32."""
    over = cells_inside(region.extra_xyxy[None], grid)[0]  # [L, m]
    return over.float() @ region.extra_presence  # [L]
