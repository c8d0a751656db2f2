"""Weights of MARS for use: from a training checkpoint or an exported file, with the language model they belong to.

Both hold what trains alone (experts, tables and heads); the language model is opened from its own folder. An exported
file is a safetensors file whose metadata says `MarsIdentity`, the step, and which weights it holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.load import require_same_frozen
from models.config import EXPORT_PRECISIONS
from models.frozen.causal_lm import CausalLm, open_causal_lm
from models.frozen.codec import load_codec
from models.frozen.codes import CodeCodec
from models.mars.identity import MarsIdentity
from models.mars.model import Mars
from models.mars.stages import UPSCALE
from models.mars.words import CaptionWords
from models.semvie import VISUAL_PART
from util.checkpoint import load_plain, resolve_checkpoint, safetensors_metadata, save_safetensors_atomic
from util.names import MARS_ENTRY
from util.weights import is_finite, tensor_problem

logger = logging.getLogger(__name__)

EXPORT_FORMAT = "structmar-mars-1"
RUN_FORMAT = "structmar-mars-run-1"  # of a training checkpoint


@dataclass(frozen=True)
class MarsFile:
    """What a file says of its weights. kind: ema or raw."""

    identity: MarsIdentity
    step: int
    kind: str

    def describe(self) -> dict[str, Any]:
        """Plain values, for what is made with the weights."""
        return {**self.identity.as_dict(), "step": self.step, "weights": self.kind}


def is_mars_file(path: str | Path) -> bool:
    """Whether a checkpoint, or the last one of a folder, holds MARS; False for what cannot be read as one."""
    try:
        file = resolve_checkpoint(path)
        entries = safetensors_metadata(file) if file.suffix == ".safetensors" else _opened(file)
    except (FileNotFoundError, ValueError):
        return False
    return MARS_ENTRY in entries


def read_mars_file(path: str | Path, use_ema: bool = True) -> tuple[dict[str, Tensor], MarsFile]:
    """The tensors of all that trains, and what they were made for.

    use_ema: the averaged weights of a training checkpoint that has some; an exported file holds one set. Raises
    FileNotFoundError, or ValueError naming the file for anything else than MARS weights.
    """
    file = resolve_checkpoint(path)
    if file.suffix == ".safetensors":
        return load_plain(file), _exported(safetensors_metadata(file), file)
    loaded = load_plain(file, mmap=True)
    identity = _identity_of(loaded, file)
    for name, kind in (("model", dict), ("model_ema", dict), ("step", int)):
        if type(loaded.get(name)) is not kind:
            raise ValueError(f"{file}: {name} must be a {kind.__name__}, got {type(loaded.get(name)).__name__}")
    averaged = loaded["model_ema"] if use_ema else {}
    said = MarsFile(identity, loaded["step"], "ema" if averaged else "raw")
    return {**loaded["model"], **averaged}, said


def read_mars_identity(path: str | Path) -> MarsIdentity:
    """Without reading the weights. Raises as `read_mars_file`."""
    file = resolve_checkpoint(path)
    if file.suffix == ".safetensors":
        return _exported(safetensors_metadata(file), file).identity
    return _identity_of(_opened(file), file)


def _identity_of(loaded: Mapping[str, Any], file: Path) -> MarsIdentity:
    if MARS_ENTRY not in loaded:
        raise _no_mars(file)
    if loaded.get("format", RUN_FORMAT) != RUN_FORMAT:
        raise ValueError(f"{file} has format {loaded['format']!r}, this version reads {RUN_FORMAT!r}")
    return MarsIdentity.of(loaded[MARS_ENTRY], f"{file}: {MARS_ENTRY}")


def _opened(file: Path) -> dict[str, Any]:
    return load_plain(file, mmap=True, is_trusted=True)


def _no_mars(file: Path) -> ValueError:
    return ValueError(f"{file} does not hold MARS, a language model with visual experts: leave out --lm_path")


def _exported(metadata: Mapping[str, str], file: Path) -> MarsFile:
    if MARS_ENTRY not in metadata:
        raise _no_mars(file)
    if metadata.get("format") != EXPORT_FORMAT:
        raise ValueError(f"{file} has format {metadata.get('format')!r}, this version reads {EXPORT_FORMAT!r}")
    try:
        identity = MarsIdentity.of(json.loads(metadata[MARS_ENTRY]), f"{file}: {MARS_ENTRY}")
        return MarsFile(identity, int(metadata["step"]), metadata["weights"])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} has malformed metadata: {error!r}") from error


def export_mars(path: str | Path, output: str | Path, dtype: str = "fp32", use_ema: bool = True) -> MarsFile:
    """Writes all that trains as one safetensors file, atomically; no weight of the language model goes along.

    Raises ValueError for another ending than .safetensors, and for weights that are not finite in `dtype`.
    """
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"the exported file must end in .safetensors, got {output}")
    state, said = read_mars_file(path, use_ema)
    tensors = {}
    for name, tensor in state.items():
        if (problem := tensor_problem(name, tensor)) is not None:
            raise ValueError(f"{path}: {problem}")
        if name.startswith("lm.") and VISUAL_PART not in name:
            raise ValueError(f"{path}: {name} is of the frozen language model, a file of MARS has experts alone")
        tensors[name] = tensor.to(getattr(torch, EXPORT_PRECISIONS[dtype]))
        if not is_finite(tensors[name]):
            raise ValueError(f"{path}: {name} is not finite in {dtype}")
    metadata = {"format": EXPORT_FORMAT, MARS_ENTRY: json.dumps(said.identity.as_dict()), "step": str(said.step)}
    save_safetensors_atomic(tensors, output, metadata | {"weights": said.kind})
    return said


@dataclass(frozen=True)
class LoadedMars:
    """In evaluation mode, on its device. codec: the tokenizer of images; words: of captions."""

    model: Mars
    words: CaptionWords
    codec: CodeCodec
    said: MarsFile


def load_mars(
    path: str | Path,
    lm_path: str | Path,
    codec_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = True,
    allow_other_frozen: bool = False,
    upscales: bool = False,
) -> LoadedMars:
    """The language model of a folder with the trained experts of a file. dtype: of both. upscales: whether they are to
    make pictures larger, or to draw and describe.

    Raises FileNotFoundError or ValueError naming the file that is missing or does not fit: another language model or
    tokenizer of images than the weights were trained with (allow_other_frozen: a warning), other sizes, another stage.
    """
    state, said = read_mars_file(path, use_ema)
    identity = said.identity
    require_use(path, identity, upscales)
    codec = load_codec(codec_path, device)
    require_same_frozen("image tokenizer", codec_path, codec.id, identity.codec_id, allow_other_frozen)
    if not isinstance(codec, CodeCodec) or codec.codebook_size != identity.config.num_codes:
        found = f"{codec.codebook_size} codes" if isinstance(codec, CodeCodec) else "no codes but latents"
        raise ValueError(f"image tokenizer {codec_path} has {found}, {path} was trained on {identity.config.num_codes}")
    base = open_causal_lm(lm_path, dtype, device)
    require_same_frozen("language model", lm_path, base.id, identity.base_id, allow_other_frozen)
    model = _with_experts(base, identity, state, str(path))
    logger.info(f"{path}: {said.kind} weights of stage {identity.stage} after {said.step} steps")
    return LoadedMars(model, CaptionWords(base.tokenizer, identity.max_tokens), codec, said)


def require_use(path: str | Path, identity: MarsIdentity, upscales: bool) -> None:
    """Raises ValueError for weights that make pictures larger where others are asked for, and the other way round."""
    if identity.stage == UPSCALE and not upscales:
        raise ValueError(f"{path} is of stage {UPSCALE}, which makes pictures larger: it goes to --upscale")
    if identity.stage != UPSCALE and upscales:
        raise ValueError(f"{path} is of stage {identity.stage}, which draws: --upscale takes weights of {UPSCALE}")


def _with_experts(base: CausalLm, identity: MarsIdentity, state: dict[str, Tensor], source: str) -> Mars:
    device = base.lm.device
    model = Mars(base.lm, identity.config, torch.Generator(device).manual_seed(0))  # all that is drawn is replaced
    model.load_visual_state(state, source)
    return model.eval()
