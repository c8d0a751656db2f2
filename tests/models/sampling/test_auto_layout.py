"""Auto layout guidance: the maps that are observed, the masks made of them, and the iterations that draw by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditions
from models.sampling.auto_layout import AutoLayout, boxes_of_masks, build_auto_layout, masks_of_maps
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.controls import NoControls
from models.sampling.sampler import KnownTokens, sample
from models.structmar import StructMAR
from tests.helpers.family import HEADS, TRUNKS, family_model
from tests.helpers.structured import generator
from util.types import Layout, LayoutBatch, TextContext

AUTO: dict[str, Any] = {"num_iter": 6, "mask_threshold": 0.5, "start_step": 2}
KINDS = [(trunk, head) for trunk in TRUNKS for head in HEADS]


def config_of(model: StructMAR, **options: Any) -> SamplingConfig:
    quick = {"num_sampling_steps": 2, "t_max": 900, "clip_x0": 3.0} if model.config.head == "diffusion" else {}
    return default_sampling(model.config.head, **quick, **AUTO | options)


def some_model(trunk: str = "single", head: str = "discrete", **options: Any) -> StructMAR:
    """Boxes count, and captions do: what starts at zero is not."""
    return family_model(trunk, head, num_categories=3, text_dim=12, **options)


def some_text() -> TextContext:
    return TextContext.collate([torch.randn(length, 12, generator=generator(length)) for length in (5, 3)])


def some_layout() -> LayoutBatch:
    """The second image has one box."""
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 1.0]])
    first, second = Layout(boxes, torch.tensor([1, 2])), Layout(boxes[1:], torch.tensor([0]))
    return LayoutBatch.collate([first, second], 4)


def some_weights() -> Tensor:
    """The captions name the first box of each image, in two tokens of the first and in one of the second."""
    weights = torch.zeros(2, 5, 4)  # [B, T, N]
    weights[0, 1:3, 0], weights[1, 1, 0] = 0.5, 1.0
    return weights


class Recorded(NoControls):
    """Hands over to another control, and writes down what it gave and was shown."""

    def __init__(self, inner: AutoLayout) -> None:
        self.inner = inner
        self.given: list[Conditions] = []
        self.maps: list[Tensor] = []

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        self.given.append(self.inner.at(iteration, visible, conditions))
        return self.given[-1]

    def observes(self, iteration: int) -> bool:
        return self.inner.observes(iteration)

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        self.maps.append(maps)
        self.inner.observe(iteration, maps, rows)


def given_parts(model: StructMAR) -> tuple[TextContext, LayoutBatch, Tensor, tuple[int, int]]:
    return some_text(), some_layout(), some_weights(), model.config.grid


def recorded(model: StructMAR, config: SamplingConfig, **options: Any) -> Recorded:
    """Of a run of two images."""
    with torch.no_grad():
        controls = Recorded(build_auto_layout(model, config, *given_parts(model)))
    sample(model, config, generators(), some_text(), some_layout(), controls=controls, **options)
    return controls


def generators() -> list[torch.Generator]:
    return [generator(1), generator(2)]


def drawn(model: StructMAR, config: SamplingConfig, **options: Any) -> Tensor:
    given = {"phrase_weights": some_weights(), **options}
    return sample(model, config, generators(), some_text(), some_layout(), **given).tokens


@pytest.mark.parametrize(("trunk", "head"), KINDS)
def test_maps_are_those_of_the_formula(trunk: str, head: str) -> None:
    """Written out from what enters the cross-attention: softmax of queries and keys, mean over heads, by the gate."""
    model = some_model(trunk, head, decoder_depth=3)
    blocks, inputs = [block.cross for block in model.decoder_blocks[:-1]], []
    hooks = [cross.norm.register_forward_hook(lambda *given: inputs.append(given[2])) for cross in blocks]
    config = config_of(model, num_iter=3, start_step=1, cfg_text=2.0, cfg_layout=3.0)
    maps = recorded(model, config).maps
    for hook in hooks:
        hook.remove()
    assert len(maps) == 1  # of iteration 0: nothing is observed once the masks are made
    text, num_tokens, heads = some_text(), math.prod(model.config.grid), model.config.decoder_num_heads
    tokens = torch.cat([model.text_null.expand(2, -1, -1), text.tokens], 1)  # [B, 1 + T, C]
    valid = torch.cat([torch.zeros(2, 1, dtype=torch.bool), text.valid], 1)  # [B, 1 + T]
    total, weight = torch.zeros(2, num_tokens, 6), 0.0
    with torch.no_grad():
        for cross, x in zip(blocks, inputs, strict=False):
            q = cross.q(x[:2, model.config.buffer_size :]).unflatten(-1, (heads, -1))  # [B, L, H, d]
            k = cross.kv(tokens).chunk(2, -1)[0].unflatten(-1, (heads, -1))  # [B, 1 + T, H, d]
            logits = torch.einsum("blhd,bthd->bhlt", q, k) / math.sqrt(q.shape[-1])
            shares = logits.masked_fill(~valid[:, None, None], -math.inf).softmax(-1).mean(1)  # [B, L, 1 + T]
            gate = abs(math.tanh(cross.gate.item()))
            total, weight = total + gate * shares, weight + gate
    torch.testing.assert_close(maps[0], total / weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, num_tokens))
    assert maps[0][:, :, 0].abs().max() == 0  # the null token, of captions


@pytest.mark.parametrize(("trunk", "head"), KINDS)
@pytest.mark.parametrize("updates", [False, True])
def test_boxes_come_first_and_masks_from_the_start_step_on(trunk: str, head: str, updates: bool) -> None:
    """The mask is of the mean of all maps before; a box without a name, and the tokens, stay as they are."""
    model = some_model(trunk, head)
    run = recorded(model, config_of(model, auto_update=updates, cfg_text=2.0))
    plain = run.given[0]
    assert plain.layout_bias is not None and plain.layout_tokens is not None
    assert all(given is plain for given in run.given[:2])
    assert len(run.maps) == (6 if updates else 2)
    assert len({id(given) for given in run.given}) == (5 if updates else 2)
    words = torch.cat([torch.zeros(2, 1, 4), some_weights()], 1)  # [B, 1 + T, N]
    for iteration in range(2, 6):
        given, seen = run.given[iteration], torch.stack(run.maps[: iteration if updates else 2]).mean(0)
        mask = masks_of_maps(seen @ words, 0.5)  # [B, L, N]
        assert given.layout_tokens is plain.layout_tokens and given.layout_bias is not None
        expected = torch.where(mask[..., 0], 0.0, -math.inf)  # [B, L]
        assert torch.equal(given.layout_bias[..., 0], expected)
        assert torch.equal(given.layout_bias[..., 1:], plain.layout_bias[..., 1:])


def test_images_change_with_masks_and_no_call_leaves_a_trace() -> None:
    """What is drawn before the start step is as without guidance, what comes later is not."""
    model = some_model("mae", "diffusion")
    config = config_of(model)
    plain = replace(config, mask_threshold=None, start_step=None)
    before, found = drawn(model, plain), drawn(model, config)
    steps = sample(model, plain, generators(), some_text(), some_layout()).commit_steps  # [B, L]
    assert torch.equal(found[steps < 2], before[steps < 2])
    assert not torch.allclose(found[steps >= 2], before[steps >= 2], atol=1e-3)
    assert torch.equal(drawn(model, plain), before) and torch.equal(drawn(model, config), found)


def test_guidance_that_reuses_differences_runs_anew_where_masks_come() -> None:
    """Start step 5 of 16: boxes in iterations 0 to 4, masks in 5 to 15, of which the 5th would else have reused."""
    model = some_model("mae", "diffusion")
    config = config_of(model, num_iter=16, start_step=5, uncond_refresh=4, cfg_text=2.0)
    run = recorded(model, config)
    assert [given is run.given[0] for given in run.given] == [True] * 5 + [False] * 11
    visible = [iteration / 16 for iteration in range(16)]
    assert config.branch_uses(2)[5] == "reuse"
    assert config.branch_uses(2, run.inner.changes(visible))[5] == "run"
    updated = build_auto_layout(model, replace(config, auto_update=True), *given_parts(model))
    assert updated.changes(visible) == frozenset(range(5, 16))


def test_a_longer_negative_prompt_changes_no_map() -> None:
    """Its states pad the captions' keys; the maps are of the captions alone."""
    model = some_model("mae", "diffusion")
    config = config_of(model, num_iter=2, start_step=1, cfg_text=2.0)
    negative = TextContext.collate([torch.randn(9, 12, generator=generator(5))] * 2)
    plain = recorded(model, config).inner.mean
    found = recorded(model, replace(config, negative_prompt="dark"), negative=negative).inner.mean
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    model = some_model("mae", "diffusion")
    config, text, layout = config_of(model, auto_update=True), some_text(), some_layout()
    both = drawn(model, config, dtype=dtype)
    alone = sample(
        model, config, generators()[1:], TextContext(text.tokens[1:], text.valid[1:], text.pooled[1:]),
        layout.map(lambda part: part[1:]), phrase_weights=some_weights()[1:], dtype=dtype,
    ).tokens  # fmt: skip
    assert float((both[1:] - alone).square().mean()) < (1e-8 if dtype == torch.float32 else 0.05)


