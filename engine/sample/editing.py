"""Pictures of which a part stays: in- and outpainting, and the tokens that a picture or a file of codes begins with.

The hole is filled with the mean colour of what stays, and the picture is encoded. A token stays known unless the hole,
grown by one token's cell on all sides, touches its cell: what is encoded near the hole has seen the filling. The others
are drawn under the new caption and boxes. At the end the pixels outside the hole are put back as they were.

Shape letters: n images, L tokens (what is hidden and drawn on its own), C token channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.scenes import Scene
from engine.sample.generate import ImageConditions, grid_of_scenes
from models.config import StructMARConfig
from models.frozen.base import ImageCodec
from models.sampling.sampler import KnownTokens
from models.structmar import StructMAR
from util.buckets import size_name
from util.images import Picture, load_image, to_model_range
from util.read import short_path

MASK_LEVEL = 128  # a mask's pixels from this grey level on are the hole


@dataclass(frozen=True)
class Edit:
    """picture: uint8 [H, W, 3] RGB. hole: bool [H, W], True where it is drawn anew. Raises ValueError for other sizes,
    and for a hole that is empty or leaves nothing."""

    picture: Picture
    hole: np.ndarray

    def __post_init__(self) -> None:
        if self.hole.shape != self.picture.shape[:2]:
            raise ValueError(f"the mask is {_size(self.hole)} px, but the image is {_size(self.picture)} px")
        if not self.hole.any():
            raise ValueError("the mask has no hole: there is nothing to draw")
        if self.hole.all():
            raise ValueError("the mask leaves nothing of the image: draw it without an image")

    def filled(self) -> Tensor:
        """The picture with the mean colour of what stays in the hole: float32 [3, H, W] in [-1, 1]."""
        pixels, stays = to_model_range(self.picture), torch.from_numpy(~self.hole)  # [3, H, W], [H, W]
        mean = pixels[:, stays].mean(1)  # [3]
        return torch.where(stays, pixels, mean[:, None, None])  # [3, H, W]

    def put_back(self, pixels: Tensor) -> Tensor:
        """Drawn pixels [n, 3, H, W] in [-1, 1] with those outside the hole as they were."""
        own = to_model_range(self.picture).to(pixels)  # [3, H, W]
        return torch.where(torch.from_numpy(self.hole).to(pixels.device), pixels, own)  # [n, 3, H, W]


@dataclass(frozen=True)
class Start:
    """What all images of a run start from. known: tokens of one image, [1, L, C]. grid: (rows, columns) of the trunk's
    tokens. edit: whose pixels are put back, None: no one's."""

    known: KnownTokens
    grid: tuple[int, int]
    edit: Edit | None = None

    def finish(self, pixels: Tensor) -> Tensor:
        """What is shown of drawn pixels [n, 3, H, W]."""
        return pixels if self.edit is None else self.edit.put_back(pixels)


def hole_of_boxes(boxes: Sequence[float], size: tuple[int, int], is_kept: bool) -> np.ndarray:
    """The inside of boxes, or what is outside of all: bool [H, W]. size: (H, W).

    boxes: x0, y0, x1, y1 of each in turn, as fractions of the picture. Raises ValueError naming a box without a pixel.
    """
    if len(boxes) % 4:
        raise ValueError(f"boxes are four numbers each, x0 y0 x1 y1, got {len(boxes)} numbers")
    height, width = size
    inside = np.zeros(size, dtype=bool)
    for start in range(0, len(boxes), 4):
        x0, y0, x1, y1 = boxes[start : start + 4]
        left, top, right, bottom = (round(end) for end in (x0 * width, y0 * height, x1 * width, y1 * height))
        if not (left < right and top < bottom):
            raise ValueError(f"box {x0:g} {y0:g} {x1:g} {y1:g} has no pixel in an image of {width}x{height} px")
        inside[top:bottom, left:right] = True
    return ~inside if is_kept else inside


def hole_of_mask(mask: Picture) -> np.ndarray:
    """bool [H, W]: the light pixels of a picture [H, W, 3]."""
    return mask.mean(axis=2) >= MASK_LEVEL


def read_edit(image: str, mask: str, keep_boxes: Sequence[float], edit_boxes: Sequence[float]) -> Edit:
    """From files, or boxes instead of a mask; "" and () stand for what is not given. Raises FileNotFoundError or
    ValueError naming the file and what is wrong."""
    picture = np.asarray(load_image(image))
    if mask:
        hole = hole_of_mask(np.asarray(load_image(mask)))
    else:
        hole = hole_of_boxes(keep_boxes or edit_boxes, picture.shape[:2], is_kept=bool(keep_boxes))
    try:
        return Edit(picture, hole)
    except ValueError as error:
        raise ValueError(f"{short_path(image)}, {short_path(mask) if mask else 'its boxes'}: {error}") from error


def read_edit_arguments(image: Any, mask: Any) -> Edit | None:
    """Of a pipeline's call: pictures of PIL, or arrays. None without both. Raises ValueError for one without the other,
    and for arrays of other kinds."""
    if image is None and mask is None:
        return None
    if image is None or mask is None:
        raise ValueError(f"image and mask belong together, got only {'mask' if image is None else 'image'}")
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    hole = np.asarray(mask.convert("RGB") if isinstance(mask, Image.Image) else mask)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    if hole.dtype == np.uint8 and hole.ndim == 3:
        hole = hole_of_mask(hole)
    if hole.dtype != np.bool_ or hole.ndim != 2:
        raise ValueError(f"mask must be a picture, or bool [H, W], got {hole.dtype} {list(hole.shape)}")
    return Edit(picture, hole)


