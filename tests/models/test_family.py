"""Two trunks and two heads, freely combined: what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.blocks import Attention, Block
from models.config import MASK_SCHEDULES, PRESETS, preset_config
from models.heads.discrete import DiscreteHead, NoNoise
from models.masking import TokenMask, mask_ratio, sample_token_mask
from models.rope import Rotation, rope_angles_2d
from models.structmar import StructMAR, gather_tokens
from models.units import group_units, owners_of, ungroup_units
from models.weights import load_mar_weights, part_of
from tests.helpers.family import CODEBOOK, HEADS, LLAMA, TRUNKS, family_config, family_model, some_latents
from tests.helpers.structured import generator, some_layout, some_text
from util.types import Layout, LayoutBatch

STRUCTURED: dict[str, Any] = {"num_categories": 5, "text_dim": 12}


@pytest.mark.parametrize("options", [{}, LLAMA, {"qk_norm": "head_layer"}, {"qk_norm": "full_rms"}], ids=str)
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_combination_learns(trunk: str, head: str, patch_size: int, options: dict[str, Any]) -> None:
    model = family_model(trunk, head, patch_size=patch_size, **STRUCTURED | options).train()
    latents, noise = some_latents(model), model.sample_training_noise(2, generator(1), 0.7)
    conditions: dict[str, Any] = {"text": some_text(), "layout": some_layout(), "labels": torch.tensor([1, -1])}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(latents, noise, **conditions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert torch.equal(model.unpatchify(model.patchify(latents), model.config.grid), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_prepared_for_sampling_it_predicts_the_same(trunk: str, head: str, patch_size: int, dtype: torch.dtype) -> None:
    model = family_model(trunk, head, patch_size=patch_size, **STRUCTURED | LLAMA)
    tokens = model.patchify(some_latents(model))
    conditions = model.embed_conditions(2, None, some_text(), some_layout())
    num_tokens = tokens.shape[1]
    kept, asked = (torch.randperm(num_tokens, generator=generator(s))[:5].expand(2, -1) for s in (1, 2))
    with torch.no_grad():
        whole = model.predict(tokens, kept, model.prepare(conditions))
        part = model.predict(tokens, kept, model.prepare(conditions, dtype), asked)
    assert whole.shape == (2, num_tokens, model.head.z_dim)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(part, gather_tokens(whole, asked), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("trunk", "patch_size"), [("mae", 1), ("mae", 2), ("single", 1), ("single", 2)])
def test_hidden_tokens_are_not_seen(trunk: str, patch_size: int) -> None:
    model = family_model(trunk, patch_size=patch_size)
    tokens, context = model.patchify(some_latents(model)), model.prepare(model.embed_conditions(2))
    kept = torch.tensor([[3, 9], [0, 7]])
    with torch.no_grad():
        before = model.predict(tokens, kept, context)
        known = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, kept, True)[..., None]
        others = torch.where(known, tokens, (tokens + 1) % CODEBOOK)
        assert torch.equal(model.predict(others, kept, context), before)
        changed = torch.where(known, (tokens + 1) % CODEBOOK, tokens)
        assert not torch.allclose(model.predict(changed, kept, context), before)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["training", "sampling"])
def test_boxes_are_seen_by_the_tokens_they_cover(patch_size: int, dtype: torch.dtype | None) -> None:
    """In one block of a single trunk, a box of another category changes what lies inside, and nothing else."""
    model = family_model(patch_size=patch_size, decoder_depth=1, **STRUCTURED)
    tokens, kept = model.patchify(some_latents(model)), torch.tensor([[3, 9], [0, 7]])
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    found = []
    for category in (0, 3):
        layout = LayoutBatch.collate([Layout(box, torch.tensor([category]))] * 2, model.config.max_objects)
        context = model.prepare(model.embed_conditions(2, layout=layout), dtype)
        with torch.no_grad():
            found.append(model.predict(tokens, kept, context))
    rows, columns = model.config.unit_grid()
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[: rows // 2, : columns // 2] = True
    changed = (found[0] - found[1]).abs().amax(-1) > 1e-6  # [B, U]
    assert torch.equal(changed, inside.flatten().expand(2, -1))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_rows_that_show_different_numbers_of_tokens(patch_size: int) -> None:
    model = family_model(patch_size=patch_size)
    tokens = model.patchify(some_latents(model, 4))
    mask = sample_token_mask(4, tokens.shape[1], 0.7, generator(3), "arccos", per_image=True)
    assert mask.counts is not None and len(set(mask.counts)) > 1
    with torch.no_grad():
        z = model.predict(tokens, mask.kept_ids(), model.prepare(model.embed_conditions(4)))
        for row, count in enumerate(mask.counts):
            own = TokenMask(mask.masked[row : row + 1], count)
            alone = model.predict(tokens[row : row + 1], own.kept_ids(), model.prepare(model.embed_conditions(1)))
            torch.testing.assert_close(z[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_loss_is_that_of_scored_tokens(trunk: str, patch_size: int) -> None:
    model = family_model(trunk, patch_size=patch_size)
    latents = some_latents(model)
    noise = model.sample_training_noise(2, generator(4), 0.7)
    masked, tokens = noise.mask.masked, model.patchify(latents)
    z = model.predict(tokens, noise.mask.kept_ids(), model.prepare(model.embed_conditions(2)))
    full = model.code_head.logits(z)  # [B, U, C, K]
    nats = full.log_softmax(-1)
    picked = nats.gather(-1, tokens.long()[..., None])[..., 0]
    smoothing = model.config.label_smoothing
    each = -((1 - smoothing) * picked + smoothing * nats.mean(-1)).mean(-1)  # [B, U]
    assert noise.mask.num_hidden == int(masked.sum())
    torch.testing.assert_close(model(latents, noise), each[masked].mean())
    everything = family_model(trunk, patch_size=patch_size, loss_on="all")
    torch.testing.assert_close(everything(latents, noise), each.mean())
    some = torch.tensor([0, 5])
    torch.testing.assert_close(model.code_head.logits(z[:, some]), full[:, some])


@pytest.mark.parametrize(("schedule", "mean"), [("truncnorm", 0.867), ("linear", 0.5), ("square", 1 / 3),
                                                ("cosine", 0.637), ("arccos", 0.637)])  # fmt: skip
def test_mask_schedules(schedule: str, mean: float) -> None:
    uniforms = torch.linspace(0, 1, 2001, dtype=torch.float64).tolist()
    ratios = [mask_ratio(schedule, u, 0.7) for u in uniforms]
    assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=2e-3)
    assert min(ratios) >= (0.7 if schedule == "truncnorm" else 0) and max(ratios) <= 1
    for per_image in (False, True):
        mask = sample_token_mask(6, 16, 0.7, generator(2), schedule, per_image)
        counts = mask.masked.sum(1).tolist()
        assert mask.num_hidden == sum(counts) and mask.num_masked == max(counts) and min(counts) >= 1
        assert mask.hidden_rows().tolist() == mask.masked.flatten().nonzero()[:, 0].tolist()
        shown = [[place for place in row if place < 16] for row in mask.kept_ids().tolist()]
        assert shown == [(~row).nonzero()[:, 0].tolist() for row in mask.masked]
        assert (len(set(counts)) > 1) == per_image


def test_mask_schedules_have_names() -> None:
    assert [mask_ratio(name, 0.3, 0.7) for name in MASK_SCHEDULES]
    with pytest.raises(ValueError, match=r"one of .*arccos.*, got 'cos'"):
        mask_ratio("cos", 0.3, 0.7)
    assert (family_config().mask_schedule, family_config(head="diffusion").mask_schedule) == ("arccos", "truncnorm")


def test_units_and_their_tokens() -> None:
    grid, side = (2, 3), 2
    ids = torch.arange(24)[None]
    groups = group_units(ids, grid, side)
    assert groups[0, 0].tolist() == [0, 1, 6, 7] and groups[0, 4].tolist() == [14, 15, 20, 21]
    assert torch.equal(ungroup_units(groups, grid, side), ids)
    owners, places = owners_of(ids, grid, side)
    assert torch.equal(groups[0][owners[0], places[0]], ids[0])


def test_options_that_do_not_go_together() -> None:
    for bad, message in [
        ({"diffusion_batch_mul": 4}, "diffusion_batch_mul 1, got 4"),
        ({"head": "diffusion", "codebook_size": 0, "loss_on": "all"}, "loss_on 'all' with head 'diffusion'"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(family_config(), **bad)


def test_losses_of_many_numbers_of_rows_have_few_shapes() -> None:
    """Else a long run on a CPU prepares a product for every step, and keeps it."""
    head = DiscreteHead(16, 1, 1, 8, 0, 0.1)
    torch.nn.init.normal_(head.out.weight, generator=generator(1))
    z, target = torch.randn(700, 8, generator=generator(2)), torch.arange(700)[:, None] % 16.0
    shapes: set[int] = set()
    head.out.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape[0]))
    whole = head.token_loss(target, z, NoNoise())
    for rows in range(1, 700, 31):
        torch.testing.assert_close(head.token_loss(target[:rows], z[:rows], NoNoise()), whole[:rows])
    assert len(shapes) <= 2


def test_a_new_discrete_head_finds_all_codes_equally_likely() -> None:
    model = StructMAR(family_config(label_smoothing=0.0))
    loss = model(some_latents(model), model.sample_training_noise(2, generator(), 0.7))
    assert loss.item() == pytest.approx(torch.tensor(float(CODEBOOK)).log().item())


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 5)])
@pytest.mark.parametrize("axes", ["xy", "yx"])
def test_rotations_know_distances_alone(grid: tuple[int, int], axes: str) -> None:
    """The product of a turned query and a turned key depends on how far apart they are in rows and columns."""
    height, width = grid
    rotation = Rotation.by(rope_angles_2d(grid, 8, axes=axes)[None])
    query, key = (torch.randn(8, generator=generator(seed)).expand(1, 1, height * width, 8) for seed in (1, 2))
    products = (rotation(query) @ rotation(key).transpose(-1, -2))[0, 0]  # [L, L]
    found: dict[tuple[int, int], float] = {}
    for one in range(height * width):
        for other in range(height * width):
            apart = one // width - other // width, one % width - other % width
            value = products[one, other].item()
            assert found.setdefault(apart, value) == pytest.approx(value, abs=1e-5)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("kind", ["head_layer", "head_rms", "full_rms"])
def test_norms_of_queries_and_keys_ignore_their_scale(kind: str) -> None:
    attention = Attention(family_config(qk_norm=kind, linear_bias=False), 32, 2).eval()
    x = torch.randn(2, 7, 32, generator=generator())
    with torch.no_grad():
        before = attention.attend(x, None, None)
        attention.qkv.weight[:64] *= 1000
        torch.testing.assert_close(attention.attend(x, None, None), before, rtol=1e-3, atol=1e-4)


def test_norms_behind_attention_and_mlp_bound_what_a_block_adds() -> None:
    """Twice a norm's output at most, however large the weights; before them there is no bound."""
    x = torch.randn(2, 7, 32, generator=generator())
    for position, is_bounded in (("res_post", True), ("pre", False)):
        block = Block(family_config(**LLAMA | {"norm_position": position}), 32, 2, text_dim=0).eval()
        with torch.no_grad():
            for name, weight in block.named_parameters():
                if "norm" not in name:
                    weight *= 1000
            added = block.run(x, None, None, None) - x
        assert bool((added.norm(dim=-1) <= 2 * 32**0.5 + 1e-3).all()) == is_bounded