def test_known_tokens_in_groups_are_as_alone() -> None:
    """Images with other numbers of unknown tokens are drawn one group after the other; each has its own maps."""
    model = some_model("mae", "diffusion")
    config, num_tokens = config_of(model), math.prod(model.config.grid)
    tokens = torch.randn(2, num_tokens, model.config.token_dim, generator=generator(3))
    known = torch.arange(num_tokens)[None] < torch.tensor([[10], [30]])  # [B, L]
    together = drawn(model, config, known=KnownTokens(tokens, known))
    layout, text = some_layout(), some_text()
    for row in range(2):
        pick = slice(row, row + 1)
        alone = sample(
            model, config, generators()[pick], TextContext(text.tokens[pick], text.valid[pick], text.pooled[pick]),
            layout.map(lambda part, pick=pick: part[pick]), known=KnownTokens(tokens[pick], known[pick]),
            phrase_weights=some_weights()[pick],
        ).tokens  # fmt: skip
        torch.testing.assert_close(together[pick], alone, rtol=1e-3, atol=1e-4)
    few = KnownTokens(tokens, torch.arange(num_tokens)[None] < torch.tensor([[10], [num_tokens - 2]]))
    with pytest.raises(ValueError, match="start_step 2 is not reached where 2 tokens are unknown"):
        drawn(model, config, known=few)


