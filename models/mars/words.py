"""Captions as MARS reads and writes them: ids of the frozen language model's words.

    to draw        BOS w_1 ... w_n         the first token alone where there is no caption
    to describe    w_1 ... w_n EOS         without EOS where the caption was cut

BOS is the tokenizer's first token, see `models/frozen/causal_lm.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from models.frozen.causal_lm import first_token
from util.read import short_repr

logger = logging.getLogger(__name__)

MAX_TOKENS = 128  # of a caption with BOS, unless another number is asked for


class CaptionWords:
    """Captions <-> ids. max_tokens: of a caption, BOS included; longer ones are cut, with a warning for the first.

    Raises ValueError for a tokenizer without EOS or without a token to begin with, and for max_tokens below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, BOS and a word, got {max_tokens}")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no EOS token, with which captions end")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.first_token = first_token(tokenizer)
        self.end_token = int(tokenizer.eos_token_id)
        self._has_warned = False

    @property
    def opening(self) -> list[int]:
        """What stands before an image that is described, and all there is of no caption."""
        return [self.first_token]

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Of the words alone, at most `max_tokens` - 1 a caption."""
        return self.cut(captions)[0]

    def answers(self, captions: Sequence[str]) -> list[list[int]]:
        """What pictures are told by: `ids` and EOS, which a caption that was cut has not, as it does not end there."""
        rows, is_whole = self.cut(captions)
        return [[*row, *[self.end_token] * whole] for row, whole in zip(rows, is_whole, strict=True)]

    def cut(self, captions: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """(`ids`, for each caption whether these are all of it)."""
        if not captions:
            return [], []
        encoded = self.tokenizer(list(captions), add_special_tokens=False, return_attention_mask=False)
        rows: list[list[int]] = encoded["input_ids"]
        room = self.max_tokens - 1
        too_long = [caption for caption, row in zip(captions, rows, strict=True) if len(row) > room]
        if too_long and not self._has_warned:
            self._has_warned = True  # a run would say it with every batch
            logger.warning("captions that exceed %d tokens are cut, no more are named: %s",
                           self.max_tokens, short_repr(too_long[0][:60]))  # fmt: skip
        return [row[:room] for row in rows], [len(row) <= room for row in rows]

    def prompts(self, captions: Sequence[str]) -> list[list[int]]:
        """What images are drawn from."""
        return [[self.first_token, *row] for row in self.ids(captions)]

    def text(self, ids: Sequence[int]) -> str:
        """Ids as words, without BOS and EOS."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
