"""MaskGIL's small class-conditional model of the parity data, written out, as the sampler sees a model.

256 image tokens, then the class token; the rotary table is the released one, by the place in the sequence, with a blank
row first, so that image token i turns as place i - 1. Weights come from their names (`weights_rule.py`).

Shape letters: B rows (images of all guidance branches), L image tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from models.conditioning import Conditions
from models.config import StructMARConfig
from models.context import Context
from models.heads.discrete_sampler import CodeSampler
from tests.helpers.weights_rule import deterministic_tensor

NUM_CODES, NUM_CLASSES, WIDTH, HEADS = 32, 10, 64, 4
MASK = NUM_CODES
NO_CLASS = NUM_CODES + 1 + NUM_CLASSES
LAYERS = ("layers.0", "layers.1")
LAYER_SHAPES = {
    "attention.wqkv.weight": (3 * WIDTH, WIDTH),
    "attention.wo.weight": (WIDTH, WIDTH),
    "feed_forward.w1.weight": (256, WIDTH),
    "feed_forward.w3.weight": (256, WIDTH),
    "feed_forward.w2.weight": (WIDTH, 256),
    "attention_norm.weight": (WIDTH,),
    "ffn_norm.weight": (WIDTH,),
}
SHAPES = {
    "tok_emb.weight": (NO_CLASS + 1, WIDTH),
    **{f"{layer}.{name}": shape for layer in LAYERS for name, shape in LAYER_SHAPES.items()},
    "norm.weight": (WIDTH,),
    "output.weight": (NUM_CODES + 1, WIDTH),
}


@dataclass(frozen=True)
class PlainHead:
    """Logits of the codes, or of these and the mask class, which the released code draws too."""

    weight: Tensor

    @property
    def token_dim(self) -> int:
        return 1

    @property
    def codebook_size(self) -> int:
        return len(self.weight)

    def logits(self, z: Tensor) -> Tensor:
        return linear(z, self.weight)[..., None, :]  # [..., 1, K]

    def empty_tokens(self, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
        return torch.zeros(batch_size, num_tokens, 1, device=device)  # [B, L, 1]


class PlainMaskGIL:
    """side: of the grid of tokens; 16 is the released one. with_mask_class: the head may draw the mask's class."""

    training = False

    def __init__(self, side: int = 16, with_mask_class: bool = False) -> None:
        self.weights = {name: deterministic_tensor(name, shape) for name, shape in SHAPES.items()}
        self.config = StructMARConfig(
            img_size=side, vae_stride=1, vae_embed_dim=1, encoder_depth=0, encoder_embed_dim=WIDTH,
            decoder_embed_dim=WIDTH, decoder_num_heads=HEADS, encoder_num_heads=HEADS, class_num=NUM_CLASSES,
            trunk="single", head="discrete", codebook_size=NUM_CODES,
        )  # fmt: skip
        output = self.weights["output.weight"]
        self.head = PlainHead(output if with_mask_class else output[:NUM_CODES])
        self.fake_latent = self.weights["tok_emb.weight"][NO_CLASS]
        self.rotation = torch.cat([torch.zeros(1, 8, dtype=torch.complex64), rotations(side * side)])  # [1 + L, d/2]

    def embed_conditions(
        self, batch_size: int, labels: Tensor | None, text: None, layout: None, grid: tuple[int, int]
    ) -> Conditions:
        ids = torch.full((batch_size,), NO_CLASS) if labels is None else labels + NUM_CODES + 1  # [B]
        return Conditions(embedding(ids, self.weights["tok_emb.weight"]), None, None, None, None, 0, grid)

    def prepare(self, conditions: Conditions, dtype: torch.dtype, before: Context | None = None) -> Context:
        network: Any = self
        return Context(network, conditions, (), (), None, CodeSampler(self.head, torch.device("cpu")))

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.view(-1, 1, *grid)  # [B, 1, h, w]

    def predict(self, tokens: Tensor, kept_ids: Tensor, context: Context, token_ids: Tensor) -> Tensor:
        """See `StructMAR.predict`."""
        codes = tokens[..., 0].long()  # [B, L]
        known = torch.zeros_like(codes, dtype=torch.bool).scatter(1, kept_ids, True)  # [B, L]
        x = self.run(torch.where(known, codes, MASK), context.conditions.base)  # [B, L, D]
        return x.gather(1, token_ids[..., None].expand(-1, -1, x.shape[2]))  # [B, p, D]

    def run(self, codes: Tensor, base: Tensor) -> Tensor:
        """codes: [B, L], hidden ones as MASK; base: [B, D], the class token; gives [B, L, D]."""
        w = self.weights
        x = torch.cat([embedding(codes, w["tok_emb.weight"]), base[:, None]], dim=1)  # [B, L + 1, D]
        for layer in LAYERS:
            x = x + self._attention(rms_norm(x, (WIDTH,), w[f"{layer}.attention_norm.weight"], 1e-5), layer)
            h = rms_norm(x, (WIDTH,), w[f"{layer}.ffn_norm.weight"], 1e-5)
            gate, up = (linear(h, w[f"{layer}.feed_forward.{name}.weight"]) for name in ("w1", "w3"))
            x = x + linear(silu(gate) * up, w[f"{layer}.feed_forward.w2.weight"])
        return rms_norm(x, (WIDTH,), w["norm.weight"], 1e-5)[:, :-1]  # [B, L, D]

    def _attention(self, x: Tensor, layer: str) -> Tensor:
        qkv = linear(x, self.weights[f"{layer}.attention.wqkv.weight"])  # [B, L + 1, 3 D]
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # [B, H, L + 1, d]
        mixed = scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)  # [B, H, L + 1, d]
        return linear(mixed.transpose(1, 2).flatten(2), self.weights[f"{layer}.attention.wo.weight"])

    def _rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # [B, H, L + 1, d/2]
        return torch.view_as_real(pairs * self.rotation).flatten(-2)  # [B, H, L + 1, d]


def rotations(num_tokens: int, width: int = 16) -> Tensor:
    """By the place in the sequence: [L, d/2] complex."""
    frequencies = 10000.0 ** -(torch.arange(0, width, 2).float() / width)  # [d/2]
    angles = torch.outer(torch.arange(num_tokens).float(), frequencies)  # [L, d/2]
    return torch.polar(torch.ones_like(angles), angles)
