"""The differentiable reward: colours by hand, gradients by differences, dropped layouts, ensembles, the pixel clamp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.rl.picture_loss import PictureLoss, colour_distance, mean_colours, pixel_distance, straight_through_clamp
from tests.helpers.gradient_world import picture_loss, tiny_codec
from tests.helpers.rl_world import variant
from tests.helpers.training import tiny_inputs
from util.types import LayoutBatch

KEY = (0, 0, 0)


def layout_of(batch_size: int = 2) -> LayoutBatch:
    layout = tiny_inputs(batch_size).layout
    assert layout is not None
    return layout


def pictures(batch_size: int = 2) -> Tensor:
    return torch.rand(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_mean_colours_by_hand() -> None:
    image = torch.zeros(1, 3, 4, 8)
    image[0, 0, :, 4:] = 1  # red on the right
    image[0, 1, 2:] = 1  # green below
    boxes = torch.tensor([[[0, 0, 1, 1], [0.5, 0.5, 1, 1], [0.25, 0, 0.625, 0.5], [0.4375, 0, 0.5625, 1], [0.5] * 4]])
    expected = torch.tensor([[0.5, 0.5, 0], [1, 1, 0], [1 / 3, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])
    torch.testing.assert_close(mean_colours(image, boxes)[0], expected)


def test_the_colour_of_a_boxs_middle_counts() -> None:
    layout, real = layout_of(1), pictures(1)
    _, y0, _, y1 = (layout.boxes_xyxy[0, 0] * 32).tolist()
    assert float(colour_distance(real, real, layout)) == 0.0
    changed = real.clone()
    changed[:, 0, : int(y0 + (y1 - y0) / 5)] += 0.3  # above the middle
    torch.testing.assert_close(colour_distance(changed, real, layout), torch.tensor(0.0))
    changed[:, 0] = real[:, 0] + 0.3
    torch.testing.assert_close(colour_distance(changed, real, layout), torch.tensor(0.09))


def test_the_distance_of_pixels() -> None:
    layout, real = layout_of(), pictures()
    changed = real.clone()
    changed[0] += 0.2
    torch.testing.assert_close(pixel_distance(changed, real, layout), torch.tensor(0.1))
    first = layout.dropped(torch.tensor([False, True]))
    torch.testing.assert_close(pixel_distance(changed, real, first), torch.tensor(0.2))


def test_the_clamp_shows_what_is_shown_and_has_gradient_1() -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.25, 1.0, 7.0], requires_grad=True)
    shown = straight_through_clamp(pixels)
    torch.testing.assert_close(shown, torch.tensor([-1.0, -1.0, 0.25, 1.0, 1.0]))
    shown.sum().backward()
    assert pixels.grad is not None and pixels.grad.tolist() == [1.0] * 5


def test_dropped_layouts_ask_for_nothing() -> None:
    """Their images count neither as background nor for their colours; the others' loss is that without them."""
    layout, images, real = layout_of(3), pictures(3), pictures(3).flip(0)
    loss = picture_loss(w_colour=2.0, w_pixels=0.5)
    dropped = layout.dropped(torch.tensor([False, True, False]))
    images.requires_grad_()
    total, parts = loss(images, dropped, real, KEY)
    total.backward()
    assert images.grad is not None
    assert not images.grad[1].any() and images.grad[0].any() and images.grad[2].any()
    rest = torch.tensor([0, 2])
    alone, _ = loss(images[rest], layout.map(lambda tensor: tensor[rest]), real[rest], KEY)
    torch.testing.assert_close(total, alone)
    nothing, zeros = loss(images, layout.dropped(torch.ones(3, dtype=torch.bool)), real, KEY)
    assert float(nothing.detach()) == 0.0 and set(zeros) == set(parts) and not any(zeros.values())
    nothing.backward()  # the same graph


def test_an_ensemble_is_the_weighted_sum() -> None:
    layout, images = layout_of(), pictures()
    both = picture_loss(detectors=2)
    (first, _), (second, _) = both.detectors
    weighted = replace(both, detectors=[(first, 1.0), (second, 0.25)])
    total, parts = weighted(images, layout, None, KEY)
    sums = [sum(float(value) for name, value in parts.items() if name.startswith(f"detector{k}/")) for k in (0, 1)]
    assert float(total) == pytest.approx(sums[0] + 0.25 * sums[1], rel=1e-5)
    assert weighted.detector_id == f"1 {'0' * 64} + 0.25 {'1' * 64}"
    assert both.detectors[0][0].id == picture_loss().detector_id


def test_draws_are_keyed() -> None:
    loss, layout, images = picture_loss(noise=0.2, shift=0.3), layout_of(), pictures()
    one, again, other = (float(loss(images, layout, None, (step, 0, 0))[0]) for step in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("weights", [[], [1.0, 0.0]])
def test_detectors_without_weight_are_refused(weights: list[float]) -> None:
    detector = picture_loss().detectors[0][0]
    with pytest.raises(ValueError, match="needs detectors of positive weights"):
        replace(picture_loss(), detectors=[(detector, weight) for weight in weights])


def freeze_in_float64(loss: PictureLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector's regions are cut from the graph: here they stay where they were first proposed. torchvision's
    labels of anchors are float32, and with them a loss."""
    ((detector, _),) = loss.detectors
    rpn, found = detector.model.double().rpn, []
    propose, assign = rpn.filter_proposals, rpn.assign_targets_to_anchors

    def first(*args: Any) -> Any:
        if not found:
            found.append(propose(*args))
        return found[0]

    def assigned(*args: Any) -> Any:
        labels, boxes = assign(*args)
        return [each.double() for each in labels], boxes

    monkeypatch.setattr(rpn, "filter_proposals", first)
    monkeypatch.setattr(rpn, "assign_targets_to_anchors", assigned)


def test_the_gradient_by_one_token_is_that_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a token's channels through the VAE, the clamp's inside, augmentation, detector and colours."""
    loss, codec, model = (
        picture_loss(w_colour=3.0, w_pixels=0.5, shift=0.2, blur=1.0, resize=0.2),
        tiny_codec(),
        variant(),
    )
    freeze_in_float64(loss, monkeypatch)
    codec.autoencoder.double()
    inputs, layout = tiny_inputs(1), layout_of(1)
    tokens, real = model.patchify(inputs.latents.double()), pictures(1).double()  # [1, L, C]

    def value(token: Tensor) -> Tensor:
        changed = tokens.clone()
        changed[0, 5] = token
        pixels = codec.decode_with_gradient(model.unpatchify(changed, (4, 4)))
        total: Tensor = loss((straight_through_clamp(pixels * 0.2) + 1) / 2, layout, real, KEY)[0]
        return total

    token = tokens[0, 5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(token), token)
    assert bool(gradient.abs().min() > 0)
    plain, _ = replace(loss, w_colour=0.0, w_pixels=0.0)(pictures(1).double(), layout, None, KEY)
    assert plain.dtype == torch.float64
    for channel in range(len(token)):
        nudge = torch.zeros_like(token)
        nudge[channel] = 1e-7  # kinks of ReLU are close
        with torch.no_grad():
            slope = (value(token + nudge) - value(token - nudge)) / 2e-7
        torch.testing.assert_close(gradient[channel], slope, rtol=1e-4, atol=1e-7)
