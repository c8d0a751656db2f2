"""The sampler decides as it goes: from known tokens, by an order that looks, under controls, on any grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditions
from models.heads.base import HeadOutput
from models.heads.diffusion_sampler import DiffusionSampler, DiffusionStep
from models.masking import cosine_masked_counts, mask_from_orders, sample_orders
from models.sampling.config import SamplingConfig
from models.sampling.controls import NoControls
from models.sampling.guidance import embed_branches
from models.sampling.orders import DecodeState, PlannedOrder, unknown_first
from models.sampling.sampler import KnownTokens, sample
from models.structmar import StructMAR
from tests.helpers import reference
from tests.helpers.plain_model import plain_predict
from tests.helpers.structured import generator, some_layout, some_text, structured_model

QUICK = SamplingConfig(num_iter=5, num_sampling_steps=4, t_max=950, cfg_text=1.5, cfg_layout=3.0)
NUM_TOKENS = 64


def generators() -> list[torch.Generator]:
    return [generator(1), generator(2)]


def some_known(*counts: int) -> KnownTokens:
    """So many tokens of each image, at random places, with values of their own."""
    known = torch.zeros(len(counts), NUM_TOKENS, dtype=torch.bool)
    for row, count in enumerate(counts):
        known[row, torch.randperm(NUM_TOKENS, generator=generator(10 + row))[:count]] = True
    return KnownTokens(torch.randn(len(counts), NUM_TOKENS, 16, generator=generator(9)), known)


def test_nothing_known_is_sampling_from_scratch() -> None:
    model, conditions = structured_model(), (some_text(), some_layout())
    expected = sample(model, QUICK, generators(), *conditions)
    found = sample(model, QUICK, generators(), *conditions, known=some_known(0, 0))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.orders, expected.orders)


@pytest.mark.parametrize("counts", [(20, 20), (20, 50), (64, 62), (0, 64), (64, 64)], ids=str)
def test_known_tokens_stay_and_the_others_are_drawn(counts: tuple[int, int]) -> None:
    """Any number in each image; where fewer are unknown than there are iterations, there are as many iterations."""
    model, known = structured_model(), some_known(*counts)
    output = sample(model, QUICK, generators(), some_text(), some_layout(), known=known)
    assert torch.equal(output.tokens[known.known], known.tokens[known.known])
    drawn = output.tokens[~known.known]
    assert torch.isfinite(drawn).all() and (drawn != 0).all()
    for row, count in enumerate(counts):
        assert known.known[row, output.orders[row, NUM_TOKENS - count :]].all()  # unmasked before all others


def test_an_image_with_known_tokens_does_not_depend_on_its_batch() -> None:
    model, known = structured_model(), some_known(20, 50)
    together = sample(model, QUICK, generators(), known=known).tokens
    alone = sample(model, QUICK, [generator(2)], known=KnownTokens(known.tokens[1:], known.known[1:])).tokens
    assert reference.relative_error(together[1:], alone) < 1e-5


def test_known_tokens_matter() -> None:
    model, known = structured_model(), some_known(32, 32)
    other = KnownTokens(known.tokens + 1, known.known)
    found, changed = (sample(model, QUICK, generators(), known=each).tokens for each in (known, other))
    assert reference.relative_error(changed[~known.known], found[~known.known]) > 1e-2


def test_known_tokens_of_another_shape_are_refused() -> None:
    known = KnownTokens(torch.zeros(2, 60, 16), torch.zeros(2, 60, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[2, 64, 16\] with a mask \[2, 64\], got \[2, 60, 16\] and \[2, 60\]"):
        sample(structured_model(), QUICK, generators(), known=known)


def test_unknown_first_keeps_the_order_of_the_others() -> None:
    orders, known = torch.tensor([[3, 1, 0, 2]]), torch.tensor([[False, True, False, True]])
    assert unknown_first(orders, known).tolist() == [[0, 2, 3, 1]]


@dataclass(frozen=True)
class BySize:
    """Decides as it goes: next come the unknown tokens nearest (by position) to the largest token drawn so far."""

    counts: list[int]
    uses_confidence: bool = False

    def next(self, state: DecodeState, confidence: Tensor | None) -> Tensor:
        assert confidence is None
        num_next = self.counts[state.iteration] - self.counts[state.iteration + 1]
        largest = state.tokens.square().sum(-1).masked_fill(~state.known, -1).argmax(1)  # [B]
        unknown = state.unknown_ids()  # [B, u]
        nearest = (unknown - largest[:, None]).abs().argsort(dim=1, stable=True)[:, :num_next]  # [B, p]
        return unknown.gather(1, nearest).sort(dim=1).values


@pytest.mark.parametrize(
    "options", [{}, {"uncond_refresh": 2, "num_iter": 9}, {"guidance_interval": (0.3, 0.8)}], ids=str
)
def test_an_order_that_decides_as_it_goes(options: dict) -> None:
    """The order that it took, planned beforehand, gives the same tokens: only who decides is different."""
    model, config = structured_model(), replace(QUICK, **options)
    counts = cosine_masked_counts(NUM_TOKENS, config.num_iter)
    conditions = (some_text(), some_layout())
    found = sample(model, config, generators(), *conditions, order=BySize(counts))
    assert found.orders.sort(dim=1).values.tolist() == [list(range(NUM_TOKENS))] * 2
    planned = sample(model, config, generators(), *conditions, order=PlannedOrder(found.orders, counts))
    assert reference.relative_error(planned.tokens, found.tokens) < 1e-5
    assert reference.relative_error(found.tokens[:1], found.tokens[1:]) > 1e-2


@dataclass(frozen=True)
class MostConfident:
    counts: list[int]
    uses_confidence: bool = True

    def next(self, state: DecodeState, confidence: Tensor | None) -> Tensor:
        assert confidence is not None and confidence.shape == (2, state.num_masked)
        num_next = self.counts[state.iteration] - self.counts[state.iteration + 1]
        best = confidence.topk(num_next, dim=1).indices  # [B, p]
        return state.unknown_ids().gather(1, best).sort(dim=1).values


@pytest.mark.parametrize("options", [{}, {"num_iter": 9, "cfg_text": 1.5, "cfg_layout": 3.0, "uncond_refresh": 2}])
def test_an_order_by_confidence(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unknown token is drawn in every iteration, the surest stay; by the place here, so the first come first."""
    asked = []
    original = DiffusionStep.sample

    def with_confidence(self: DiffusionStep, z: Tensor, *rest: object) -> HeadOutput:
        asked.append(z.shape[1])
        output = original(self, z, *rest)  # type: ignore[arg-type]
        return HeadOutput(output.tokens, confidence=-torch.arange(z.shape[1], dtype=torch.float32) % (z.shape[1] // 2))

    monkeypatch.setattr(DiffusionStep, "sample", with_confidence)
    monkeypatch.setattr(DiffusionSampler, "has_confidence", True)
    config = replace(QUICK, **options)
    counts = cosine_masked_counts(NUM_TOKENS, config.num_iter)
    conditions = (some_text(), some_layout()) if options else ()
    output = sample(structured_model(), config, generators(), *conditions, order=MostConfident(counts))
    assert asked == [2 * count for count in counts[:-1]]
    assert output.orders.sort(dim=1).values.tolist() == [list(range(NUM_TOKENS))] * 2 and (output.tokens != 0).all()


def test_an_order_by_confidence_needs_a_head_that_has_one() -> None:
    order = MostConfident(cosine_masked_counts(NUM_TOKENS, QUICK.num_iter))
    with pytest.raises(ValueError, match="MostConfident goes by confidence, which DiffusionSampler does not have"):
        sample(structured_model(), QUICK, generators(), order=order)


@dataclass(frozen=True)
class OtherLayout(NoControls):
    """From an iteration on, the boxes of other conditions."""

    start: int
    other: Conditions

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        return self.other if iteration >= self.start else conditions

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        return frozenset({self.start})


class Asked(NoControls):
    """What a control is asked, written down."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        self.seen.append((iteration, visible))
        return conditions

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        return frozenset()


def test_a_control_is_told_what_share_of_the_image_is_visible() -> None:
    """From scratch, behind a prefix of one token, and where tokens are known: each iteration asks once."""
    model = structured_model()

    def asked(known: KnownTokens | None = None, **options: object) -> list[tuple[int, float]]:
        controls = Asked()
        sample(model, replace(QUICK, **options), generators(), known=known, controls=controls)  # type: ignore[arg-type]
        return controls.seen

    def shares(num_unknown: int) -> list[tuple[int, float]]:
        counts = cosine_masked_counts(num_unknown, QUICK.num_iter)[:-1]
        return [(iteration, 1 - count / NUM_TOKENS) for iteration, count in enumerate(counts)]

    assert asked() == shares(64)
    assert asked(prefix_k=1) == [(0, 0.0), *shares(63)]
    assert asked(some_known(20, 50)) == [*shares(44), *shares(14)]  # one group after the other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_controls(dtype: torch.dtype) -> None:
    """Other boxes from the start are those boxes; from the middle on, the first tokens are as without them."""
    model, text, layout = structured_model(), some_text(), some_layout()
    other = type(layout)(layout.boxes_xyxy.flip(0), layout.categories.flip(0), layout.valid.flip(0))
    with torch.no_grad():
        embedded = model.embed_conditions(2, None, text, other)

    def drawn(boxes: object, controls: OtherLayout | None = None) -> Tensor:
        return sample(model, QUICK, generators(), text, boxes, controls=controls, dtype=dtype).tokens  # type: ignore[arg-type]

    plain, expected = drawn(layout), drawn(other)
    assert torch.equal(drawn(layout, OtherLayout(0, embedded)), expected)
    late = sample(model, QUICK, generators(), text, layout, controls=OtherLayout(2, embedded), dtype=dtype)
    first = late.orders[:, cosine_masked_counts(NUM_TOKENS, QUICK.num_iter)[2] :]  # [B, unmasked in iterations 0 and 1]
    for row in range(2):
        assert torch.equal(late.tokens[row, first[row]], plain[row, first[row]])
    assert reference.relative_error(late.tokens, plain) > 1e-3


def gridded_model(**options: object) -> StructMAR:
    """Without learned positions, so that any grid fits."""
    model = StructMAR(replace(structured_model().config, learned_pos=False, **options)).eval()  # type: ignore[arg-type]
    state = {name: weight for name, weight in structured_model().state_dict().items() if "pos_embed" not in name}
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (4, 10)])
def test_any_grid(grid: tuple[int, int]) -> None:
    """Counts, latents and boxes follow the batch's grid, in training and in sampling."""
    model = gridded_model()
    output = sample(model, QUICK, generators(), some_text(), some_layout(), grid=grid)
    assert output.grid == grid and output.latents.shape == (2, 16, *grid)
    assert torch.equal(model.patchify(output.latents), output.tokens)
    noise = model.sample_training_noise(2, generator(3), 0.7, grid)
    loss = model(output.latents, noise, text=some_text(), layout=some_layout())
    assert torch.isfinite(loss) and noise.mask.masked.shape == (2, grid[0] * grid[1])


def test_the_configured_grid_given_by_name_changes_nothing() -> None:
    model = gridded_model()
    expected, found = (sample(model, QUICK, generators(), grid=grid).tokens for grid in (None, (8, 8)))
    assert torch.equal(found, expected)


def test_rotations_tell_grids_apart() -> None:
    """As many tokens in rows of another length: other neighbours, other tokens."""
    model = gridded_model()
    square, long = (sample(model, QUICK, generators(), grid=grid).tokens for grid in ((8, 8), (4, 16)))
    assert reference.relative_error(long, square) > 1e-2


def test_learned_positions_know_one_grid() -> None:
    message = "a grid of 12 x 8 tokens, but the learned positions of this model are of 8 x 8"
    model = structured_model()
    with pytest.raises(ValueError, match=message):
        sample(model, QUICK, generators(), grid=(12, 8))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 16, 12, 8), model.sample_training_noise(2, generator(), 0.7, (12, 8)))


