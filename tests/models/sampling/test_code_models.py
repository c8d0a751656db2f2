"""Sampling a discrete head on either trunk, with codes of one token drawn together or each on its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.flops import meta_conditions, meta_model, sampling_flops
from models.heads.discrete_sampler import CodeStep, CodeTrace
from models.sampling.config import default_sampling
from models.sampling.guidance import embed_branches
from models.sampling.sampler import KnownTokens, sample
from models.structmar import StructMAR
from tests.helpers.family import CODEBOOK, LLAMA, TRUNKS, family_model
from tests.helpers.structured import generator, some_layout, some_text
from util.flops import count_flops

STRUCTURED: dict[str, Any] = {"num_categories": 5, "text_dim": 12}
GUIDED = default_sampling("discrete", num_iter=4, cfg_text=2.0, cfg_layout=3.0)
KINDS = [(trunk, patch_size) for trunk in TRUNKS for patch_size in (1, 2)]
every_kind = pytest.mark.parametrize(("trunk", "patch_size"), KINDS, ids=str)


def model_of(trunk: str, patch_size: int = 1) -> StructMAR:
    return family_model(trunk, patch_size=patch_size, **STRUCTURED | LLAMA)


def conditions(rows: slice = slice(None)) -> tuple[Any, Any]:
    text, layout = some_text(), some_layout()
    return (
        type(text)(text.tokens[rows], text.valid[rows], text.pooled[rows]),
        type(layout)(layout.boxes_xyxy[rows], layout.categories[rows], layout.valid[rows]),
    )


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
@every_kind
def test_an_image_does_not_depend_on_its_batch(trunk: str, patch_size: int, order: str) -> None:
    model, config = model_of(trunk, patch_size), replace(GUIDED, order=order)
    both = sample(model, config, [generator(1), generator(2)], *conditions())
    assert both.latents.shape == (2, 1, 8, 8) and both.latents.min() >= 0 and both.latents.max() < CODEBOOK
    assert torch.equal(both.latents, both.latents.round()) and len(both.latents.unique()) > 5
    num_units = 64 if trunk == "single" or patch_size == 1 else 16
    assert both.tokens.shape == (2, num_units, 64 // num_units)
    alone = sample(model, config, [generator(2)], *conditions(slice(1, 2)))
    assert torch.equal(alone.tokens[0], both.tokens[1]) and torch.equal(alone.commit_steps[0], both.commit_steps[1])


@every_kind
def test_recorded_log_probabilities(trunk: str, patch_size: int) -> None:
    """Those of the codes under the model that is given what was known before, all tokens computed."""
    model = model_of(trunk, patch_size)
    config = replace(GUIDED, cfg_schedule="constant")
    output = sample(model, config, [generator(1), generator(2)], *conditions(), record=True)
    log_probs = cast(CodeTrace, output.trace).log_probs
    branches, config = embed_branches(model, config, 2, *conditions(), None)
    context = model.prepare(branches.conditions)
    for step in range(4):
        known = output.commit_steps < step
        kept_ids = known.nonzero()[:, 1].view(2, -1)
        with torch.no_grad():
            z = model.predict(output.tokens.repeat(3, 1, 1), kept_ids.repeat(3, 1), context)
            logits = branches.combine(model.code_head.logits(z).unflatten(0, (3, 2)), 2.0, 3.0)  # [B, L, C, K]
        expected = logits.log_softmax(-1).gather(3, output.tokens.long()[..., None])[..., 0].sum(-1)
        now = output.commit_steps == step
        torch.testing.assert_close(log_probs[now], expected[now], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["confidence", "raster"])
def test_blind_orders_ask_for_their_tokens_alone(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, asked = model_of("single"), replace(GUIDED, order=order), []
    original = CodeStep.sample

    def counting(self: CodeStep, z: Tensor, *rest: Any) -> Any:
        asked.append(z.shape[1])
        return original(self, z, *rest)

    monkeypatch.setattr(CodeStep, "sample", counting)
    sample(model, config, [generator(1), generator(2)], *conditions())
    counts = config.masked_counts(64)
    drawn = [now - after for now, after in pairwise(counts)]
    assert asked == [2 * count for count in (counts[:-1] if order == "confidence" else drawn)]


@every_kind
def test_known_codes(trunk: str, patch_size: int) -> None:
    """Images may know different numbers of tokens."""
    model = model_of(trunk, patch_size)
    whole = sample(model, GUIDED, [generator(1), generator(2)], *conditions())
    known = torch.rand(whole.orders.shape, generator=generator(3)) < 0.4
    known[1, : known.shape[1] // 2] = True
    given = KnownTokens(whole.tokens, known)
    output = sample(model, GUIDED, [generator(4), generator(5)], *conditions(), known=given)
    assert torch.equal(output.tokens[known], whole.tokens[known]) and torch.equal(output.commit_steps == -1, known)
    assert not torch.equal(output.tokens, whole.tokens)
    alone = KnownTokens(whole.tokens[1:], known[1:])
    found = sample(model, GUIDED, [generator(5)], *conditions(slice(1, 2)), known=alone)
    assert torch.equal(found.tokens[0], output.tokens[1])


@every_kind
def test_other_ways_to_sample(trunk: str, patch_size: int) -> None:
    """bfloat16, the condition cache, guidance in some iterations: whole codes, none unknown."""
    model = model_of(trunk, patch_size)
    for options in ({"uncond_refresh": 2, "num_iter": 8}, {"guidance_interval": (0.3, 0.8)}):
        output = sample(
            model, replace(GUIDED, **options), [generator(1), generator(2)], *conditions(), dtype=torch.bfloat16
        )
        assert output.tokens.min() >= 0 and output.tokens.max() < CODEBOOK and (output.commit_steps >= 0).all()


@pytest.mark.parametrize("order", ["confidence", "random"])
@every_kind
def test_flops_are_those_of_a_run(trunk: str, patch_size: int, order: str) -> None:
    """Of an image more in a batch that is sampled on the meta device."""
    model = meta_model(model_of(trunk, patch_size).config)
    config = replace(GUIDED, order=order)

    def run(count: int) -> int:
        given = meta_conditions(model.config, count, 6)
        return count_flops(lambda: sample(model, config, [generator(seed) for seed in range(count)], **given))[1]

    assert sampling_flops(model, config, 6) == run(3) - run(2)


@every_kind
def test_a_prefix(trunk: str, patch_size: int) -> None:
    """One token an iteration, row by row; the rest as where these are known; FLOPs with it."""
    model, config = model_of(trunk, patch_size), replace(GUIDED, prefix_k=5)
    output = sample(model, config, [generator(1), generator(2)], *conditions())
    num_units = output.tokens.shape[1]
    assert output.commit_steps[:, :5].tolist() == [list(range(5))] * 2 and (output.commit_steps[:, 5:] >= 5).all()
    assert output.orders.sort(dim=1).values.tolist() == [list(range(num_units))] * 2
    assert output.orders[:, -5:].tolist() == [[4, 3, 2, 1, 0]] * 2
    counts = config.masked_counts(num_units - 5)
    assert output.commit_steps[0].bincount()[5:].tolist() == [now - after for now, after in pairwise(counts)]

    draws = [generator(1), generator(2)]
    first = sample(model, replace(config.of_prefix, num_iter=num_units), draws, *conditions())
    assert torch.equal(first.tokens[:, :5], output.tokens[:, :5])  # all tokens row by row begin so
    known = torch.arange(num_units).expand(2, -1) < 5
    draws = [generator(1), generator(2)]
    for draw in draws:  # what the prefix took
        for _ in range(5):
            torch.rand(num_units, output.tokens.shape[2] + 1, dtype=torch.float64, generator=draw)
    rest = sample(model, config, draws, *conditions(), known=KnownTokens(output.tokens, known))
    assert torch.equal(rest.tokens, output.tokens)

    meta = meta_model(model.config)

    def run(count: int) -> int:
        given = meta_conditions(meta.config, count, 6)
        return count_flops(lambda: sample(meta, config, [generator(seed) for seed in range(count)], **given))[1]

    assert sampling_flops(meta, config, 6) == run(3) - run(2)


def test_a_prefix_that_does_not_fit() -> None:
    model, draws = model_of("single"), [generator(1), generator(2)]
    with pytest.raises(ValueError, match="prefix_k 65 is more than the number of tokens, 64"):
        sample(model, replace(GUIDED, prefix_k=65), draws)
    with pytest.raises(ValueError, match="num_iter 4 is more than the 2 tokens that prefix_k 62 leaves of 64"):
        sample(model, replace(GUIDED, prefix_k=62), draws)
    known = KnownTokens(torch.zeros(2, 64, 1), torch.arange(64).expand(2, -1) < 3)
    with pytest.raises(ValueError, match=r"must hold the first 4 \(prefix_k\), an image knows 3 of these"):
        sample(model, replace(GUIDED, prefix_k=4), draws, known=known)
    with pytest.raises(ValueError, match="recordings .* know no prefix, got prefix_k 4"):
        sample(model, replace(GUIDED, prefix_k=4), draws, record=True)
    whole = sample(model, replace(GUIDED, prefix_k=64), draws)
    assert whole.commit_steps.tolist() == [list(range(64))] * 2
