"""Visual experts in a frozen causal language model (SemVIE of MARS, arXiv:2407.07614): two sets of weights, one
attention.

    text x -> frozen q, k, v, o, MLP;   visual x -> their trainable copies;   both -> one attention over all positions

Every linear layer of a decoder layer and its MLP as a whole, on request its norms too, become a `Routed`: the frozen
original and a copy that trains. A pass is of text, of visual positions, or of both, and says so by the argument `route`
of the decoder, which hands it on to every layer. Without one, a pass is of text and computes what the language model
computes, bit by bit.

The route travels as an argument of the layers' `forward`, and not by a hook or a context: gradient checkpointing runs
`forward` again, without hooks, long after the next pass has begun.

Left out: learned routers, experts of the final norm and of the text tables, layers whose weights are no `nn.Linear`.

Shape letters: B batch, T positions, D width, n rows of text, m visual rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from util.weights import tensor_problem

VISUAL_PART = ".visual."
"""In the name of every parameter of an expert, and of no other parameter of the language model."""


class Modality(Enum):
    """Which weights a position goes through."""

    TEXT = "text"
    VISUAL = "visual"


TEXT, VISUAL = Modality.TEXT, Modality.VISUAL


@dataclass(frozen=True)
class MixedRoute:
    """Of a pass over both. text_rows: [n], visual_rows: [m], rows of [B * T] in rising order; inverse: [B * T], where
    each row lies in the two, one after the other."""

    text_rows: Tensor
    visual_rows: Tensor
    inverse: Tensor


Route: TypeAlias = Modality | MixedRoute


def mixed_route(
    batch_size: int, segments: Sequence[tuple[Modality, int]], device: torch.device | str
) -> Modality | MixedRoute:
    """The route of sequences that all have the same segments, (modality, number of positions) each, in order. Of one
    modality alone, that modality."""
    modalities = {modality for modality, length in segments if length}
    if len(modalities) < 2:
        return next(iter(modalities), TEXT)
    is_visual = torch.tensor([modality is VISUAL for modality, length in segments for _ in range(length)])  # [T]
    rows = torch.arange(batch_size * len(is_visual)).view(batch_size, -1)  # [B, T]
    text_rows, visual_rows = rows[:, ~is_visual].flatten(), rows[:, is_visual].flatten()  # [n], [m]
    inverse = torch.cat([text_rows, visual_rows]).argsort()  # [B * T]
    return MixedRoute(text_rows.to(device), visual_rows.to(device), inverse.to(device))


class Routed(nn.Module):
    """A module and its copy. text: the frozen original; visual: the expert, which trains. route: of the pass under way,
    set by the layer."""

    route: Route

    def __init__(self, text: nn.Module, dtype: torch.dtype | None = None) -> None:
        """dtype: of the expert; None keeps the original's."""
        super().__init__()
        self.text = text.requires_grad_(False)
        self.visual = copy.deepcopy(text).to(dtype=dtype).requires_grad_(True)
        self.route = TEXT

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], or both [B * T, D]."""
        if self.route is TEXT:
            return self.text(x)
        if self.route is VISUAL:
            return self._through_expert(x)
        assert isinstance(self.route, MixedRoute)
        rows = x.flatten(0, -2)  # [B * T, D]
        text = self.text(rows[self.route.text_rows])  # [n, ...]
        visual = self._through_expert(rows[self.route.visual_rows])  # [m, ...]
        return torch.cat([text, visual])[self.route.inverse].unflatten(0, x.shape[:-1])  # [B, T, D]

    def _through_expert(self, x: Tensor) -> Tensor:
        """In the expert's dtype, where that is another one than the language model's."""
        dtype = next(self.visual.parameters()).dtype
        return self.visual(x) if x.dtype == dtype else self.visual(x.to(dtype)).to(x.dtype)  # [..., ...]


@cache
def routed_layer_class(layer_class: Any) -> Any:
    """The decoder layer's class with the keyword `route`, by default `TEXT`, for the `Routed` modules in it. A subclass
    takes the class's place in layers that are there, as in PyTorch's FSDP: names and weights stay."""

    class RoutedLayer(layer_class):
        def forward(self, hidden_states: Tensor, *args: Any, route: Route = TEXT, **kwargs: Any) -> Any:
            for module in self.modules():
                if isinstance(module, Routed):
                    module.route = route
            return super().forward(hidden_states, *args, **kwargs)

    RoutedLayer.__name__ = RoutedLayer.__qualname__ = f"Routed{layer_class.__name__}"
    return RoutedLayer


def add_visual_experts(lm: Any, dtype: torch.dtype | None = None, copied_norms: bool = False) -> None:
    """Freezes a Hugging Face causal language model, switches its dropout off, and gives each of its decoder layers
    visual experts, which start as copies.

    dtype: of the experts; None takes the language model's. copied_norms: the norms around attention and MLP have
    experts as well; those of queries and keys stay shared. Afterwards `lm.get_decoder()(..., route=)` takes a `Route`.
    Raises ValueError for a language model that `require_language_model` refuses, before anything is changed; and for
    one whose decoder does not hand the route on to its layers.
    """
    require_language_model(lm)
    lm.requires_grad_(False)
    switch_off_dropout(lm)
    for layer in decoder_layers(lm):
        norms = _norms_of(layer) if copied_norms else []
        for parent, name, child in [*_to_route(layer), *norms]:
            setattr(parent, name, Routed(child, dtype))
        layer_class: Any = type(layer)
        layer.__class__ = routed_layer_class(layer_class)
    _require_routes_arrive(lm)


@torch.no_grad()
def _require_routes_arrive(lm: Any) -> None:
    """A decoder that swallowed the route would draw with the frozen weights, without a word."""
    weight = lm.get_input_embeddings().weight
    one = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)  # [1, 1, D]
    if weight.is_meta:
        return
    lm.get_decoder()(inputs_embeds=one, route=VISUAL, use_cache=False)
    for name, module in lm.named_modules():
        if isinstance(module, Routed):
            if module.route is not VISUAL:
                raise ValueError(f"the decoder of {type(lm).__name__} does not hand the route on to {name}")
            module.route = TEXT


def decoder_layers(lm: Any) -> Iterable[nn.Module]:
    """The decoder's layers, the first one first."""
    return lm.get_decoder().layers


