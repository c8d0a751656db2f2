"""Changes before the detector: boxes follow their objects, gradients pass, draws are the generator's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.rl.augment import Augmentation

BOX = (8.0, 20.0, 24.0, 36.0)  # xyxy in pixels of a 48 x 40 picture


def painted() -> tuple[Tensor, list[Tensor]]:
    """Two black pictures with a white rectangle: [2, 3, 48, 40]."""
    images = torch.zeros(2, 3, 48, 40)
    x0, y0, x1, y1 = map(int, BOX)
    images[:, :, y0:y1, x0:x1] = 1
    return images, [torch.tensor([BOX])] * 2


def extent(image: Tensor) -> Tensor:
    """Of what is more than half white: xyxy in pixels."""
    rows, columns = torch.nonzero(image[0] > 0.5, as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "changes",
    [{"resize": 0.4}, {"shift": 0.5}, {"blur": 1.5}, {"noise": 0.05}, {"resize": 0.3, "shift": 0.3, "blur": 1.0}],
    ids=str,
)
def test_boxes_follow_their_objects(changes: dict[str, float]) -> None:
    images, boxes = painted()
    seen = set()
    for seed in range(8):
        changed, moved = Augmentation(**changes)(images, boxes, draws(seed))
        for image, (box,) in zip(changed, moved, strict=True):
            assert (extent(image) - box).abs().max() <= 1.01
            assert box[0] >= 0 and box[2] <= image.shape[2] and box[3] <= image.shape[1]  # none is cut off
            seen.add((tuple(image.shape), tuple(box.tolist())))
    assert len(seen) > 8 or set(changes) <= {"blur", "noise"}


def test_nothing_is_changed_by_default() -> None:
    images, boxes = painted()
    changed, moved = Augmentation()(images, boxes, draws())
    assert torch.equal(torch.stack(changed), images) and all(map(torch.equal, moved, boxes))


def test_gradients_reach_every_pixel_and_one_seed_is_one_change() -> None:
    images, boxes = painted()
    images.requires_grad_()
    every = Augmentation(shift=0.2, blur=1.0, noise=0.1, resize=0.2)
    changed, _ = every(images, boxes, draws())
    torch.stack([image.sum() for image in changed]).sum().backward()
    assert images.grad is not None and bool((images.grad > 0).all())
    again, _ = every(images, boxes, draws())
    other, _ = every(images, boxes, draws(1))
    assert all(map(torch.equal, changed, again))
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in zip(changed, other, strict=True))


@pytest.mark.parametrize("changes", [{"shift": -0.1}, {"resize": 1.0}, {"blur": float("nan")}], ids=str)
def test_impossible_changes_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} of an augmentation must be"):
        Augmentation(**changes)
