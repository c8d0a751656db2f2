"""A causal language model of transformers in a local folder, as `save_pretrained` writes one, opened strictly: nothing
is downloaded, no code of the folder is run, and no weight is left as initialised.

It is known by an id, one sha256 over every file of the folder, which is stored with what was trained on it. The first
position of such a model gathers attention and loses its own word, so a token that means nothing stands there: BOS, or
EOS where the tokenizer has no BOS.

Left out: files whose names differ from the modules' (fused experts), which are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
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
from util.read import read_json, short_repr

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
IGNORED_ENDS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Entries that older files hold and that are computed today."""
HEADS = ("lm_head.", "embed_out.")
"""What files call the layer behind the decoder."""


@dataclass(frozen=True)
class CausalLm:
    """lm: a Hugging Face model in eval mode. tokenizer: cuts nothing by itself. id: of the folder."""

    lm: Any
    tokenizer: PreTrainedTokenizerBase
    id: str

    @property
    def first_token(self) -> int:
        """What stands before every text."""
        return first_token(self.tokenizer)

    @property
    def model_type(self) -> str:
        return str(self.lm.config.model_type)


def open_causal_lm(path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLm:
    """The whole language model, with `sdpa` attention.

    Raises FileNotFoundError or ValueError, one line naming folder or file: missing files, a config that asks for code
    of its own (auto_map), tensors that are missing, left over, misshapen or not finite, a tokenizer larger than the
    embedding or without a token to begin with.
    """
    directory = Path(path)
    require_folder(directory)
    lm = build_lm(directory, dtype, attention="sdpa")
    state = load_state(directory)
    fill_decoder(lm, state, directory)
    fill_head(lm, state, directory)
    tokenizer = open_tokenizer(directory, lm)
    first_token(tokenizer)
    return CausalLm(lm.to(device).eval(), tokenizer, folder_id(directory))


def require_folder(directory: Path) -> None:
    """Raises FileNotFoundError or ValueError for a folder that holds no language model and tokenizer, or asks for code
    of its own to be run."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no language model's folder at {directory}: save a model and its tokenizer there")
    require_no_code(directory)
    missing = [name for name in (CONFIG_FILE, TOKENIZER_FILE) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} has no {', no '.join(missing)}: save a model and its tokenizer there")


def require_no_code(directory: Path) -> None:
    """Raises ValueError for a folder that asks for code of its own to be run."""
    for name in (CONFIG_FILE, "tokenizer_config.json"):
        path = directory / name
        content = read_json(path, "settings of the language model") if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a json object, got {short_repr(str(content))}")
        if "auto_map" in content:
            raise ValueError(
                f"{path} has an auto_map ({short_repr(str(content['auto_map']))}): it asks for code of its own, and no "
                "code of a language model's folder is run"
            )


def files_of(directory: Path) -> list[Path]:
    """Every file that lies in the folder itself and is not hidden, by name."""
    return sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))


def folder_id(directory: Path) -> str:
    """One sha256 over the names and contents of the folder's files."""
    digest = hashlib.sha256()
    for path in files_of(directory):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


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


def load_state(directory: Path) -> dict[str, Tensor]:
    """All that the files of weights hold, by name."""
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        state |= load_plain(path)
    return state


def build_lm(directory: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """By config.json alone, without the weights. attention: None takes transformers' own choice."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced below, draw from the global generator
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **chosen)
    return lm


def fill_decoder(lm: PreTrainedModel, state: Mapping[str, Tensor], directory: Path) -> None:
    """All but the head, strictly: ValueError naming the folder and each tensor that is missing, left over or
    misshapen."""
    decoder: PreTrainedModel = lm.get_decoder()
    decoder.load_state_dict(text_state_dict(decoder_state(lm, decoder, state), decoder.state_dict(), directory))


def decoder_state(lm: PreTrainedModel, decoder: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the decoder alone, under its own names, of a file of the whole model or of the decoder."""
    prefix = next(name for name, module in lm.named_modules() if module is decoder)
    prefix = f"{prefix}." if prefix else ""
    is_whole = any(name.startswith(prefix) for name in state)
    kept = {name: each for name, each in state.items() if not (name.startswith(HEADS) or name.endswith(IGNORED_ENDS))}
    return {name.removeprefix(prefix) if is_whole else name: each for name, each in kept.items()}


def fill_head(lm: PreTrainedModel, state: Mapping[str, Tensor], directory: Path) -> None:
    """The head, as strictly. Where config.json ties it to the embedding, the file may leave it out. Raises ValueError
    for a model with weights that belong neither to the decoder nor to the head."""
    head, table = lm.get_output_embeddings(), lm.get_input_embeddings()
    known = {id(each) for module in (lm.get_decoder(), head) for each in module.parameters()}
    others = [name for name, each in lm.named_parameters() if id(each) not in known]
    if others:
        raise ValueError(f"{directory}: {type(lm).__name__} has {others[0]} beside decoder and head, not known here")
    given = {HEADS[0] + name.split(".", 1)[1]: each for name, each in state.items() if name.startswith(HEADS)}
    wanted = {HEADS[0] + name: each for name, each in head.state_dict().items()}
    is_tied = head.weight is table.weight
    if is_tied and not given:
        return
    loaded = text_state_dict(given, wanted, directory)
    if is_tied and not torch.equal(loaded[HEADS[0] + "weight"].to(table.weight), table.weight):
        raise ValueError(f"{directory}: {HEADS[0]}weight is not the embedding, though {CONFIG_FILE} ties the two")
    head.load_state_dict({name.removeprefix(HEADS[0]): each for name, each in loaded.items()})


def open_tokenizer(directory: Path, lm: PreTrainedModel) -> PreTrainedTokenizerBase:
    """tokenizer.json as it is. Raises ValueError, naming both numbers, for more tokens than the model embeds."""
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    tokenizer.model_max_length = int(1e9)  # captions are cut by their readers: its own warning would suggest a crash
    embedded = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > embedded:
        raise ValueError(f"the tokenizer in {directory} has {len(tokenizer)} tokens, {CONFIG_FILE} embeds {embedded}")
    return tokenizer


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """BOS, or EOS where there is none. Raises ValueError if there is neither, or if the tokenizer cannot say where its
    tokens lie."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None or not tokenizer.is_fast:
        wanted = "a BOS or EOS token" if first is None else f"a {TOKENIZER_FILE}"
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has not {wanted}, which texts begin with")
    return int(first)


def text_settings(model: PreTrainedModel) -> Any:
    """The settings of the part that reads text."""
    return model.config.get_text_config()


def require_same_base(source: str | Path, wanted: str, found: str, directory: str | Path) -> None:
    """Raises ValueError naming both ids if what `source` holds was trained on another language model."""
    if found != wanted:
        raise ValueError(f"{source} was trained on the language model {wanted}, the one in {directory} is {found}")
