"""The parts that make a MAR a StructMAR: rotation, layout tokens and bias, gated text, masks, sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.conditioning import NO_LABEL, drop_conditions, drop_labels
from models.config import TRAIN_MODES
from models.heads.diffusion import reverse_steps, sampling_schedule
from models.layout import cells_inside, layout_bias
from models.masking import cosine_masked_counts, sample_num_masked, sample_token_mask
from models.rope import Rotation, rope_angles_2d, with_buffer
from models.structmar import StructMAR, StructMARConfig, gather_tokens, preset_config
from models.weights import load_mar_weights, load_structmar_weights, part_of, select_trainable
from tests.helpers import reference
from tests.helpers.structured import generator, predict, some_layout, some_text, structured_model
from util.types import Layout, LayoutBatch, TextContext

# rotation


def test_rope_is_relative() -> None:
    """Logits depend on the difference of positions alone, in x and in y; and they do depend on it."""
    angles = rope_angles_2d((6, 6), 16).view(6, 6, 8)
    q, k = torch.randn(2, 16, generator=generator()).unbind(0)

    def logit(q_row: int, q_column: int, k_row: int, k_column: int) -> float:
        turned_q = Rotation.by(angles[q_row, q_column].view(1, 1, 8))(q.view(1, 1, 1, 16))
        turned_k = Rotation.by(angles[k_row, k_column].view(1, 1, 8))(k.view(1, 1, 1, 16))
        return float((turned_q * turned_k).sum())

    assert logit(1, 2, 3, 5) == pytest.approx(logit(0, 1, 2, 4), abs=1e-5)
    assert logit(1, 2, 3, 5) != pytest.approx(logit(1, 2, 3, 4), abs=1e-3)
    assert logit(1, 2, 3, 5) != pytest.approx(logit(1, 2, 2, 5), abs=1e-3)


def test_rope_halves_are_x_then_y() -> None:
    angles = rope_angles_2d((4, 5), 8).view(4, 5, 4)
    expected = torch.tensor([3.0, 3 * 10000 ** (-2 / 4), 2.0, 2 * 10000 ** (-2 / 4)])
    torch.testing.assert_close(angles[2, 3], expected)


def test_rope_leaves_buffer_tokens_alone() -> None:
    angles = with_buffer(rope_angles_2d((2, 2), 8)[None], 3)
    x = torch.randn(1, 2, 7, 8, generator=generator())
    turned = Rotation.by(angles)(x)
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    assert not torch.allclose(turned[:, :, 4:], x[:, :, 4:])


def test_rope_strength_zero_is_no_rope() -> None:
    without = predict(structured_model(rope=0.0), None, None)
    off = reference.tiny_model(**(reference.STRUCTURED | {"rope_mode": "off"}))
    state = {name: value for name, value in structured_model(rope=0.0).state_dict().items() if "rope" not in name}
    load_structmar_weights(off, state, "test")
    torch.testing.assert_close(without, predict(off, None, None), rtol=1e-5, atol=1e-5)


# layout


def slow_inside(box: list[float], rows: int, columns: int) -> list[bool]:
    x0, y0, x1, y1 = box
    inside = [
        x0 <= (column + 0.5) / columns <= x1 and y0 <= (row + 0.5) / rows <= y1
        for row in range(rows)
        for column in range(columns)
    ]
    if not any(inside):
        row, column = int((y0 + y1) / 2 * rows), int((x0 + x1) / 2 * columns)
        inside[min(row, rows - 1) * columns + min(column, columns - 1)] = True
    return inside


def test_bias_against_a_plain_loop() -> None:
    corners = torch.rand(30, 2, 2, generator=generator()).sort(dim=1).values
    boxes = corners.flatten(1)
    layout = LayoutBatch(boxes.view(6, 5, 4), torch.zeros(6, 5, dtype=torch.int64), torch.ones(6, 5, dtype=torch.bool))
    layout.valid[:, 3:] = False
    layout.valid[5] = False
    bias = layout_bias(layout, (4, 7), 9.0)
    assert bias.shape == (6, 28, 5)
    for image in range(6):
        for slot in range(5):
            inside = slow_inside(layout.boxes_xyxy[image, slot].tolist(), 4, 7)
            if image == 5:
                expected = [0.0] * 28
            elif not layout.valid[image, slot]:
                expected = [-9.0] * 28
            else:
                expected = [0.0 if cell else -9.0 for cell in inside]
            assert bias[image, :, slot].tolist() == expected


def test_every_box_owns_a_cell() -> None:
    centres = torch.rand(500, 2, generator=generator())
    boxes = torch.cat([centres - 1e-4, centres + 1e-4], dim=1).clamp(0, 1)
    edges = torch.tensor([[0.9999, 0.9999, 1.0, 1.0], [0.0, 0.0, 0.0001, 0.0001]])
    inside = cells_inside(torch.cat([boxes, edges])[None], (8, 8))
    assert inside.any(dim=1).all()
    assert (inside.sum(dim=1) <= 2).all()
    assert inside[0, 63, 500] and inside[0, 0, 501]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_layout_tokens_get_no_attention(dtype: torch.dtype) -> None:
    """With one-hot values, attention's output is its probabilities."""
    layout = some_layout()
    bias = layout_bias(layout, (8, 8), math.inf).to(dtype)[:, None]
    q, k = torch.randn(2, 2, 1, 64, 16, generator=generator()).to(dtype).unbind(0)
    k = k[:, :, :4]
    open_bias = torch.cat([bias, bias.new_zeros(2, 1, 64, 1)], dim=-1)
    k = torch.cat([k, k[:, :, :1]], dim=2)
    values = torch.eye(5, dtype=dtype).expand(2, 1, 5, 5)
    probs = torch.nn.functional.scaled_dot_product_attention(q, k, values, attn_mask=open_bias)[:, 0]
    allowed = torch.cat(
        [cells_inside(layout.boxes_xyxy, (8, 8)) & layout.valid[:, None], torch.ones(2, 64, 1).bool()], -1
    )
    assert (probs[~allowed] == 0).all()
    assert (probs[allowed] > 0).all()


