"""What stands beside the components in a pipeline's folder: the record of what they are, and how it is compared.

structmar.json: format, the entries of the weights' `Identity`, which set of weights, and contents: the sha256 of what
each component holds. The ids of an `Identity` are those of files, which a folder has other ones of; contents are the
same in whatever file they lie, so that a component that was exchanged is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.checkpoint.identity import Identity
from models.frozen.codec import Autoencoder
from models.frozen.text import IGNORED_NAMES, TEXT_PREFIX
from models.structmar import StructMAR
from util.checkpoint import sha256_tensors
from util.output import write_atomic
from util.read import read_json

RECORD_NAME = "structmar.json"
PIPELINE_FORMAT = "structmar-pipeline-1"


@dataclass(frozen=True)
class FolderRecord:
    """contents: sha256 by component. max_text_tokens: read of a caption; 0 where the encoder's kind says it."""

    identity: Identity
    contents: Mapping[str, str]
    max_text_tokens: int = 0

    @property
    def known(self) -> dict[str, Any]:
        """What a pipeline is told beside its components."""
        return {"identity": self.identity, "max_text_tokens": self.max_text_tokens or None}

    def write(self, folder: Path) -> None:
        entries = {"format": PIPELINE_FORMAT, **self.identity.to_dict(), "weights": self.identity.weights}
        if self.max_text_tokens:
            entries["max_text_tokens"] = self.max_text_tokens
        text = json.dumps(entries | {"contents": dict(self.contents)}, indent=2, ensure_ascii=False) + "\n"
        write_atomic(folder / RECORD_NAME, lambda file: file.write(text.encode("utf-8")))

    @staticmethod
    def read(folder: str | Path) -> FolderRecord:
        """Raises FileNotFoundError or ValueError naming the folder or the file and what is wrong with it."""
        path = Path(folder) / RECORD_NAME
        if not path.parent.is_dir():
            raise FileNotFoundError(f"pipeline folder {path.parent} does not exist (nothing is downloaded)")
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is no pipeline folder: it has no {RECORD_NAME}")
        entries = read_json(path, "pipeline record")
        if not isinstance(entries, dict) or not isinstance(entries.get("contents", {}), dict):
            raise ValueError(f"{path} must hold a json object with an object of contents, got {str(entries)[:60]}")
        if entries.get("format") != PIPELINE_FORMAT:
            raise ValueError(f"{path} has format {entries.get('format')!r}, this version reads {PIPELINE_FORMAT!r}")
        missing = [name for name in ("weights", "contents") if name not in entries]
        if missing:
            raise ValueError(f"{path} lacks {missing}")
        read = entries.get("max_text_tokens", 0)
        if type(read) is not int or read < 0:
            raise ValueError(f"{path}: max_text_tokens must be a whole number, not negative, got {read!r}")
        return FolderRecord(Identity.from_dict(entries, path, entries["weights"]), entries["contents"], read)

    def require_same(self, found: Mapping[str, str], folder: str | Path) -> None:
        """Raises ValueError naming the component and both values if one is not what was saved."""
        for name, saved in self.contents.items():
            if found.get(name) != saved:
                raise ValueError(
                    f"{folder}: {name} has the contents {found.get(name)}, but {saved} were saved: it was exchanged"
                )


def contents_of(
    model: StructMAR, vae: Autoencoder, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """The sha256 of each component's tensors, by the component's name; of the tokenizer, its vocabulary's."""
    states = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in text_encoder.state_dict().items()}
    text_state = {name: tensor for name, tensor in states.items() if not name.startswith(IGNORED_NAMES)}
    return {
        "transformer": sha256_tensors(model.state_dict()),
        "vae": sha256_tensors(vae.state_dict()),
        "text_encoder": sha256_tensors(text_state),
        "tokenizer": _sha256_json(tokenizer.get_vocab()),
    }


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def align_memory(*modules: nn.Module) -> None:
    """Moves weights to where PyTorch allocates. Loaded from a file they may begin anywhere in it, and a CPU's kernels
    sum in another order there: the last bits of an image would depend on the file."""
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
