"""Which text encoder a folder holds, by its config.json: a CLIP (text.py) or a causal language model (lm.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.frozen.lm import LmEncoder, require_tokens
from models.frozen.text import ClipTextEncoder, find_files
from util.read import read_json, short_repr

CaptionEncoder = ClipTextEncoder | LmEncoder
CLIP_TYPES = ("clip", "clip_text_model", None)  # CLIP's oldest files do not say


def load_text_encoder(
    directory: str | Path, device: torch.device | str = "cpu", max_tokens: int | None = None
) -> CaptionEncoder:
    """The text encoder in a local Hugging Face folder. max_tokens: of a caption; None: the encoder's own default.

    Raises FileNotFoundError and ValueError as the encoders' own `load` do, and for a model of another kind.
    """
    config = Path(directory) / "config.json"
    if not config.is_file():
        find_files(Path(directory))  # says what is missing
    content = read_json(config, "settings of the text encoder")
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind in CLIP_TYPES:
        return ClipTextEncoder.load(directory, device, max_tokens)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (isinstance(content, dict) and "auto_map" in content):
        return LmEncoder.load(directory, device, max_tokens)
    raise ValueError(f"{config} has model_type {short_repr(str(kind))}, a text encoder is a CLIP or a causal language "
                     "model")  # fmt: skip


def encoder_around(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int | None, files_id: str
) -> CaptionEncoder | None:
    """The components of a pipeline's folder as the rest of the code uses them; None if there are none."""
    if model is None or tokenizer is None:
        return None
    tokenizer.model_max_length = int(1e9)  # the encoder cuts itself
    if isinstance(model, CLIPTextModel):
        limit = int(model.config.max_position_embeddings)
        return ClipTextEncoder(model, tokenizer, max_tokens or limit, files_id)
    return LmEncoder(model, tokenizer, require_tokens(max_tokens, model, "the pipeline"), files_id)