def _to_route(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of what becomes a `Routed`: the MLP as a whole, and every other linear layer."""
    found = []
    for parent_name, parent in layer.named_modules():
        if parent_name.split(".")[0] == "mlp":
            continue
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) or (parent is layer and name == "mlp"):
                found.append((parent, name, child))
    return found


def _norms_of(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The layer's own modules with weights of one dimension alone."""
    children = [(name, child, [each.dim() for each in child.parameters()]) for name, child in layer.named_children()]
    return [(layer, name, child) for name, child, sizes in children if set(sizes) == {1}]


def require_language_model(lm: Any) -> None:
    """Raises ValueError, one line naming what is wrong: code from elsewhere than transformers, an attention that adds
    boolean masks to its logits or ignores them (all but sdpa), attention in chunks, experts that are there already, or
    a layer with a weight that no `Routed` would hold."""
    auto_map = lm.config.to_dict().get("auto_map")
    if not type(lm).__module__.startswith("transformers.") or auto_map is not None:
        raise ValueError(
            f"{type(lm).__name__} of {type(lm).__module__} is code from elsewhere (auto_map {auto_map}), visual "
            "experts need a class of transformers"
        )
    config = lm.get_decoder().config
    attention = config._attn_implementation
    if attention != "sdpa":
        raise ValueError(f"attention {attention!r} does not take boolean masks, load the language model with 'sdpa'")
    _require_known_layer_types(config)
    if any(isinstance(module, Routed) for module in lm.modules()):
        raise ValueError(f"{type(lm).__name__} has visual experts already")
    if "layers" not in dict(lm.get_decoder().named_children()):
        raise ValueError(f"the decoder of {type(lm).__name__} has no list of modules called layers")
    for index, layer in enumerate(decoder_layers(lm)):
        _require_all_routed(layer, index)


def _require_known_layer_types(config: Any) -> None:
    types = set(config.to_dict().get("layer_types") or ())
    unknown = sorted(types - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layers of {unknown[0]!r} are not known, full_attention and sliding_attention are")


def _require_all_routed(layer: nn.Module, index: int) -> None:
    """The law by which the experts are whole: a weight of more than one dimension belongs to an `nn.Linear` in a
    `Routed`. Weights of norms have one, and stay shared."""
    routed = {id(module) for _, _, child in _to_route(layer) for module in child.modules()}
    for module_name, module in layer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_whole = isinstance(module, nn.Linear) and id(module) in routed
            if parameter.dim() > 1 and not is_whole:
                raise ValueError(
                    f"{module_name}.{name} of layer {index} is {tuple(parameter.shape)} of a {type(module).__name__}, "
                    "visual experts know nn.Linear only"
                )


def switch_off_dropout(lm: nn.Module) -> None:
    """Sets it to 0 everywhere: gradient checkpointing needs `train()`, a frozen model no dropout. A rate is the p of a
    dropout module, or any number that a module or its configuration has under a name with "drop" (`dropout`,
    `layerdrop`, `resid_pdrop`)."""
    for module in lm.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, vars(module).get("config")):
            for name, value in dict(vars(holder) if holder is not None else {}).items():
                if "drop" in name and type(value) is float:
                    setattr(holder, name, 0.0)


def require_room(decoder: Any, length: int) -> None:
    """Raises ValueError if so many positions are more than a decoder is made for, or than some layer of it sees."""
    window, most = sliding_window(decoder), decoder.config.to_dict().get("max_position_embeddings")
    if window is not None and length >= window:
        raise ValueError(f"{length} positions do not fit into the sliding window of {window} that layers look at")
    if most is not None and length > most:
        raise ValueError(f"{length} positions are more than the {most} that the language model is made for")


def sliding_window(decoder: Any) -> int | None:
    """How many positions the layers of a decoder with a window look at; None: all layers look at everything."""
    config = decoder.config.to_dict()
    types = config.get("layer_types")
    if types is not None and "sliding_attention" not in types:
        return None
    return config.get("sliding_window")


def visual_state(model: nn.Module, lm_prefix: str) -> dict[str, Tensor]:
    """The state of all that trains: the experts, and whatever of the model lies outside its language model.

    lm_prefix: of the language model's names, "lm.". The tensors are the model's own, not copies.
    """
    state = model.state_dict()
    return {name: value for name, value in state.items() if VISUAL_PART in name or not name.startswith(lm_prefix)}


def load_visual_state(model: nn.Module, lm_prefix: str, state: Mapping[str, Any], source: str) -> None:
    """Puts what `visual_state` gave into a model of the same sizes. Raises ValueError naming `source` and the first
    tensors that are missing, left over, of other shapes or not finite; then nothing is loaded."""
    wanted = visual_state(model, lm_prefix)
    problems = [f"lacks {name}" for name in wanted if name not in state]
    for name, value in state.items():
        if name not in wanted:
            problems.append(f"has {name} besides")
        elif isinstance(value, Tensor) and value.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        elif (problem := tensor_problem(name, value, wanted[name])) is not None:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(dict(state), strict=False)  # the frozen weights are not in it, all others are