def test_layout_reaches_only_tokens_inside_in_one_layer() -> None:
    """One decoder layer, encoder hidden: changing a box's class changes the tokens inside it and no other."""
    model = StructMAR(replace(reference.tiny_config(**reference.STRUCTURED), encoder_depth=0, decoder_depth=1)).eval()
    torch.nn.init.normal_(model.layout_embed.class_emb.weight, std=1.0)
    kept = torch.zeros(2, 0, dtype=torch.int64)
    tokens = torch.zeros(2, 64, 16)
    layout = some_layout()
    other = LayoutBatch(layout.boxes_xyxy, layout.categories + layout.valid.long(), layout.valid)

    def output(given: LayoutBatch) -> Tensor:
        return model.predict(tokens, kept, model.prepare(model.embed_conditions(2, layout=given))).detach()

    # Encoder without layers: a buffer token keeps to itself, so the class reaches the image through the decoder alone.
    changed = (output(layout) - output(other)).abs().amax(-1) > 1e-6
    inside = (cells_inside(layout.boxes_xyxy, (8, 8)) & layout.valid[:, None]).any(-1)
    assert torch.equal(changed, inside)


def test_layout_matters_and_dropped_layout_is_no_layout() -> None:
    model, layout = structured_model(), some_layout()
    everything = torch.ones(2, dtype=torch.bool)
    assert reference.relative_error(predict(model, None, layout), predict(model, None, None)) > 1e-3
    torch.testing.assert_close(predict(model, None, layout.dropped(everything)), predict(model, None, None))


def test_padding_slots_change_nothing() -> None:
    model, layout = structured_model(), some_layout()
    garbage = torch.where(layout.valid[..., None], layout.boxes_xyxy, torch.rand(2, 4, 4, generator=generator()))
    dirty = LayoutBatch(garbage, torch.where(layout.valid, layout.categories, 4), layout.valid)
    assert torch.equal(predict(model, None, layout), predict(model, None, dirty))


# text


def test_gate_zero_silences_the_caption() -> None:
    model = structured_model(gate=0.0)
    torch.nn.init.zeros_(model.text_pool_proj.weight)
    torch.nn.init.zeros_(model.text_pool_proj.bias)
    assert torch.equal(predict(model, some_text(), None), predict(model, None, None))
    loud = structured_model(gate=0.5)
    assert reference.relative_error(predict(loud, some_text(), None), predict(loud, None, None)) > 1e-3


