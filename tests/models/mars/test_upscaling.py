"""The super-resolution stage: what a large image sees of the small one, and what it does not depend on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.mars.decoding import describe_images
from models.mars.identity import MarsIdentity
from models.mars.losses import MarsObjective, Pairs, drawing_losses
from models.mars.model import Mars, MarsConfig, TextBatch
from models.mars.passes import read_by_segments, read_mixed
from models.mars.sampling import DrawOptions, draw_images
from tests.helpers.language_models import DEFAULT, FAMILIES, GRID, NUM_CODES, tiny_mars
from tests.helpers.mars_pairs import BOS, CAPTIONS, pairs, some_codes

LOW = (1, 2)
PROMPTS = ([BOS, 4, 5], [BOS, 6, 7, 8, 9, 3], [BOS])
ALMOST = {"rtol": 0, "atol": 1e-5}


def low_codes(batch_size: int) -> Tensor:
    return some_codes(batch_size, seed=5, grid=LOW)


def upscaler(seed: int = 0) -> Mars:
    torch.manual_seed(seed)
    return tiny_mars(low_grid=LOW)


def both_sizes() -> Pairs:
    return replace(pairs(), low=low_codes(len(CAPTIONS)))


@pytest.mark.parametrize("read", [read_by_segments, read_mixed])
def test_a_code_sees_all_of_the_small_image_and_no_later_code(read) -> None:
    model, codes, low = upscaler(), some_codes(2), low_codes(2)
    text = model.text_segment(TextBatch.of(PROMPTS[:2], "left"))

    def states(low: Tensor, codes: Tensor) -> list[Tensor]:
        with torch.no_grad():
            image = model.image_segment(model.after_small(low, model.opened(codes)))
            words, states = read(model.decoder, [text, image])
            return [words, *states.split([4, 9], dim=1)]

    words, small, large = states(low, codes)
    for place in range(2):
        other = low.clone()
        other[:, place] = (other[:, place] + 1) % NUM_CODES
        changed = states(other, codes)
        assert torch.equal(changed[0], words) and (changed[2] != large).any(-1).all()
    other = codes.clone()
    other[:, 3] = (other[:, 3] + 1) % NUM_CODES
    changed = states(low, other)
    assert torch.equal(changed[1], small) and torch.equal(changed[2][:, :4], large[:, :4])
    assert (changed[2][:, 4:] != large[:, 4:]).any(-1).all()


def gradients(reads: str) -> dict[str, Tensor]:
    model = upscaler().train()
    model.set_grad_checkpointing(reads == "again")
    if reads == "mixed":
        model.read = lambda segments: read_mixed(model.decoder, segments)  # type: ignore[method-assign]
    losses = MarsObjective(model)(both_sizes(), caption_weight=0)
    losses.total.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert all(grad is not None and grad.any() for grad in found.values())  # what DDP needs of every step
    return {"loss": losses.drawing, **{name: grad for name, grad in found.items() if grad is not None}}


def test_segments_are_the_mixed_pass_and_layers_computed_again() -> None:
    segments, mixed, again = (gradients(reads) for reads in ("segments", "mixed", "again"))
    for name, wanted in segments.items():
        torch.testing.assert_close(mixed[name], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(again[name], mixed[name])


def draw(model: Mars, indices: tuple[int, ...] = (0, 1, 2), **options: object) -> Tensor:
    """Of some of `PROMPTS`, each with the small image and the seed of its place."""
    rows, generators = list(indices), [torch.Generator().manual_seed(index) for index in indices]
    settings = DrawOptions(**options)  # type: ignore[arg-type]
    return draw_images(model, [PROMPTS[index] for index in rows], [BOS], generators, settings, low_codes(3)[rows])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(guidance: float) -> None:
    model = upscaler()
    together = draw(model, guidance=guidance)
    assert together.shape == (3, *GRID)
    for index in range(3):
        assert torch.equal(draw(model, (index,), guidance=guidance)[0], together[index])


def test_the_likeliest_codes_are_those_of_one_pass() -> None:
    """Both branches see the small image."""
    model, scale = upscaler(), 3.0
    codes = draw(model, (1,), guidance=scale, top_k=1).flatten(1)
    with torch.no_grad():
        image = model.image_segment(model.after_small(low_codes(3)[[1]], model.opened(codes[:, :-1])))
        wanted, other = (
            model.code_logits(model.read([model.text_segment(TextBatch.of([ids], "left")), image])[1][:, 4:])
            for ids in (PROMPTS[1], [BOS])
        )
    assert torch.equal((other + scale * (wanted - other)).argmax(-1), codes)


def test_the_first_loss_is_that_of_a_head_of_zeros() -> None:
    config = MarsConfig(1024, GRID, low_grid=LOW)
    model = Mars(FAMILIES[DEFAULT](), config, torch.Generator().manual_seed(0))
    assert drawing_losses(model, both_sizes())[0].item() == pytest.approx(math.log(1024), abs=1e-5)


def test_a_small_image_is_there_if_the_model_makes_it_larger() -> None:
    with pytest.raises(ValueError, match=r"makes images of the grid \(1, 2\) larger, got no codes"):
        drawing_losses(upscaler(), pairs())
    with pytest.raises(ValueError, match=r"makes images of the grid \(1, 2\) larger, got 8 codes"):
        drawing_losses(upscaler(), replace(pairs(), low=some_codes(2)))
    with pytest.raises(ValueError, match="draws from captions alone, got 2 codes of a small image"):
        drawing_losses(tiny_mars(), both_sizes())
    with pytest.raises(ValueError, match="describes none, got caption_weight 1"):
        MarsObjective(upscaler())(both_sizes(), caption_weight=1)
    with pytest.raises(ValueError, match="larger, got no codes"):
        describe_images(upscaler(), some_codes(1), [BOS], [2], max_words=1)
    with pytest.raises(ValueError, match="got 1 prompts and 2 images"):
        draw_images(upscaler(), [[BOS]], [BOS], [torch.Generator()], DrawOptions(), low_codes(2))
    room = tiny_mars(low_grid=LOW, max_position_embeddings=12)
    with pytest.raises(ValueError, match="13 positions are more than the 12"):
        draw_images(room, [[BOS]], [BOS], [torch.Generator()], DrawOptions(), low_codes(1))


def test_weights_say_which_images_they_make_larger() -> None:
    config = MarsConfig(NUM_CODES, GRID, copied_norms=True, low_grid=LOW)
    identity = MarsIdentity("a" * 64, "qwen2", config, "b" * 64, 20, "upscale")
    assert MarsIdentity.of(json.loads(json.dumps(identity.as_dict())), "a.pth") == identity
    assert identity.before.config == MarsConfig(NUM_CODES, LOW, copied_norms=True) and identity.before.stage == "refine"
    assert identity.before.before == identity.before
    older = identity.before.as_dict()
    del older["config"]["low_grid"]  # files of before the stage
    assert MarsIdentity.of(older, "a.pth") == identity.before
    with pytest.raises(ValueError, match=r"stage 'joint' does not go with low_grid \(1, 2\)"):
        replace(identity, stage="joint")
    with pytest.raises(ValueError, match=r"stage 'upscale' does not go with low_grid None"):
        replace(identity.before, stage="upscale")
    with pytest.raises(ValueError, match=r"low_grid must be smaller than the grid \(2, 4\), got \(2, 2\)"):
        MarsConfig(NUM_CODES, GRID, low_grid=(2, 2))
