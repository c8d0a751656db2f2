"""The frozen text encoder: the token states of a CLIP text model in a local Hugging Face directory.

    caption -> BOS w_1 ... w_n EOS -> CLIP text transformer, final norm -> states [t, C], t = n + 2

The directory may hold a `CLIPTextModel` or a whole `CLIPModel` (openai/clip-vit-base-patch32), whose image tower is
ignored by name. Nothing is ever downloaded, and no weight is left as initialised. Captions beyond the model's positions
are cut before EOS, with a warning for the first of them.

Left out: the projected EOS embedding that CLIP compares with images; causal language models (lm.py).

Shape letters: B batch, T text tokens (padded), t tokens of one caption, C text channels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from util.checkpoint import load_plain, sha256_file
from util.phrases import phrase_span
from util.read import short_repr
from util.types import TextContext
from util.weights import tensor_problem

logger = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
WHERE_TO_GET = "Get the directory from https://huggingface.co/openai/clip-vit-base-patch32"
TEXT_PREFIX = "text_model."
IGNORED_NAMES = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "embeddings.position_ids")


def find_files(directory: Path) -> tuple[Path, list[Path]]:
    """-> (the weights, the other files the encoder depends on).

    Raises FileNotFoundError naming the missing directory or file and where to get it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"text encoder directory not found: {directory}. {WHERE_TO_GET}")
    weights = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{directory} has no {' or '.join(WEIGHT_FILES)}. {WHERE_TO_GET}")
    needed = ["config.json"]
    if not (directory / "tokenizer.json").is_file():
        needed += ["vocab.json", "merges.txt"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} has no {', no '.join(missing)}. {WHERE_TO_GET}")
    names = ("config.json", *TOKENIZER_FILES)
    return weights, [directory / name for name in names if (directory / name).is_file()]


def text_state_dict(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `expected`, whether or not either side says "text_model.".

    Raises ValueError naming `source` and listing tensors missing, left over (beyond `IGNORED_NAMES`) or misshapen.
    """
    given = {key.removeprefix(TEXT_PREFIX): value for key, value in state.items()}
    wanted = {key.removeprefix(TEXT_PREFIX): key for key in expected}
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"left over {name}" for name in given if name not in wanted and not name.startswith(IGNORED_NAMES)]
    for name, key in wanted.items():
        if isinstance(given.get(name), Tensor) and given[name].shape != expected[key].shape:
            shapes = f"shape {tuple(given[name].shape)}, config.json implies {tuple(expected[key].shape)}"
            problems.append(f"{name} has {shapes}")
        elif name in given and (problem := tensor_problem(name, given[name], expected[key])) is not None:
            problems.append(problem)
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(problems[:12])}{more}")
    return {key: given[name] for name, key in wanted.items()}


class ClipTextEncoder:
    """A `TextEncoder`: captions -> token states. Frozen, in eval mode, without gradients.

    Attributes: id (one sha256 over weights, config and tokenizer files), dim (C), max_tokens (BOS and EOS included).
    """

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, max_tokens: int, files_id: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.id = files_id
        self._has_warned = False

    @classmethod
    def load(
        cls, directory: str | Path, device: torch.device | str = "cpu", max_tokens: int | None = None
    ) -> ClipTextEncoder:
        """Loads a local Hugging Face directory, strictly. max_tokens: None takes the model's own limit (CLIP's is 77).

        Raises FileNotFoundError (missing directory or file) and ValueError (weights that do not fit config.json, a
        tokenizer larger than the embedding, max_tokens out of range), each naming the file and both values.
        """
        directory = Path(directory)
        weights, others = find_files(directory)
        config = CLIPTextConfig.from_pretrained(directory, local_files_only=True)
        limit = config.max_position_embeddings
        max_tokens = limit if max_tokens is None else max_tokens
        if not 2 <= max_tokens <= limit:
            raise ValueError(
                f"--max_text_tokens must be from 2 to {limit}, the positions of {directory}, got {max_tokens}"
            )
        tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        if len(tokenizer) > config.vocab_size:
            sizes = f"{len(tokenizer)} tokens, config.json embeds {config.vocab_size}"
            raise ValueError(f"the tokenizer in {directory} has {sizes}")
        tokenizer.model_max_length = int(1e9)  # cut here, not there: its own warning would suggest a crash
        with torch.random.fork_rng(devices=[]):  # initial values, all replaced below, draw from the global generator
            model = CLIPTextModel(config)
        model.load_state_dict(text_state_dict(load_plain(weights), model.state_dict(), weights), strict=True)
        digest = hashlib.sha256()
        for path in (weights, *others):
            digest.update(f"{path.name} {sha256_file(path)}\n".encode())
        return cls(model.to(device), tokenizer, max_tokens, digest.hexdigest())

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stated_cut(self) -> int:
        """The number of tokens that what depends on cut captions names; 0: as many as there are positions."""
        return 0 if self.max_tokens == self.model.config.max_position_embeddings else self.max_tokens

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """The token ids of each caption, BOS and EOS included, at most `max_tokens`."""
        ids: list[list[int]] = self.tokenizer(list(captions), return_attention_mask=False)["input_ids"]
        too_long = [caption for caption, row in zip(captions, ids, strict=True) if len(row) > self.max_tokens]
        if too_long and not self._has_warned:
            self._has_warned = True  # a run would say it with every batch
            logger.warning("captions that exceed %d tokens are cut; %d of the first %d do, no more are named: %s",
                           self.max_tokens, len(too_long), len(captions), short_repr(too_long[0][:60]))  # fmt: skip
        return [row if len(row) <= self.max_tokens else [*row[: self.max_tokens - 1], row[-1]] for row in ids]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """-> one float32 [t, C] per caption: the states of its tokens, BOS and EOS included, padding cut off."""
        if not captions:
            return []
        rows = self.tokenize(captions)
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.eos_token_id)  # [B, T]
        mask = torch.zeros_like(ids)  # [B, T]
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)  # [t]
            mask[index, : len(row)] = 1  # [t]
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        states = output.last_hidden_state  # [B, T, C]
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
        offsets = self.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        found = [index for index, (first, last) in enumerate(offsets) if first < span[1] and last > span[0]]
        if not found or found[-1] >= self.max_tokens - 1:  # the last place is EOS's
            return None
        return range(found[0], found[-1] + 1)
