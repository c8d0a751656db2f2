"""Frozen networks that judge pictures: feature vectors for a Frechet distance, and CLIP's picture-caption cosine.

    pictures -> FeatureExtractor -> features [B, D] -> engine.eval.frechet.frechet_distance
    pictures, prompts -> ClipScorer.clip_scores -> cosines [B]

A distance is called FID only over the features that define it: pool3 of the Inception of 2015 (Heusel et al. 2017,
arXiv:1706.08500), in the PyTorch port that everybody uses (mseitzer/pytorch-fid), which differs from torchvision's
Inception v3 in 1008 logits, in average pooling that does not count the padding, and in max pooling in the last block.
Any other weights, and a detector's backbone, give a number under another name.

All weights are local files, loaded strictly; nothing is downloaded.

Left out: PIL's antialiased resizing (clean-fid), TensorFlow's own bilinear kernel, spatial features (sFID).

Shape letters: B pictures, C channels, D features, T tokens, H and W pixels, h and w cells of a feature map.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception as tv
from torchvision.models.detection import FasterRCNN
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from models.frozen.faster_rcnn import Detector, load_detector
from models.frozen.text import TextEncoder, find_files
from util.checkpoint import load_plain, sha256_file
from util.images import Picture, to_model_range

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIDE = 299  # pixels
INCEPTION_DIM = 2048
INCEPTION_LOGITS = 1008
FID = "FID"

_INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
_CLIP_URL = "https://huggingface.co/openai/clip-vit-base-patch32"
_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network as a function of pictures.

    name: what a Frechet distance over these features is called. id: the file's sha256. dim: D.
    extract: B >= 1 pictures -> [B, D] on any device; a picture's features do not depend on its batch mates.
    """

    name: str
    id: str
    dim: int
    extract: Callable[[Sequence[Picture]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """uint8 [H, W, 3] pictures of any sizes, all at once -> float32 [B, D] on the CPU.

        Raises ValueError for something that is no picture.
        """
        check_pictures(pictures)
        if not pictures:
            return torch.zeros(0, self.dim)  # [0, D]
        features = self.extract(pictures).float().cpu()  # [B, D]
        assert features.shape == (len(pictures), self.dim), features.shape
        return features


def check_pictures(pictures: Sequence[Picture]) -> None:
    """Raises ValueError for the first that is not a uint8 [H, W, 3] array."""
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"picture {index} must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}")


# ---- Inception


class _FidPooling:
    """A torchvision Inception block whose pooling branch averages over the pixels inside the picture alone.

    The parent's own pooling branch is computed and dropped (5 % of the network's work): no block is written out again.
    """

    branch_pool: torch.nn.Module

    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # [B, C, h, w]

    def _forward(self, x: Tensor) -> list[Tensor]:
        branches = super()._forward(x)  # type: ignore[misc]  # the block beside this class
        return [*branches[:-1], self.branch_pool(self.pool(x))]  # each [B, C_i, h, w]


class FidInceptionA(_FidPooling, tv.InceptionA):
    """35 x 35 cells."""


class FidInceptionC(_FidPooling, tv.InceptionC):
    """17 x 17 cells."""


class FidInceptionE(_FidPooling, tv.InceptionE):
    """8 x 8 cells."""


class FidInceptionLast(FidInceptionE):
    """The last block, which pools by maximum: the network of 2015 has it so."""

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)  # [B, C, h, w]


