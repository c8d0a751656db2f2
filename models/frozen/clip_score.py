"""A frozen CLIP that says how well a picture fits its caption: the cosine of both embeddings.

    pictures, prompts -> ClipScorer.clip_scores -> cosines [B]

All weights are local files, loaded strictly; nothing is downloaded.

Shape letters: B pictures, D features, T tokens, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from models.frozen.features import check_pictures, fitted_state
from models.frozen.text import ClipTextEncoder, find_files
from util.checkpoint import load_plain, sha256_file
from util.images import Picture

_CLIP_URL = "https://huggingface.co/openai/clip-vit-base-patch32"
_PREPROCESSOR = "preprocessor_config.json"


class ClipScorer:
    """A frozen CLIP. Attributes: name (of the number), id (one sha256 over all files it depends on)."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessor, name: str, files_id: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.text = ClipTextEncoder(
            model.text_model, tokenizer, model.config.text_config.max_position_embeddings, files_id
        )
        self.processor = processor
        self.name = name
        self.id = files_id

    @torch.no_grad()
    def clip_scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> Tensor:
        """cos(image embedding, text embedding) of each picture and its own prompt -> float32 [B] on the CPU.

        Hessel et al. 2021 (arXiv:2104.08718) report 2.5 max(cos, 0) of "A photo depicts " + prompt; here the cosine
        stands as it is, of the prompt as it is. Prompts beyond CLIP's positions are cut before EOS, with a warning.
        Raises ValueError for unequal numbers, an empty prompt, or something that is no picture.
        """
        check_pictures(pictures)
        if len(pictures) != len(prompts):
            raise ValueError(f"every picture needs its prompt, got {len(pictures)} pictures and {len(prompts)} prompts")
        empty = [index for index, prompt in enumerate(prompts) if not prompt.strip()]
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty: without a caption there is no CLIP score")
        if not pictures:
            return torch.zeros(0)  # [0]
        image = F.normalize(self._embed_pictures(pictures), dim=-1)  # [B, D]
        text = F.normalize(self._embed_prompts(prompts), dim=-1)  # [B, D]
        return (image * text).sum(-1).cpu()  # [B]

    def _embed_pictures(self, pictures: Sequence[Picture]) -> Tensor:
        pixels = _clip_input(self.processor, pictures).to(self.model.device)  # [B, 3, H, W]
        return self.model.get_image_features(pixel_values=pixels).pooler_output  # [B, D]

    def _embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        rows = self.text.tokenize(prompts)
        padded = self.text.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        ids, mask = padded["input_ids"], padded["attention_mask"]  # [B, T], [B, T]
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output  # [B, D]


def load_clip(path: str | Path, device: torch.device | str = "cpu") -> ClipScorer:
    """A whole `CLIPModel` in a local Hugging Face directory, strictly: config, weights, tokenizer, preprocessor_config.

    The number is named "CLIP score (<directory name>), cosine".
    Raises FileNotFoundError or ValueError, one line naming directory or file: missing files, a text tower alone,
    weights that do not fit, preprocessing to another size than the model's.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"no CLIP directory at {directory} (for example {_CLIP_URL})")
    weights, others = find_files(directory)
    _check_whole_clip(directory)
    if not (directory / _PREPROCESSOR).is_file():
        raise FileNotFoundError(f"{directory} has no {_PREPROCESSOR}, which says how CLIP wants its pictures")
    config = CLIPConfig.from_pretrained(directory, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    if len(tokenizer) > config.text_config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, config.json embeds {config.text_config.vocab_size}"
        raise ValueError(f"the tokenizer in {directory} has {sizes}")
    tokenizer.model_max_length = int(1e9)  # ClipTextEncoder.tokenize cuts, and says so
    processor = CLIPImageProcessor.from_pretrained(directory, local_files_only=True)
    _check_input_size(directory, processor, config.vision_config.image_size)
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced below, draw from the global generator
        model = CLIPModel(config)
    state = fitted_state(weights, "its config.json", load_plain(weights), model.state_dict(), (".position_ids",))
    model.load_state_dict(state, strict=True)
    digest = hashlib.sha256()
    for file in (weights, *others, directory / _PREPROCESSOR):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    name = f"CLIP score ({directory.resolve().name}), cosine"
    return ClipScorer(model.to(device), tokenizer, processor, name, digest.hexdigest())


def _check_whole_clip(directory: Path) -> None:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "clip":
        reason = "CLIP's text tower alone" if model_type == "clip_text_model" else f"model_type {model_type!r}"
        raise ValueError(f"{directory} holds {reason}; a CLIP score needs text and vision (model_type 'clip')")


def _check_input_size(directory: Path, processor: CLIPImageProcessor, side: int) -> None:
    size = tuple(_clip_input(processor, [np.zeros((2 * side, 3 * side, 3), np.uint8)]).shape[2:])
    if size != (side, side):
        made = f"{_PREPROCESSOR} makes pictures of {size[0]} x {size[1]} pixels"
        raise ValueError(f"{directory}: {made}, config.json's image_size is {side}")


def _clip_input(processor: CLIPImageProcessor, pictures: Sequence[Picture]) -> Tensor:
    images = [torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))) for picture in pictures]  # [3, H, W]
    return processor(images=images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