def test_what_is_called_after_an_iteration() -> None:
    """It sees the tokens so far, may replace them, and may end the run."""
    model, seen, stops = structured_model(), [], []

    def look(iteration: int, tokens: Tensor) -> Tensor | None:
        seen.append((iteration, int((tokens[0] != 0).any(-1).sum())))
        return None

    sample(model, QUICK, generators(), on_iteration=look, should_stop=lambda: stops.append(1) or len(stops) > 3)
    counts = cosine_masked_counts(NUM_TOKENS, QUICK.num_iter)
    assert seen == [(i, NUM_TOKENS - counts[i + 1]) for i in range(3)]
    plain = sample(model, QUICK, generators()).tokens
    moved = sample(model, QUICK, generators(), on_iteration=lambda i, x: x + 1 if i == 0 else None).tokens
    assert reference.relative_error(moved, plain) > 1e-2


@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (4, 10)])
def test_every_grid_is_the_plain_models(grid: tuple[int, int]) -> None:
    """Rotations, box cells and attention bias, by formulas that share no code."""
    model = gridded_model()
    num_tokens = grid[0] * grid[1]
    kept = mask_from_orders(sample_orders(2, num_tokens, [generator(4)]), num_tokens // 2).kept_ids()
    tokens = torch.randn(2, num_tokens, 16, generator=generator(5))
    with torch.no_grad():
        conditions = model.embed_conditions(2, None, some_text(), some_layout(), grid)
        expected = plain_predict(model, tokens, kept, conditions)
        for dtype in (None, torch.float32):
            found = model.predict(tokens, kept, model.prepare(conditions, dtype))
            assert reference.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"cross_attn_every": 0}, {"text_dim": 0}], ids=str)
