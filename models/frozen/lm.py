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

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from models.frozen.text import WEIGHT_FILES, text_state_dict
from util.checkpoint import load_plain, sha256_file
from util.phrases import phrase_span
from util.read import read_json, short_repr
from util.types import TextContext

logger = logging.getLogger(__name__)

MAX_TOKENS = 128  # of a caption, unless another number is asked for
IGNORED_ENDS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Entries that older files hold and that are computed today."""
HEADS = ("lm_head.", "embed_out.")
"""What files call the layer behind the decoder, which is not needed."""
RMS_EPS = 1e-12


def files_of(directory: Path) -> list[Path]:
    """Every file that lies in the folder itself and is not hidden, by name."""
    return sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))


def weight_files(directory: Path) -> list[Path]:
    """The one file of weights, or its shards. Raises FileNotFoundError naming what is missing."""
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            content = read_json(index, "list of shards")
            shards = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(each, str) for each in shards.values()):
                raise ValueError(f"{index} must hold a json object with a weight_map of file names")
            paths = [directory / Path(each).name for each in sorted(set(shards.values()))]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise FileNotFoundError(f"{directory} has no {', no '.join(missing)}, which {index.name} names")
            return paths
    raise FileNotFoundError(f"{directory} has no {' or '.join(WEIGHT_FILES)}, whole or in shards")


def require_no_code(directory: Path) -> None:
    """Raises ValueError for a folder that asks for code of its own to be run."""
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        content = read_json(path, "settings of the language model") if path.is_file() else {}
        if isinstance(content, dict) and "auto_map" in content:
            raise ValueError(
                f"{path} has an auto_map ({short_repr(str(content['auto_map']))}): it asks for code of its own, and no "
                "code of a text encoder's folder is run"
            )


def decoder_state(lm: PreTrainedModel, decoder: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the decoder alone, under its own names, of a file of the whole model or of the decoder."""
    prefix = next(name for name, module in lm.named_modules() if module is decoder)
    prefix = f"{prefix}." if prefix else ""
    is_whole = any(name.startswith(prefix) for name in state)
    kept = {name: each for name, each in state.items() if not (name.startswith(HEADS) or name.endswith(IGNORED_ENDS))}
    return {name.removeprefix(prefix) if is_whole else name: each for name, each in kept.items()}


def load_decoder(directory: Path) -> PreTrainedModel:
    """In float32, strictly: ValueError naming the folder and each tensor that is missing, left over or misshapen."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced below, draw from the global generator
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    decoder: PreTrainedModel = lm.get_decoder()
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        state |= load_plain(path)
    decoder.load_state_dict(text_state_dict(decoder_state(lm, decoder, state), decoder.state_dict(), directory))
    return decoder


def text_settings(model: PreTrainedModel) -> Any:
    """The settings of the part that reads text."""
    return model.config.get_text_config()


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
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None or not tokenizer.is_fast:
            wanted = "a BOS or EOS token" if first is None else "a tokenizer.json"
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has not {wanted}, which a text encoder needs")
        self.first_token = int(first)
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
        require_no_code(directory)
        missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} has no {', no '.join(missing)}: save a model and its tokenizer there")
        model = load_decoder(directory)
        max_tokens = require_tokens(max_tokens, model, directory)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)  # tokenizer.json as it is
        tokenizer.model_max_length = int(1e9)  # cut here, not there: its own warning would suggest a crash
        embedded = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > embedded:
            raise ValueError(f"the tokenizer in {directory} has {len(tokenizer)} tokens, config.json embeds {embedded}")
        digest = hashlib.sha256()
        for path in files_of(directory):
            digest.update(f"{path.name} {sha256_file(path)}\n".encode())
        return cls(model.to(device), tokenizer, max_tokens, digest.hexdigest())

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
