"""Grids of any shape: positions, boxes, sizes as a condition; for every trunk and head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import preset_config
from models.layout import layout_bias
from models.policy.base import LossInputs, Policy
from models.policy.elbo import ElboEstimator
from models.rope import Rotation, fit_scale, rope_angles_2d
from models.sampling.config import default_sampling
from models.sampling.sampler import sample
from models.structmar import StructMAR
from models.weights import load_structmar_weights, select_trainable
from tests.helpers.family import HEADS, TRUNKS, family_model
from tests.helpers.structured import generator, some_layout, some_text
from util.types import SizeBatch

STRUCTURED: dict[str, Any] = {"num_categories": 5, "text_dim": 12, "learned_pos": False}
NAMED = SizeBatch.of([(64, 96, 480, 640, 3, 0), (64, 96, 480, 640, 0, 20)])


def sized_model(head: str = "discrete") -> StructMAR:
    """With a size condition that says something."""
    model = family_model("single", head, **STRUCTURED, size_condition=True)
    with torch.no_grad():
        model.size_embed.mlp[2].weight.normal_(std=0.3, generator=generator(5))
    return model


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_a_model_learns_and_samples_lying_and_standing_grids(trunk: str, head: str) -> None:
    model = family_model(trunk, head, **STRUCTURED)
    step = model.config.patch_size
    config = default_sampling(head, num_iter=3)
    pictures = []
    for grid in ((2, 3), (3, 2)):
        out = sample(model.eval(), config, [generator(1), generator(2)], some_text(), some_layout(), grid=grid)
        assert out.grid == grid
        assert out.latents.shape[2:] == (grid[0] * step, grid[1] * step)
        noise = model.sample_training_noise(2, generator(3), 0.5, grid)
        assert torch.isfinite(model.train()(out.latents, noise, text=some_text(), layout=some_layout()))
        pictures.append(out.latents)
    assert not torch.equal(pictures[0].flatten(), pictures[1].flatten())


def test_rotations_know_differences_of_places_alone_on_every_grid() -> None:
    x, y = torch.randn(1, 1, 1, 16, generator=generator(1)), torch.randn(1, 1, 1, 16, generator=generator(2))

    def product(grid: tuple[int, int], first: int, second: int, scale: float) -> torch.Tensor:
        angles = rope_angles_2d(grid, 16, scale=scale)
        turned = [Rotation.by(angles[None, place : place + 1])(each) for place, each in ((first, x), (second, y))]
        return (turned[0] * turned[1]).sum()

    for scale in (1.0, fit_scale((4, 6), (4, 4))):
        one, other = product((4, 6), 0, 7, scale), product((4, 6), 9, 16, scale)  # a row down, a column right
        torch.testing.assert_close(one, other)
        assert (one - product((6, 4), 0, 7, scale)).abs() > 1e-3  # a row down, three columns right


def test_a_fitted_grid_turns_as_far_as_the_trained_one() -> None:
    assert fit_scale((8, 8), (4, 4)) == 0.5
    assert fit_scale((2, 8), (4, 4)) == 1.0
    torch.testing.assert_close(
        rope_angles_2d((8, 8), 16, scale=0.5)[18], rope_angles_2d((4, 4), 16)[5]
    )  # (2, 2), (1, 1)
    tables = {}
    for rope_scale in ("index", "fit"):
        model = family_model("mae", "diffusion", **STRUCTURED, rope_scale=rope_scale)
        rows, columns = model.config.grid
        tables[rope_scale] = [model._rope_angles(grid)[1] for grid in ((rows, columns), (2 * rows, 2 * columns))]
    torch.testing.assert_close(tables["fit"][0], tables["index"][0], rtol=0, atol=0)
    torch.testing.assert_close(tables["fit"][1], 0.5 * tables["index"][1])
    with pytest.raises(ValueError, match="rope_scale must be one of"):
        preset_config("mar_mini", rope_scale="stretch")


def test_boxes_own_their_cells_on_a_grid_that_is_no_square() -> None:
    layout = some_layout()
    own = layout_bias(layout, (4, 6), 1.0)[0].view(4, 6, 4) == 0
    left = [[1 <= x <= 2 and y < 2 for x in range(6)] for y in range(4)]  # centres within 0.1 .. 0.5 and 0.1 .. 0.6
    assert own[..., 0].tolist() == left
    right = [[x > 2 and 1 <= y <= 3 for x in range(6)] for y in range(4)]  # 0.55 .. 0.95 and 0.2 .. 0.9
    assert own[..., 1].tolist() == right
    assert not own[..., 2:].any()
    assert layout_bias(layout, (4, 6), 1.0)[1].view(4, 6, 4)[..., 0].nonzero().shape[0] == 23  # one cell is its own


def test_at_the_start_sizes_say_nothing() -> None:
    plain = family_model("single", "discrete", **STRUCTURED)
    sized = StructMAR(replace(plain.config, size_condition=True))
    state = {**plain.state_dict(), **{name: x for name, x in sized.state_dict().items() if "size_embed" in name}}
    load_structmar_weights(sized, state, "test")
    given = (2, None, some_text(), some_layout())
    expected = plain.embed_conditions(*given).base
    assert torch.equal(sized.embed_conditions(*given).base, expected)
    assert torch.equal(sized.embed_conditions(*given, sizes=NAMED).base, expected)


def test_sizes_are_told_and_dropped_with_the_other_conditions() -> None:
    model, text, layout = sized_model(), some_text(), some_layout()
    told = model.embed_conditions(2, None, text, layout, (2, 3), NAMED).base
    whole = model.embed_conditions(2, None, text, layout, (2, 3)).base
    assert ((told - whole).abs().amax(dim=1) > 1e-3).all()
    step = model.config.vae_stride * model.config.patch_size
    named = SizeBatch.whole(2, 2 * step, 3 * step, "cpu")
    assert torch.equal(model.embed_conditions(2, None, text, layout, (2, 3), named).base, whole)
    assert not torch.equal(model.embed_conditions(2, None, text, layout, (3, 2)).base, whole)

    first = torch.tensor([True, False])
    dropped = model.embed_conditions(2, None, text.dropped(first), layout.dropped(first), (2, 3), NAMED).base
    nothing = model.embed_conditions(2, None, None, None, (2, 3), NAMED).base
    assert torch.equal(nothing, model.fake_latent.expand(2, -1))
    torch.testing.assert_close(dropped[0], nothing[0], rtol=0, atol=0)
    torch.testing.assert_close(dropped[1], told[1], rtol=0, atol=0)
    labelled = model.embed_conditions(2, torch.tensor([1, -1]), None, None, (2, 3), NAMED).base
    assert not torch.equal(labelled[0], model.class_emb.weight[1])
    assert torch.equal(labelled[1], nothing[1])


def test_stage_3_tells_sizes_too() -> None:
    model = sized_model("diffusion")
    latents, noise = torch.zeros(2, 4, 2, 3), model.sample_training_noise(2, generator(3), 0.5, (2, 3))
    policy = Policy(model, ElboEstimator(4, 2, 2))
    given = {"text": some_text(), "layout": some_layout()}
    told = policy(LossInputs(latents, noise, **given, sizes=NAMED))
    assert torch.equal(told, model(latents, noise, **given, sizes=NAMED))
    assert not torch.equal(told, policy(LossInputs(latents, noise, **given)))


def test_sizes_train_and_are_a_new_part() -> None:
    model = sized_model()
    chosen = select_trainable(model, "text_layout")
    assert {name for name in chosen if name.startswith("size_embed.")} == {
        f"size_embed.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    latents = torch.zeros(2, 1, 2 * model.config.patch_size, 3 * model.config.patch_size)
    noise = model.sample_training_noise(2, generator(3), 0.5, (2, 3))
    model(latents, noise, text=some_text(), layout=some_layout(), sizes=NAMED).backward()
    assert all(parameter.grad is not None for name, parameter in chosen.items() if name.startswith("size_embed."))