def test_bf16_without_learned_positions(changes: dict) -> None:
    """The residual stream is float32, whether positions are added to it or not."""
    config = replace(structured_model().config, learned_pos=False, **changes)
    model = StructMAR(config).eval()
    output = sample(model, QUICK, generators(), layout=some_layout(), dtype=torch.bfloat16)
    assert torch.isfinite(output.tokens).all()
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.zeros(2, 16, 8, 8)
        conditions = model.embed_conditions(2)
        encoded = model.encode(model.patchify(latents), torch.zeros(2, 3).long(), model.prepare(conditions))
        assert model.decoder_input(encoded, torch.zeros(2, 3).long(), conditions).dtype == torch.float32


def test_a_control_may_take_the_caption_away() -> None:
    """Then the full branch has the null token, and the text branch below it still has its caption."""
    model, text, layout = structured_model(), some_text(), some_layout()
    with torch.no_grad():
        branches, _ = embed_branches(model, QUICK, 2, text, layout, None)
        bare = branches.with_full(model.embed_conditions(2, None, None, layout)).conditions
        tokens, kept = reference.tensors()["train.tokens"].repeat(3, 1, 1), torch.arange(20).repeat(6, 1)
        expected = plain_predict(model, tokens, kept, bare)
        found = model.predict(tokens, kept, model.prepare(bare, torch.float32))
    assert reference.relative_error(found, expected) < 1e-5


