"""A causal language model in a local Hugging Face directory, opened strictly: nothing is downloaded, no code is run
that comes with the weights, and no weight is left as initialised.

It is known by an id, one sha256 over its weights, its config and its tokenizer's files, which is stored with what was
trained on it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from util.checkpoint import sha256_file

CONFIG_FILE = "config.json"
WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_KINDS_OF_PROBLEM = ("missing_keys", "unexpected_keys", "mismatched_keys")


def open_causal_lm(path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Any, str]:
    """(the language model with `sdpa` attention in eval mode, its id).

    Raises FileNotFoundError or ValueError, one line naming directory or file: missing files, a config that asks for
    code from elsewhere (auto_map), weights that do not fit it.
    """
    directory = Path(path)
    files = causal_lm_files(directory)
    config = _read_json(directory / CONFIG_FILE)
    if "auto_map" in config:
        raise ValueError(
            f"{directory / CONFIG_FILE} asks for code from elsewhere, which never runs (auto_map {config['auto_map']})"
        )
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced, draw from the global generator
        lm, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with the others
            output_loading_info=True,
        )
    for kind in _KINDS_OF_PROBLEM:
        if report[kind]:
            raise ValueError(f"the weights in {directory} do not fit {CONFIG_FILE}: {kind} {sorted(report[kind])[:3]}")
    return lm.to(device).eval(), files_id(files)


def causal_lm_files(directory: Path) -> list[Path]:
    """All files of the directory that say what the language model is: config, weights, and those of the tokenizer that
    are there. Raises FileNotFoundError naming the directory or the file that is missing."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no language model's directory at {directory}")
    index = directory / INDEX_FILE
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WHOLE_FILE]
    missing = [name for name in (CONFIG_FILE, *names) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} has no {missing[0]}")
    tokenizer = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return [directory / name for name in (CONFIG_FILE, *names, *tokenizer)]


def files_id(files: list[Path]) -> str:
    """One sha256 over the files' names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def require_same_base(source: str | Path, wanted: str, found: str, directory: str | Path) -> None:
    """Raises ValueError naming both ids if what `source` holds was trained on another language model."""
    if found != wanted:
        raise ValueError(f"{source} was trained on the language model {wanted}, the one in {directory} is {found}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is no JSON object")
    return value
