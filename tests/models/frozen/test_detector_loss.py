"""A detector's training loss as a function of pictures: what it leaves alone, what it draws, what it prefers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.frozen.detector_loss import LOSSES, DetectorLoss
from models.frozen.faster_rcnn import Detector, load_faster_rcnn
from scripts.mini.dataset import scene_generator
from scripts.mini.scenes import render_scene
from tests.conftest import ROOT
from tests.helpers.gradient_world import tiny_detector
from tests.helpers.tiny import CATEGORIES
from util.types import Category

MINI_DETECTOR = ROOT / "pretrained_models" / "mini" / "fasterrcnn_mini.pth"
BOXES = [torch.tensor([[4.0, 6.0, 20.0, 28.0], [16.0, 2.0, 30.0, 14.0]]), torch.tensor([[2.0, 2.0, 18.0, 18.0]])]
INDICES = [torch.tensor([0, 2]), torch.tensor([1])]


def pictures() -> list[Tensor]:
    draws = torch.Generator().manual_seed(3)
    return [torch.rand(3, 32, 32, generator=draws).requires_grad_() for _ in range(2)]


def state_of(detector: Detector) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.model.state_dict().items()}


def test_pixels_get_gradients_and_nothing_else_changes() -> None:
    detector = tiny_detector()
    before, images, draw = state_of(detector), pictures(), torch.get_rng_state()
    losses = DetectorLoss(detector, CATEGORIES)(images, BOXES, INDICES, seed=1)
    assert set(losses) == set(LOSSES)
    torch.stack(list(losses.values())).sum().backward()
    assert all(image.grad is not None and bool(image.grad.any()) for image in images)
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.model.state_dict().items())
    assert all(parameter.grad is None for parameter in detector.model.parameters())
    assert not any(module.training for module in detector.model.modules())
    assert torch.equal(torch.get_rng_state(), draw)  # torchvision draws from the global generator


def test_layers_are_left_as_they_are_even_where_it_fails() -> None:
    detector = tiny_detector()
    with pytest.raises(AssertionError, match="positive height and width"):
        DetectorLoss(detector, CATEGORIES)(pictures(), [BOXES[0][:, [2, 3, 0, 1]], BOXES[1]], INDICES, seed=1)
    assert not any(module.training for module in detector.model.modules())


def test_the_seed_says_which_regions_count() -> None:
    loss, values = DetectorLoss(tiny_detector(), CATEGORIES), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(values))  # whatever the global generator was at
        values.append(torch.stack(list(loss(pictures(), BOXES, INDICES, seed).values())))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_labels_go_by_name() -> None:
    """The dataset's categories are some of the detector's, in another order."""
    loss = DetectorLoss(tiny_detector(), [Category(5, CATEGORIES[2].name), Category(9, CATEGORIES[0].name)])
    assert loss.labels.tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"\(fasterrcnn_mini\) cannot reward moon: unknown to it"):
        DetectorLoss(tiny_detector(), [Category(1, "moon")])


def drawn(number: int, detector: Detector) -> tuple[Tensor, Tensor, Tensor]:
    """A drawing [3, H, W] in [0, 1], its boxes in pixels and their indices."""
    scene = render_scene(scene_generator(0, "val2017", number), 128)
    places = {category.id: index for index, category in enumerate(detector.categories)}
    xywh = torch.tensor([each.bbox for each in scene.objects]).float()
    boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    indices = torch.tensor([places[each.category_id] for each in scene.objects])
    return torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) / 255, boxes, indices


def test_no_grey_or_textured_picture_beats_the_real_one() -> None:
    """Nor one of others' objects."""
    detector = load_faster_rcnn(MINI_DETECTOR)
    loss = DetectorLoss(detector, detector.categories)
    images, boxes, indices = zip(*(drawn(number, detector) for number in range(4)), strict=True)
    draws = torch.Generator().manual_seed(0)
    patch = [torch.rand(3, 8, 8, generator=draws) for _ in images]
    others = {
        "grey": [torch.full_like(image, 0.5) for image in images],
        "mean colour": [image.mean((1, 2), keepdim=True).expand_as(image) for image in images],
        "noise": [torch.rand(image.shape, generator=draws) for image in images],
        "tiles": [each.repeat(1, 16, 16) for each in patch],
        "stripes": [torch.arange(128).div(4, rounding_mode="floor").remainder(2).expand(3, 128, 128).float()] * 4,
        "others' objects": [images[1], images[2], images[3], images[0]],
    }

    def value(candidates: list[Tensor]) -> float:
        with torch.no_grad():
            return float(torch.stack(list(loss(candidates, boxes, indices, seed=0).values())).sum())

    real = value(list(images))
    for name, candidates in others.items():
        assert value(candidates) > 4 * real, name