def test_controls_with_known_tokens_see_the_whole_batch() -> None:
    """Images of unequal numbers of unknown tokens are sampled apart; each gets its own rows of the controls'."""
    model, text, layout, known = structured_model(), some_text(), some_layout(), some_known(20, 50)
    other = type(layout)(layout.boxes_xyxy.flip(0), layout.categories.flip(0), layout.valid.flip(0))
    with torch.no_grad():
        embedded = model.embed_conditions(2, None, text, other)
    expected = sample(model, QUICK, generators(), text, other, known=known).tokens
    found = sample(model, QUICK, generators(), text, layout, known=known, controls=OtherLayout(0, embedded)).tokens
    assert reference.relative_error(found, expected) < 1e-5


def test_what_does_not_go_together_is_refused() -> None:
    model, counts = structured_model(), cosine_masked_counts(NUM_TOKENS, 5)
    with pytest.raises(ValueError, match="config.order random, got order BySize"):
        sample(model, QUICK, generators(), known=some_known(1, 1), order=BySize(counts))
    with pytest.raises(ValueError, match="3 iterations of 64 tokens has 4 counts from 64 to 0, got"):
        sample(model, replace(QUICK, num_iter=3), generators(), order=BySize(counts))
    with pytest.raises(ValueError, match="between 1 and the number of tokens, 64, got 80"):
        sample(model, replace(QUICK, num_iter=80), generators(), known=some_known(0, 0))
    patched = StructMAR(replace(model.config, patch_size=2, learned_pos=False)).eval()
    with pytest.raises(ValueError, match="latents of 9 x 8 cells are no whole patches of 2 x 2"):
        patched.grid_of(torch.zeros(1, 16, 9, 8))
    with pytest.raises(ValueError, match=r"noise is for \(images, tokens\) \(2, 64\), the latents have \(2, 96\)"):
        gridded_model()(torch.zeros(2, 16, 12, 8), model.sample_training_noise(2, generator(), 0.7))