class FidInception(tv.Inception3):
    """[B, 3, 299, 299] in [-1, 1] -> 1008 logits; the parameter names are torchvision's, which the file has too."""

    def __init__(self) -> None:
        blocks = [
            tv.BasicConv2d,
            FidInceptionA,
            tv.InceptionB,
            FidInceptionC,
            tv.InceptionD,
            FidInceptionE,
            tv.InceptionAux,
        ]
        super().__init__(INCEPTION_LOGITS, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c = FidInceptionLast(INCEPTION_DIM)


def load_inception(path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The 2048 pool3 features of an FID Inception; pictures are resized to 299 x 299, bilinear without antialiasing.

    The name is FID if the file is pytorch-fid's (by its sha256), else "Frechet distance (<file name>)".
    Raises FileNotFoundError or ValueError, one line naming the file, if it does not hold exactly this network.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no Inception weights at {file} (FID's are {_INCEPTION_URL})")
    with torch.device("meta"):  # no initial values: all are replaced
        model = FidInception()
    state = fitted_state(file, "the FID Inception", load_plain(file), model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    model.fc = torch.nn.Identity()  # what it would read are the pool3 features
    model.eval().requires_grad_(False).to(device)

    def extract(pictures: Sequence[Picture]) -> Tensor:
        batch = torch.stack([_inception_input(picture, device) for picture in pictures])  # [B, 3, 299, 299]
        return model(batch)  # [B, D]

    file_id = sha256_file(file)
    name = FID if file_id == INCEPTION_SHA256 else f"Frechet distance ({file.name})"
    return FeatureExtractor(name, file_id, INCEPTION_DIM, extract)


def _inception_input(picture: Picture, device: torch.device | str) -> Tensor:
    pixels = to_model_range(picture).to(device)[None]  # [1, 3, H, W]
    side = INCEPTION_SIDE
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)[0]  # [3, 299, 299]


def fitted_state(
    source: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor], ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors of `found` under the names of `wanted`, floating-point ones as float32.

    The only differences allowed are BatchNorm's step counters, which inference does not read and older files lack,
    and names in `found` that end in one of `ignored`. Raises ValueError naming `source` and listing all others.
    """
    counters = {name for name in wanted if name.endswith(".num_batches_tracked")}
    problems = [f"lacks {name}" for name in wanted if name not in found and name not in counters]
    problems += [f"has {name} besides" for name in found if name not in wanted and not name.endswith(tuple(ignored))]
    state = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    for name, tensor in wanted.items():
        value = found.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{name} is {shape}, not {tuple(tensor.shape)}")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{name} is not finite")
        else:
            state[name] = value.float() if value.is_floating_point() else value
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit {what}: {'; '.join(problems[:3])}{more}")
    return state


# ---- a detector's backbone


def load_detector_features(path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The last feature map of a Faster R-CNN's backbone, averaged over the picture: a stand-in for Inception.

    The name is "Frechet distance (<architecture> features)": such numbers compare with one another, never with an FID.
    Pictures are resized and normalised as the detector does it. Of a pyramid, the last level with its own convolution.
    Raises FileNotFoundError or ValueError, one line naming the file, if it is no Faster R-CNN.
    """
    detector = load_detector(path, device)
    if not isinstance(detector, Detector):
        raise ValueError(f"{path} is no Faster R-CNN, it has no backbone whose features could be read")
    model = detector.model

    def extract(pictures: Sequence[Picture]) -> Tensor:
        features = torch.zeros(len(pictures), model.backbone.out_channels, device=device)  # [B, D]
        for rows in _rows_by_shape(pictures):  # of several sizes, the smaller ones would be padded
            images = [(to_model_range(pictures[row]).to(device) + 1) / 2 for row in rows]  # each [3, H, W]
            features[rows] = _backbone_means(model, images)  # [len(rows), D]
        return features

    name = f"Frechet distance ({detector.arch} features)"
    return FeatureExtractor(name, detector.id, int(model.backbone.out_channels), extract)


def _rows_by_shape(pictures: Sequence[Picture]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(row)
    return list(groups.values())


def _backbone_means(model: FasterRCNN, images: list[Tensor]) -> Tensor:
    """images: B of one size [3, H, W] in [0, 1] -> [B, D], the mean over the cells that do not lie in the padding."""
    batch, _ = model.transform(images)
    padded_height, padded_width = batch.tensors.shape[-2:]
    maps = model.backbone(batch.tensors)
    if not isinstance(maps, Tensor):
        maps = [level for name, level in maps.items() if name != "pool"][-1]  # [B, D, h, w]
    height, width = batch.image_sizes[0]
    h = math.ceil(height * maps.shape[2] / padded_height)
    w = math.ceil(width * maps.shape[3] / padded_width)
    return maps[:, :, :h, :w].mean((2, 3))  # [B, D]


# ---- CLIP


class ClipScorer:
    """A frozen CLIP. Attributes: name (of the number), id (one sha256 over all files it depends on)."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessor, name: str, files_id: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.text = TextEncoder(model.text_model, tokenizer, model.config.text_config.max_position_embeddings, files_id)
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
    tokenizer.model_max_length = int(1e9)  # TextEncoder.tokenize cuts, and says so
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
