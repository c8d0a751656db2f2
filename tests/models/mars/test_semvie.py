"""The language model stays what it is, bit by bit, whatever its family and whatever its experts learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from models.mars.losses import MarsObjective, Pairs
from models.mars.model import Mars, MarsConfig
from models.mars.passes import Segment, read_mixed
from models.mars.sampling import DrawOptions, draw_images
from models.semvie import TEXT, VISUAL, VISUAL_PART, Routed, add_visual_experts, mixed_route, require_language_model
from tests.helpers.language_models import FAMILIES, GRID, NUM_CODES, SIZES, VOCABULARY, tiny_mars
from tests.helpers.mars_pairs import pairs

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@torch.no_grad()
def logits_of(lm: Any) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    return lm(input_ids=ids).logits


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_computed_as_before_after_wrapping_and_after_training(family: str, dtype: torch.dtype) -> None:
    lm = FAMILIES[family](dtype=dtype)
    before = logits_of(lm)
    model = Mars(lm, MarsConfig(NUM_CODES, GRID), torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(lm), before)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if name not in model.visual_state()}
    weights = train(model, pairs(), steps=5)
    assert torch.equal(logits_of(lm.eval()), before)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert all(not torch.equal(state[name], value) for name, value in weights.items())


def train(model: Mars, some: Pairs, steps: int) -> dict[str, Tensor]:
    """Steps of drawing, describing and choice. Returns what trains, as it was before them."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    before = {name: each.detach().clone() for name, each in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        MarsObjective(model)(some, caption_weight=1, choice_weight=1).total.backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in trained.values())
        assert all(each.grad is None for each in model.parameters() if not each.requires_grad)
        optimizer.step()
    assert all(each.grad is not None and each.grad.any() for each in trained.values())  # the head began at zero
    return before