def test_text_padding_and_dropped_text() -> None:
    model, text = structured_model(), some_text()
    padded = TextContext(
        torch.cat([text.tokens, torch.randn(2, 4, 12, generator=generator())], dim=1),
        torch.cat([text.valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1),
        text.pooled,
    )
    torch.testing.assert_close(predict(model, text, None), predict(model, padded, None), rtol=1e-5, atol=1e-5)
    everything = torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(predict(model, text.dropped(everything), None), predict(model, None, None))


def test_drop_conditions() -> None:
    text = TextContext.collate([torch.ones(2, 3)] * 4000)
    layout = LayoutBatch.collate([Layout(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0]))] * 4000, 1)
    text, layout = drop_conditions(text, layout, 0.2, 0.1, 0.0, generator())
    has_text, has_layout = text.valid.any(1), layout.valid.any(1)
    assert float((~has_layout).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float((~has_text).float().mean()) == pytest.approx(1 - 0.8 * 0.9, abs=0.02)
    assert not (has_text & ~has_layout).any()
    assert (text.pooled[~has_text] == 0).all()
    labels = drop_labels(torch.arange(4000), 0.3, generator())
    assert float((labels == NO_LABEL).float().mean()) == pytest.approx(0.3, abs=0.02)


# masks, counts, schedules


def test_token_mask_ids() -> None:
    mask = sample_token_mask(3, 64, 0.7, generator(1))
    assert 44 <= mask.num_masked < 64
    kept, masked = mask.kept_ids(), mask.masked_ids()
    for row in range(3):
        assert kept[row].tolist() == [i for i in range(64) if not mask.masked[row, i]]
        assert masked[row].tolist() == [i for i in range(64) if mask.masked[row, i]]
    assert not torch.equal(mask.masked[0], mask.masked[1])


def test_mask_ratio_follows_the_truncated_gaussian() -> None:
    shared = generator()
    ratios = torch.tensor([sample_num_masked(256, 0.7, shared) / 256 for _ in range(2000)])
    assert ratios.min() >= 0.7 and ratios.max() <= 1.0
    assert float(ratios.mean()) == pytest.approx(0.867 + 0.5 / 256, abs=0.005)


def test_counts() -> None:
    """MAR's cosine counts at 256 tokens and 8 iterations; and every schedule unmasks each token exactly once."""
    counts = cosine_masked_counts(256, 8)
    assert [a - b for a, b in pairwise(counts)] == [5, 15, 24, 31, 39, 45, 48, 49]
    for num_tokens, num_iter in [(256, 256), (256, 64), (64, 64), (64, 1), (16, 5)]:
        counts = cosine_masked_counts(num_tokens, num_iter)
        assert len(counts) == num_iter + 1 and counts[0] == num_tokens and counts[-1] == 0
        assert all(a > b for a, b in pairwise(counts))
    with pytest.raises(ValueError, match="16, got 17"):
        cosine_masked_counts(16, 17)


def test_sampling_schedules() -> None:
    assert sampling_schedule(1000).timesteps == tuple(range(1000))
    assert sampling_schedule(5).timesteps == (0, 250, 500, 749, 999)
    clipped = sampling_schedule(50, t_max=950).timesteps
    assert clipped[-1] == 950 and len(clipped) == 48
    gains = {steps: reverse_steps(steps)[0] for steps in (5, 100)}
    assert gains[100].mean_from_x0 * gains[100].x0_from_eps == pytest.approx(316, rel=0.01)
    assert gains[5].mean_from_x0 * gains[5].x0_from_eps == pytest.approx(7707, rel=0.01)


# weights and configs


def test_trainable_sets() -> None:
    """What each mode trains: by part, and nothing of a frozen part."""
    parts = {"encoder", "decoder", "head", "text", "layout", "rope", "class_emb"}
    expected = {
        "text_layout": {"text", "layout", "rope"},
        "text_proj": {"text"},
        "full": parts - {"class_emb"},
        "backbone": parts - {"class_emb", "head"},
        "class": parts - {"text", "layout"},
        "distill": parts - {"class_emb"},
    }
    assert {*expected, "few_step"} == set(TRAIN_MODES)  # few_step: test_few_step.py, of a part that is not here
    for mode, trained in expected.items():
        model = reference.tiny_model(**reference.STRUCTURED)
        chosen = select_trainable(model, mode)
        every = {name: part_of(name) for name, _ in model.named_parameters()}
        assert set(chosen) == {name for name, part in every.items() if part in trained}
        assert all(parameter.requires_grad == (name in chosen) for name, parameter in model.named_parameters())
    names = set(select_trainable(reference.tiny_model(**reference.STRUCTURED), "text_layout"))
    block = {f"cross.{part}" for part in ("norm.weight", "norm.bias", "q.weight", "q.bias", "kv.weight", "kv.bias")}
    block |= {"cross.proj.weight", "cross.proj.bias", "cross.gate", "attn.rope_strength"}
    pinned = {f"{side}_blocks.{index}.{name}" for side in ("encoder", "decoder") for index in (0, 1) for name in block}
    pinned |= {"text_null", "text_pool_proj.weight", "text_pool_proj.bias", "layout_embed.null"}
    pinned |= {"layout_embed.class_emb.weight"}
    pinned |= {f"layout_embed.box_mlp.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    assert names == pinned


def test_every_trainable_parameter_gets_a_gradient() -> None:
    """So that DDP needs no search for unused parameters: with text and layout, and with both dropped."""
    for mode in ("text_layout", "full"):
        for dropped in (False, True):
            model = structured_model().train()
            chosen = select_trainable(model, mode)
            noise = model.sample_training_noise(2, generator(), 0.7)
            drop = torch.full((2,), dropped)
            text, layout = some_text().dropped(drop), some_layout().dropped(drop)
            model(reference.tensors()["train.latents"], noise, text=text, layout=layout).backward()
            assert [name for name, parameter in chosen.items() if parameter.grad is None] == []


def test_loading_is_strict() -> None:
    model = reference.tiny_model(**reference.STRUCTURED)
    state = dict(reference.weights())
    report = load_mar_weights(model, state, "mar.safetensors")
    assert report.num_loaded == len(state) and all(part_of(name) in ("text", "layout", "rope") for name in report.new)
    wrong_size = state | {"z_proj.weight": torch.zeros(64, 8)}
    with pytest.raises(
        ValueError, match=r"mar.safetensors .*z_proj.weight: \(64, 8\) in the file, \(64, 16\) in the model"
    ):
        load_mar_weights(model, wrong_size, "mar.safetensors")
    with pytest.raises(ValueError, match=r"missing \['mask_token'\]"):
        load_mar_weights(model, {name: value for name, value in state.items() if name != "mask_token"}, "f")
    with pytest.raises(ValueError, match=r"unknown \['surplus'\]"):
        load_mar_weights(model, state | {"surplus": torch.zeros(1)}, "f")
    with pytest.raises(ValueError, match="missing"):
        load_structmar_weights(model, state, "f")
    other_classes = state | {"class_emb.weight": torch.zeros(3, 64)}
    assert load_mar_weights(model, other_classes, "f").ignored == ("class_emb.weight",)


def test_config_round_trip_and_errors() -> None:
    config = preset_config("mar_huge", text_dim=512, num_categories=80)
    assert StructMARConfig.from_dict(config.to_dict()) == config
    assert config.grid == (16, 16) and config.num_tokens == 256
    with pytest.raises(ValueError, match="unknown model 'mar_giant'"):
        preset_config("mar_giant")
    with pytest.raises(ValueError, match="img_size 250 is not a multiple of vae_stride x patch_size = 16"):
        preset_config("mar_base", img_size=250)
    with pytest.raises(ValueError, match="unknown fields \\['extra'\\]"):
        StructMARConfig.from_dict(config.to_dict() | {"extra": 1})
    older = {name: value for name, value in config.to_dict().items() if name != "layout_fourier"}
    assert StructMARConfig.from_dict(older) == config  # a field that did not exist then has its default
    with pytest.raises(ValueError, match="layout_fourier must be bool, got 1"):
        StructMARConfig.from_dict(config.to_dict() | {"layout_fourier": 1})
    with pytest.raises(ValueError, match=r"a\.pth: encoder_depth must be int, got 2\.0"):
        StructMARConfig.from_dict(config.to_dict() | {"encoder_depth": 2.0}, "a.pth")
    with pytest.raises(ValueError, match="max_objects 65 does not fit into buffer_size 64"):
        preset_config("mar_base", num_categories=3, max_objects=65)


def test_patch_size_two() -> None:
    model = StructMAR(reference.tiny_config(patch_size=2))
    latents = torch.randn(2, 16, 8, 8, generator=generator())
    tokens = model.patchify(latents)
    assert tokens.shape == (2, 16, 64)
    assert torch.equal(tokens[0, 1], latents[0, :, 0:2, 2:4].reshape(-1))
    assert torch.equal(model.unpatchify(tokens, (4, 4)), latents)
    assert torch.equal(gather_tokens(tokens, torch.tensor([[3], [5]]))[1, 0], tokens[1, 5])