def starting_from(
    start: Start | None, conditions_of: Callable[[slice], ImageConditions]
) -> Callable[[slice], ImageConditions]:
    """Conditions of a batch's rows, with what all images start from."""
    if start is None:
        return conditions_of
    return lambda rows: replace(conditions_of(rows), known=start.known, grid=start.grid)


def grid_of_images(start: Start | None, config: StructMARConfig, scenes: Sequence[Scene]) -> tuple[int, int]:
    """(rows, columns) of the tokens of scenes of one size, or of what they start from. Raises ValueError where a scene
    has another size than that, or one that the model cannot draw."""
    grid = grid_of_scenes(config, scenes)
    if start is None:
        return grid
    if scenes[0].size is not None and grid != start.grid:
        own = " x ".join(map(str, start.grid))
        raise ValueError(f"size {size_name(scenes[0].size)}: what the images start from has {own} tokens")
    return start.grid


def finishing(start: Start | None) -> Callable[[Tensor], Tensor]:
    """What is shown of drawn pixels [n, 3, H, W]."""
    return (lambda pixels: pixels) if start is None else start.finish


def known_cells(hole: np.ndarray, cell: int) -> Tensor:
    """Which cells of `cell` x `cell` px the hole does not touch when it is grown by one cell: [rows * columns] bool."""
    rows, columns = hole.shape[0] // cell, hole.shape[1] // cell
    touched = torch.from_numpy(hole).view(rows, cell, columns, cell).any(3).any(1)  # [rows, columns]
    grown = torch.nn.functional.max_pool2d(touched[None].float(), 3, stride=1, padding=1)[0] > 0  # [rows, columns]
    return ~grown.flatten()


def cell_of(config: StructMARConfig) -> int:
    """Pixels along the side of what is hidden and drawn on its own."""
    return config.vae_stride * config.token_side


def require_fitting_picture(config: StructMARConfig, picture: Picture, where: str) -> tuple[int, int]:
    """(rows, columns) of the trunk's tokens of a picture. Raises ValueError, naming both sizes, if it has no whole
    tokens, or the model has learned positions of another grid."""
    step = config.vae_stride * config.patch_size
    height, width = picture.shape[:2]
    if height % step or width % step:
        raise ValueError(f"{where} is {width}x{height} px, which are no whole tokens of {step}x{step} px")
    grid = height // step, width // step
    if config.learned_pos and grid != config.grid:
        own = f"{config.grid[1] * step}x{config.grid[0] * step}"
        raise ValueError(f"{where} is {width}x{height} px, but this model draws pictures of {own} px")
    return grid


@torch.no_grad()
def encoded_tokens(model: StructMAR, codec: ImageCodec, pixels: Tensor) -> Tensor:
    """The likeliest tokens of pictures: [n, 3, H, W] in [-1, 1] -> [n, L, C]."""
    latents = codec.mode(codec.encode(pixels.to(codec.device)))  # [n, C', h, w]
    return model.patchify(latents)  # [n, L, C]


def start_of_edit(model: StructMAR, codec: ImageCodec, edit: Edit, where: str = "the image") -> Start:
    """A picture without its hole. Raises ValueError, beginning with `where`, for a size that the model cannot draw."""
    grid = require_fitting_picture(model.config, edit.picture, where)
    tokens = encoded_tokens(model, codec, edit.filled()[None])  # [1, L, C]
    return Start(KnownTokens(tokens, known_cells(edit.hole, cell_of(model.config))[None]), grid, edit)


def start_of_prefix(model: StructMAR, codec: ImageCodec, source: str, num_known: int) -> Start:
    """The first tokens, row by row, of a picture or of a file of codes (.npy, whole numbers in any shape, the codes of
    the first tokens in the model's order).

    Raises FileNotFoundError or ValueError naming the file and what does not fit.
    """
    config, num_tokens = model.config, int(np.prod(model.config.unit_grid()))
    if source.endswith(".npy"):
        tokens = _read_codes(config, source, num_known, num_tokens)  # [1, L, C]
    else:
        picture = np.asarray(load_image(source))
        if require_fitting_picture(config, picture, f"image {short_path(source)}") != config.grid:
            own = config.img_size
            raise ValueError(f"image {short_path(source)} is {_size(picture)} px, the prefix is of {own}x{own} px")
        tokens = encoded_tokens(model, codec, to_model_range(picture)[None])  # [1, L, C]
    return Start(KnownTokens(tokens, (torch.arange(num_tokens) < num_known)[None]), config.grid)


def _read_codes(config: StructMARConfig, source: str, num_known: int, num_tokens: int) -> Tensor:
    if config.head != "discrete":
        raise ValueError(f"codes {short_path(source)} begin no picture of a {config.head} head: give an image")
    if not Path(source).is_file():
        raise FileNotFoundError(f"no file of codes {short_path(source)}")
    try:
        codes = np.load(source, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{short_path(source)} is no array of numpy: {error}") from error
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes {short_path(source)} must be whole numbers, got {codes.dtype}")
    found, wanted = codes.size, num_known * config.token_dim
    if found < wanted:
        raise ValueError(f"codes {short_path(source)} are {found}, but --prefix_k {num_known} asks for {wanted}")
    first = torch.from_numpy(codes.reshape(-1)[:wanted].astype(np.int64))  # [K * C]
    if bool(((first < 0) | (first >= config.codebook_size)).any()):
        low, high = int(first.min()), int(first.max())
        raise ValueError(f"codes {short_path(source)} go from {low} to {high}, the codebook has {config.codebook_size}")
    tokens = torch.zeros(num_tokens * config.token_dim)  # [L * C]
    tokens[:wanted] = first.float()
    return tokens.view(1, num_tokens, config.token_dim)


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