@pytest.mark.parametrize("is_autocast", [False, True])
def test_experts_can_be_float32_beside_bfloat16(is_autocast: bool) -> None:
    lm = FAMILIES["gemma3"](dtype=torch.bfloat16)
    before = logits_of(lm)
    config, generator = MarsConfig(NUM_CODES, GRID), torch.Generator().manual_seed(0)
    model = Mars(lm, config, generator, expert_dtype=torch.float32)
    assert {each.dtype for each in model.visual_state().values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        train(model, pairs(), steps=2)
        codes = draw_images(model.eval(), [[1, 4]], [1], [generator], DrawOptions())
    assert codes.shape == (1, *GRID) and torch.equal(logits_of(lm), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_experts_compute_what_the_language_model_does(family: str) -> None:
    lm = FAMILIES[family]()
    inputs = torch.randn(2, 9, 16)
    with torch.no_grad():
        wanted = lm.get_decoder()(inputs_embeds=inputs).last_hidden_state
        add_visual_experts(lm)
        for route in (VISUAL, mixed_route(2, [(TEXT, 4), (VISUAL, 3), (TEXT, 2)], "cpu")):
            found = lm.get_decoder()(inputs_embeds=inputs, route=route).last_hidden_state
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_can_have_experts_too(family: str) -> None:
    lm = FAMILIES[family]()
    before = logits_of(lm)
    model = Mars(lm, MarsConfig(NUM_CODES, GRID, copied_norms=True), torch.Generator().manual_seed(0))
    trains = model.trainable_names()
    assert sum("norm.visual." in name and ".0." in name for name in trains) >= 2
    assert not [name for name in trains if "q_norm" in name or "k_norm" in name]
    train(model, pairs(), steps=2)
    assert torch.equal(logits_of(lm.eval()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_goes_through_one_expert(family: str) -> None:
    lm = FAMILIES[family]()
    add_visual_experts(lm)
    rows: dict[str, set[int]] = {"text": set(), "visual": set()}

    def note(name: str) -> Any:
        return lambda module, inputs, output: rows[name].add(len(inputs[0]))

    for module in lm.modules():
        if isinstance(module, Routed):
            module.text.register_forward_hook(note("text"))
            module.visual.register_forward_hook(note("visual"))
    text, image = torch.randn(3, 4, 16), torch.randn(3, 9, 16)
    read_mixed(lm.get_decoder(), [Segment(text, TEXT), Segment(image, VISUAL)])
    assert rows == {"text": {3 * 4}, "visual": {3 * 9}}


def test_routes_of_segments() -> None:
    route = mixed_route(2, [(TEXT, 1), (VISUAL, 2)], "cpu")
    assert not isinstance(route, type(TEXT))
    assert route.text_rows.tolist() == [0, 3] and route.visual_rows.tolist() == [1, 2, 4, 5]
    assert torch.cat([route.text_rows, route.visual_rows])[route.inverse].tolist() == [0, 1, 2, 3, 4, 5]
    assert mixed_route(2, [(VISUAL, 2), (TEXT, 0), (VISUAL, 1)], "cpu") is VISUAL
    assert mixed_route(2, [], "cpu") is TEXT


def test_what_trains_is_visual() -> None:
    model = tiny_mars()
    trains = model.trainable_names()
    layer = [f"lm.model.layers.0.{part}" for part in ("self_attn", "mlp")]
    assert [name for name in trains if name.startswith("lm.model.layers.0.")] == [
        *(f"{layer[0]}.{name}_proj.visual.{kind}" for name in "qkv" for kind in ("weight", "bias")),
        f"{layer[0]}.o_proj.visual.weight",
        *(f"{layer[1]}.visual.{name}_proj.weight" for name in ("gate", "up", "down")),
    ]
    assert set(trains) == set(model.visual_state())
    assert [name for name in trains if VISUAL_PART not in name] == ["visual_embed.weight", "visual_head.weight"]
    groups = [module for group in model.fsdp_units() for module in group]
    grouped = {id(each) for module in groups for each in module.parameters()}
    outside = [name for name, each in model.named_parameters() if id(each) not in grouped]
    assert all("norm" in name or "embed" in name or "head" in name for name in outside)


def test_the_paper_sizes() -> None:
    """7 billion frozen, nearly as many that train: 14 in all."""
    own = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False}
    with torch.device("meta"):
        lm = FAMILIES["qwen2"](**own, **heads)
        model = Mars(lm, MarsConfig(8192, (16, 16)), torch.Generator("cpu"))
    counts = {True: 0, False: 0}
    for each in model.parameters():
        counts[each.requires_grad] += each.numel()
    tables = model.visual_embed.weight.numel() + model.visual_head.weight.numel()
    assert (counts[False], counts[True] - tables, tables) == (7_721_324_544, 6_476_398_592, 67_121_152)


def test_the_state_of_what_trains_makes_the_model_again() -> None:
    model = tiny_mars(seed=1)
    torch.manual_seed(0)  # the same language model, as in a fixed test
    again = tiny_mars(seed=2)
    again.load_visual_state({name: value.clone() for name, value in model.visual_state().items()}, "a file")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual_head.weight"), "a file does not fit the model: lacks visual_head.weight"),
        (lambda state: state.update({"lm.x": torch.zeros(1)}), "a file does not fit the model: has lm.x besides"),
        (lambda state: state.update({"visual_head.weight": torch.zeros(9, 15)}), r"is \(9, 15\), not \(9, 16\)"),
        (lambda state: state.update({"visual_head.weight": torch.full((9, 16), torch.nan)}), "is not finite"),
    ],
)
def test_another_state_is_refused(change: Any, message: str) -> None:
    model = tiny_mars()
    state = {name: value.clone() for name, value in model.visual_state().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_visual_state(state, "a file")


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_dropout_is_off(family: str) -> None:
    """Whatever the language model calls its rates, and wherever it keeps them."""
    model = tiny_mars(family).train()
    with torch.no_grad():
        texts = [model.lm(input_ids=torch.arange(12)[None]).logits for _ in range(2)]
        assert torch.equal(*texts)
        first, again = (MarsObjective(model)(pairs()).total for _ in range(2))
    assert torch.equal(first, again)


def test_a_decoder_that_keeps_the_route_to_itself_is_refused() -> None:
    lm = FAMILIES["llama"]()
    inner = lm.model.forward
    lm.model.forward = lambda *args, route=TEXT, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="does not hand the route on to model.layers.0.self_attn.q_proj"):
        add_visual_experts(lm)


class ForeignForCausalLM(nn.Module):
    """A class of a module that is not transformers'."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config


def with_auto_map() -> Any:
    lm = FAMILIES["llama"]()
    lm.config.auto_map = {"AutoModelForCausalLM": "modeling.X"}
    return lm


def wrapped_twice() -> Any:
    lm = FAMILIES["llama"]()
    add_visual_experts(lm)
    return lm


def gpt2() -> Any:
    own = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**own, attn_implementation="sdpa"))


def with_conv1d() -> Any:
    lm = FAMILIES["llama"]()
    lm.model.layers[1].self_attn.o_proj = Conv1D(16, 16)
    return lm


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 2}, attn_implementation="sdpa"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FAMILIES["llama"](attention="eager"), "'eager' does not take boolean masks"),
        (with_auto_map, "code from elsewhere .auto_map {'AutoModelForCausalLM': 'modeling.X'}"),
        (lambda: ForeignForCausalLM(PretrainedConfig()), "ForeignForCausalLM of tests.models.mars.test_semvie is code"),
        (wrapped_twice, "has visual experts already"),
        (gpt2, "the decoder of GPT2LMHeadModel has no list of modules called layers"),
        (with_conv1d, r"self_attn.o_proj.weight of layer 1 is \(16, 16\) of a Conv1D, visual experts know nn.Linear"),
        (mixtral, r"of layer 0 is \(.*\) of a Mixtral"),
    ],
)
def test_what_cannot_have_experts_is_refused(build: Any, message: str) -> None:
    lm = build()
    before = [name for name, _ in lm.named_parameters()]
    with pytest.raises(ValueError, match=message):
        require_language_model(lm)
    with pytest.raises(ValueError, match=message):
        add_visual_experts(lm)
    assert [name for name, _ in lm.named_parameters()] == before
