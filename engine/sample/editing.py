"""Pictures of which a part stays: in- and outpainting, and the tokens that a picture or a file of codes begins with.

The hole is filled with the mean colour of what stays, and the picture is encoded. A token stays known unless the hole,
grown by one token's cell on all sides, touches its cell: what is encoded near the hole has seen the filling. The others
are drawn under the new caption and boxes. At the end the pixels outside the hole are put back as they were, blended
over so many pixels around the hole as its owner says.

Shape letters: n images, L tokens (what is hidden and drawn on its own), C token channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.scenes import Scene
from engine.sample.generate import ImageConditions, num_iterations, rows_by_size
from engine.sample.holes import drawn_share, known_cells
from models.config import StructMARConfig
from models.frozen.base import ImageCodec
from models.sampling.config import SamplingConfig
from models.sampling.sampler import KnownTokens
from models.structmar import StructMAR
from util.buckets import size_name
from util.images import Picture, load_image, to_model_range
from util.read import short_path


@dataclass(frozen=True)
class Edit:
    """picture: uint8 [H, W, 3] RGB. hole: bool [H, W], True where it is drawn anew. feather: pixels around the hole
    over which the picture passes into what is drawn. keep_pixels: False shows all as the tokens say it.
    Raises ValueError for other sizes, and for a hole that is empty or leaves nothing."""

    picture: Picture
    hole: np.ndarray
    feather: int = 0
    keep_pixels: bool = True

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
        """Drawn pixels [..., 3, H, W] in [-1, 1] with those outside the hole as they were, if these are kept."""
        if not self.keep_pixels:
            return pixels
        own = to_model_range(self.picture).to(pixels)  # [3, H, W]
        return own.lerp(pixels, torch.from_numpy(drawn_share(self.hole, self.feather)).to(pixels))  # [..., 3, H, W]


@dataclass(frozen=True)
class Start:
    """What an image starts from. known: its tokens, [1, L, C]. grid: (rows, columns) of the trunk's tokens. edit: whose
    pixels are put back, None: no one's."""

    known: KnownTokens
    grid: tuple[int, int]
    edit: Edit | None = None

    @property
    def num_unknown(self) -> int:
        """Tokens that are still to be drawn."""
        return int((~self.known.known).sum())

    def finish(self, pixels: Tensor) -> Tensor:
        """What is shown of drawn pixels [3, H, W]."""
        return pixels if self.edit is None else self.edit.put_back(pixels)


Starts = Sequence[Start]
"""What each of some images starts from; the grids of images that share a batch are alike."""


def starting_from(
    starts: Starts | None, conditions_of: Callable[[slice], ImageConditions]
) -> Callable[[slice], ImageConditions]:
    """Conditions of a batch's rows, with what these images start from."""
    if starts is None:
        return conditions_of

    def with_known(rows: slice) -> ImageConditions:
        own = starts[rows]
        tokens = torch.cat([start.known.tokens for start in own])  # [B, L, C]
        known = torch.cat([start.known.known for start in own])  # [B, L]
        return replace(conditions_of(rows), known=KnownTokens(tokens, known), grid=own[0].grid)

    return with_known


def finishing(starts: Starts | None) -> Callable[[Tensor], Tensor]:
    """What is shown of drawn pixels [n, 3, H, W], in the order of what they started from."""
    if starts is None:
        return lambda pixels: pixels
    return lambda pixels: torch.stack([start.finish(own) for start, own in zip(starts, pixels, strict=True)])


def require_one_size(config: StructMARConfig, scenes: Sequence[Scene], starts: Starts) -> None:
    """Raises ValueError where a scene has another size than what it starts from."""
    for scene, start in zip(scenes, starts, strict=True):
        if scene.size is not None and config.grid_of(scene.size) != start.grid:
            own = " x ".join(map(str, start.grid))
            raise ValueError(f"size {size_name(scene.size)}: what the images start from has {own} tokens")


def rows_alike(config: StructMARConfig, scenes: Sequence[Scene], starts: Starts | None) -> list[list[int]]:
    """The positions of images that are drawn in one go: of one size, with as many tokens to draw. Raises ValueError
    where a scene has another size than what it starts from."""
    if starts is None:
        return rows_by_size(scenes)
    require_one_size(config, scenes, starts)
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for row, start in enumerate(starts):
        groups.setdefault((start.grid, start.num_unknown), []).append(row)
    return list(groups.values())


def iterations_from(starts: Starts | None, total: int, batch_size: int, config: SamplingConfig) -> int:
    """Iterations of the sampler over all batches of a run of `total` images, in their order."""
    if starts is None:
        return num_iterations(total, batch_size, config)
    parts = [starts[first : first + batch_size] for first in range(0, total, batch_size)]
    return sum(min(config.num_iter, count) for part in parts for count in {start.num_unknown for start in part} - {0})


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


def starts_of_edits(model: StructMAR, codec: ImageCodec, edits: Sequence[Edit]) -> list[Start]:
    """One for each; what several images share is encoded once. Raises as `start_of_edit`."""
    once = {id(edit): start_of_edit(model, codec, edit) for edit in {id(edit): edit for edit in edits}.values()}
    return [once[id(edit)] for edit in edits]


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