@pytest.mark.parametrize(("trunk", "head"), KINDS)
def test_without_grounding_tokens_found_objects_enter_with_their_masks_boxes(trunk: str, head: str) -> None:
    """Caption alone before the start step; then a layout of the bounding boxes, without the box that has no name."""
    model = some_model(trunk, head)
    run = recorded(model, config_of(model, drop_grounding_tokens=True, cfg_text=2.0, cfg_layout=3.0))
    nothing = torch.ones(2, dtype=torch.bool)
    layout, text = some_layout(), some_text()
    with torch.no_grad():
        bare = model.embed_conditions(2, None, text, layout.dropped(nothing))
    words = torch.cat([torch.zeros(2, 1, 4), some_weights()], 1)  # [B, 1 + T, N]
    masks = masks_of_maps(torch.stack(run.maps).mean(0) @ words, 0.5)  # [B, L, N]
    found = torch.tensor([[True, False, False, False]] * 2)
    assert torch.equal(masks.any(1), found)
    boxes = torch.where(found[..., None], boxes_of_masks(masks, model.config.grid), layout.boxes_xyxy)
    with torch.no_grad():
        later = model.embed_conditions(2, None, text, LayoutBatch(boxes, layout.categories, found))
    for given, expected in ((run.given[0], bare), (run.given[2], later), (run.given[5], later)):
        assert torch.equal(given.layout_tokens, expected.layout_tokens)  # type: ignore[arg-type]
        assert torch.equal(given.layout_bias, expected.layout_bias)  # type: ignore[arg-type]


def test_masks_and_their_boxes() -> None:
    """Strictly above the threshold of the scaled map; a constant map is empty."""
    maps = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.0], [0.4, 0.0], [0.3, 0.0], [0.0, 0.0]])[None]  # [1, 6, 2]
    masks = masks_of_maps(maps, 0.5)
    assert masks[0, :, 0].tolist() == [False, False, False, True, True, False] and not masks[..., 1].any()
    boxes = boxes_of_masks(masks, (2, 3))[0]  # [2, 4], of cells (1, 0) and (1, 1)
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 0.5, 2 / 3, 1.0]))
    assert masks_of_maps(maps, 0.0)[0, :, 0].tolist() == [False, True, True, True, True, False]


def test_a_constant_map_keeps_the_box() -> None:
    """Every word of a caption of one token is looked at alike."""
    model = some_model()
    text = TextContext.collate([torch.randn(1, 12, generator=generator(1))] * 2)
    weights = torch.zeros(2, 1, 4)
    weights[:, 0, 0] = 1
    config = config_of(model)
    plain = replace(config, mask_threshold=None, start_step=None)
    expected = sample(model, plain, generators(), text, some_layout()).tokens
    found = sample(model, config, generators(), text, some_layout(), phrase_weights=weights).tokens
    assert torch.equal(found, expected)


def test_what_does_not_go() -> None:
    model = some_model()
    config = config_of(model)
    with pytest.raises(ValueError, match="mask_threshold 0.5 needs phrase_weights, which are not given"):
        drawn(model, config, phrase_weights=None)
    with pytest.raises(ValueError, match="needs captions, boxes, which are not given"):
        sample(model, config, generators(), phrase_weights=some_weights())
    with pytest.raises(ValueError, match=r"phrase_weights must be \[2, 5, 4\], got \[2, 4, 4\]"):
        drawn(model, config, phrase_weights=some_weights()[:, :4])
    with pytest.raises(ValueError, match="does not go with prefix_k 3"):
        config_of(model, prefix_k=3)
    with torch.no_grad():
        for block in model.decoder_blocks[:-1]:
            block.cross.gate.fill_(5e-4)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="the strongest gate of their cross-attention is 5.0e-04"):
        drawn(model, config)
    for options in ({"cross_attn_every": 0}, {"decoder_depth": 1}):
        with pytest.raises(ValueError, match="in a block of the decoder before its last"):
            drawn(some_model(**options), config)
    compiled = some_model()
    compiled.compile_mode = "default"
    with pytest.raises(ValueError, match="does not go with compiled ones"):
        drawn(compiled, config)