def test_a_discrete_head_starts_from_the_blocks_of_mar() -> None:
    mar = family_model("mae", "diffusion", rope_mode="off")
    model = StructMAR(family_config("mae", "discrete", **STRUCTURED))
    report = load_mar_weights(model, mar.state_dict(), "mar.safetensors")
    assert {name.split(".")[0] for name in report.ignored} == {"z_proj", "diffloss"}
    assert {"z_proj.codes.weight", "code_head.out.weight"} <= {*report.new}
    assert torch.equal(model.decoder_blocks[0].attn.qkv.weight, mar.decoder_blocks[0].attn.qkv.weight)
    assert {part_of(name) for name, _ in model.named_parameters()} == {"encoder", "decoder", "head", "text", "layout",
                                                                      "rope", "class_emb"}  # fmt: skip


COUNTS = {"base": 110_889_984, "large": 342_913_024, "xlarge": 774_702_080, "xxlarge": 1_410_975_744}


@pytest.mark.parametrize("size", COUNTS)
def test_sizes_of_the_paper(size: str) -> None:
    """The released models have one class more, for hidden codes, and no norm of queries and keys."""
    with torch.device("meta"):
        model = StructMAR(preset_config(f"maskgil_{size}"))
    config, width = model.config, model.config.decoder_embed_dim
    norms = config.decoder_depth * 2 * width
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == COUNTS[size] - width + norms
    assert width // config.decoder_num_heads == 64
    assert {parameter.requires_grad for parameter in model.parameters()} == {True}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_the_other_trunk_and_the_other_head(name: str) -> None:
    own = preset_config(name)
    for trunk in TRUNKS:
        config = preset_config(name, trunk=trunk)
        assert config.encoder_depth + config.decoder_depth == own.encoder_depth + own.decoder_depth
        assert (config.encoder_depth == 0) == (trunk == "single")
    codebook_size = own.codebook_size or 64
    assert preset_config(name, head="discrete", codebook_size=codebook_size).vae_embed_dim == 1
    assert preset_config(name, head="diffusion").vae_embed_dim == 16


def test_weights_of_a_single_trunk_start_small() -> None:
    model = StructMAR(preset_config("maskgil_mini", num_categories=5, text_dim=12))
    blocks = model.decoder_blocks.named_parameters()
    stds = {name: each.std().item() for name, each in blocks if each.dim() == 2}
    assert stds and all(std == pytest.approx(0.02, rel=0.05) for std in stds.values()), stds
    assert model.z_proj.codes.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.code_head.out.weight.any() and model.mask_token.std().item() > 0.01
