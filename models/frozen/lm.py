"""A frozen causal language model as the text encoder: the states of a caption's tokens behind the final norm.

    caption -> begin w_1 ... w_n -> decoder, final norm -> states [t, C] -> each divided by its RMS, t = n + 1

Any dense causal language model of transformers in a local folder, as `save_pretrained` writes one. Nothing is
downloaded and no code of the folder is run. The first position of such a model gathers attention and loses its own
word, so a token that means nothing stands there: BOS, or EOS where the tokenizer has no BOS. It is also all that an
empty caption has. The states are behind the final norm, since those before it are thousands of times as large in a few
channels (facebookresearch/metaquery, 2504.06256); dividing by the RMS makes them as large for every model and token.

Left out: states of middle layers; prompts around the caption; weights in less than float32; files whose names differ
from the modules' (fused experts), which are refused.

Shape letters: B batch, T text tokens (padded), t tokens of one caption, C text channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.frozen.causal_lm import (
    build_lm,
    fill_decoder,
    first_token,
    folder_id,
    load_state,
    open_tokenizer,
    require_folder,
    text_settings,
)
from util.phrases import phrase_span
from util.read import short_repr
from util.types import TextContext

logger = logging.getLogger(__name__)

MAX_TOKENS = 128  # of a caption, unless another number is asked for
RMS_EPS = 1e-12


class LmEncoder:
    """A `TextEncoder`: captions -> token states. Frozen, in eval mode, without gradients.

    The pooled state of a caption is the mean of its states, as of every other `TextContext`. The last token's alone,
    which has seen all others, is what predicts the next word; it says less of the words themselves, and phrases of
    boxes are known by their pooled state alone. A cache holds the states, and pools them to the same numbers.

    Attributes: id (one sha256 over every file of the folder), dim (C), max_tokens (the first token included).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, files_id: str
    ) -> None:
        """Raises ValueError if the tokenizer has no token to begin with, or cannot say where its tokens lie."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.id = files_id
        self.first_token = first_token(tokenizer)
        self._has_warned = False

    @classmethod
    def load(
        cls, directory: str | Path, device: torch.device | str = "cpu", max_tokens: int | None = None
    ) -> LmEncoder:
        """Loads a local Hugging Face folder, strictly. max_tokens: of a caption, None takes `MAX_TOKENS`, or the
        model's own limit where that is smaller.

        Raises FileNotFoundError (missing files) and ValueError (an auto_map, weights that do not fit config.json, a
        tokenizer larger than the embedding, max_tokens out of range), each naming the file and both values.
        """
        directory = Path(directory)
        require_folder(directory)
        lm = build_lm(directory, torch.float32)
        fill_decoder(lm, load_state(directory), directory)
        max_tokens = require_tokens(max_tokens, lm.get_decoder(), directory)
        tokenizer = open_tokenizer(directory, lm)
        return cls(lm.get_decoder().to(device), tokenizer, max_tokens, folder_id(directory))

    @property
    def dim(self) -> int:
        return int(text_settings(self.model).hidden_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stated_cut(self) -> int:
        """The number of tokens that what depends on cut captions names."""
        return self.max_tokens

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """The token ids of each caption behind the first token, at most `max_tokens` with it."""
        found: list[list[int]] = self.tokenizer(list(captions), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        rows = [[self.first_token, *row] for row in found]
        too_long = [caption for caption, row in zip(captions, rows, strict=True) if len(row) > self.max_tokens]
        if too_long and not self._has_warned:
            self._has_warned = True  # a run would say it with every batch
            logger.warning("captions that exceed %d tokens are cut; %d of the first %d do, no more are named: %s",
                           self.max_tokens, len(too_long), len(captions), short_repr(too_long[0][:60]))  # fmt: skip
        return [row[: self.max_tokens] for row in rows]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """-> one float32 [t, C] per caption, each state with an RMS of 1; padding, on the right, is cut off."""
        if not captions:
            return []
        rows = self.tokenize(captions)
        ids = torch.full((len(rows), max(map(len, rows))), self.first_token)  # [B, T]
        mask = torch.zeros_like(ids)  # [B, T]
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)  # [t]
            mask[index, : len(row)] = 1  # [t]
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        states = normalised(output.last_hidden_state)  # [B, T, C]
        return [state[: len(row)] for state, row in zip(states, rows, strict=True)]  # B of [t, C]

    def context(self, captions: Sequence[str]) -> TextContext:
        """-> the captions' states as a padded batch with their mask and masked mean. An empty list is a ValueError."""
        if not captions:
            raise ValueError("context needs at least one caption")
        return TextContext.collate(self.encode(captions))

    def phrase_tokens(self, caption: str, phrase: str, number: int = 0) -> range | None:
        """The positions, among the caption's states, of the tokens that spell a phrase (`util/phrases.py`: which
        words count, and what `number` is). None where the caption does not name it, or in the part that is cut off.
        """
        span = phrase_span(caption, phrase, number)
        if span is None:
            return None
        found = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        places = [index + 1 for index, (first, last) in enumerate(found) if first < span[1] and last > span[0]]
        if not places or places[-1] >= self.max_tokens:
            return None
        return range(places[0], places[-1] + 1)


def normalised(states: Tensor) -> Tensor:
    """[..., C] -> the same in float32, each divided by its root mean square."""
    states = states.float()  # [..., C]
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + RMS_EPS)  # [..., C]


def require_tokens(max_tokens: int | None, model: PreTrainedModel, directory: str | Path) -> int:
    """How many tokens of a caption are read. Raises ValueError naming the folder, where it is more than positions."""
    settings = text_settings(model).to_dict()
    limit = settings.get("max_position_embeddings") or settings.get("n_positions")
    if max_tokens is None:
        return MAX_TOKENS if limit is None else min(MAX_TOKENS, limit)
    if max_tokens < 2 or (limit is not None and max_tokens > limit):
        most = "" if limit is None else f" to {limit}, the positions of {directory}"
        raise ValueError(f"--max_text_tokens must be from 2{most}, got {max_tokens}")
    return max_tokens
