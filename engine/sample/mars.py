"""What MARS is asked for by captions and pictures: pictures of captions, captions of pictures, and both in turn.

    pipe = MarsPipeline.from_checkpoint("mars.safetensors", "lm", "vq.pt")
    (picture,) = pipe.draw(["a red kite"], seeds=[0])
    (caption,) = pipe.describe([picture])

Picture k depends on its own caption and seed alone. Pictures are uint8 [H, W, 3]. A pipeline of the super-resolution
stage draws larger what another one drew:

    low = pipe.draw_codes(["a red kite"], seeds=[0])
    larger = MarsPipeline.from_checkpoint("upscale.safetensors", "lm", "vq.pt", upscales=True)
    (picture,) = larger.draw(["a red kite"], seeds=[0], low=low)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image as PilImage
from torch import Tensor

from engine.checkpoint.mars_weights import LoadedMars, load_mars
from engine.sample.generate import batches, image_generator
from models.mars.decoding import Image, JointOptions, Part, Words, continue_sequence, describe_images
from models.mars.sampling import DrawOptions, draw_images
from models.semvie import require_room
from util.boxes import plan_center_crop
from util.buckets import Size
from util.images import Picture, crop_image, shrunk_psnr, to_model_range, to_picture
from util.rng import derive_seed

Told: TypeAlias = str | Picture
"""A part of a sequence of words and pictures."""

MAX_WORDS = 64  # tokens of a caption, unless another number is asked for


@dataclass(frozen=True)
class MarsPipeline:
    """source: where the weights come from."""

    parts: LoadedMars
    source: str

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        lm_path: str | Path,
        codec_path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        use_ema: bool = True,
        allow_other_frozen: bool = False,
        upscales: bool = False,
    ) -> MarsPipeline:
        """From a training checkpoint or an exported file. Raises FileNotFoundError or ValueError as `load_mars`."""
        loaded = load_mars(path, lm_path, codec_path, device, dtype, use_ema, allow_other_frozen, upscales)
        return cls(loaded, str(path))

    @property
    def size(self) -> Size:
        """(height, width) of the model's own pictures, in pixels."""
        rows, columns = self.parts.said.identity.config.grid
        return rows * self.parts.codec.stride, columns * self.parts.codec.stride

    def describe_weights(self) -> dict[str, Any]:
        """For what is made with them."""
        return {"path": self.source, **self.parts.said.describe()}

    def require_larger_of(self, small: MarsPipeline) -> None:
        """Raises ValueError, naming both, unless this one makes the pictures of the other larger."""
        wanted, found = self.parts.said.identity, small.parts.said.identity
        if (wanted.config.low_grid, self.parts.codec.id) != (found.config.grid, small.parts.codec.id):
            raise ValueError(
                f"{self.source} makes pictures of {wanted.config.low_grid} codes larger, {small.source} draws "
                f"{found.config.grid} codes"
            )

    def grid_of(self, size: Size | None) -> tuple[int, int]:
        """Codes of pictures of (height, width) in pixels, None: the model's own. Raises ValueError for sizes that are
        no whole codes."""
        height, width = size or self.size
        step = self.parts.codec.stride
        if height % step or width % step:
            raise ValueError(f"{height}x{width} pixels are no whole codes of {step}x{step} pixels")
        return height // step, width // step

    def require_drawable(self, prompts: Sequence[str], negative: str, options: DrawOptions) -> None:
        """Raises ValueError for more positions than the language model is made for, before any is drawn."""
        words = self.parts.words
        longest = max(map(len, words.prompts([*prompts, negative])))
        length = self.parts.model.config.low_length + math.prod(options.grid_of(self.parts.model))
        require_room(self.parts.model.decoder, longest + length)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: DrawOptions | None = None,
        negative: str = "",
        batch_size: int = 8,
        progress: Callable[[], object] | None = None,
        low: Tensor | None = None,
    ) -> list[Picture]:
        """As `draw_codes`, pictures."""
        codes = self.draw_codes(prompts, seeds, options, negative, batch_size, progress, low)  # [n, h, w]
        return self.pictures_of(codes, batch_size)

    def draw_codes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: DrawOptions | None = None,
        negative: str = "",
        batch_size: int = 8,
        progress: Callable[[], object] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """One picture a caption and seed, [n, h, w] int64; "" is no caption. negative: what guidance leads away from.
        progress: called after every batch. low: codes of the pictures that are made larger, [n, h, w].

        Raises ValueError if captions, seeds and small pictures differ in number, and as `require_drawable`.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"every prompt needs its seed, got {len(prompts)} prompts and {len(seeds)} seeds")
        options = options or DrawOptions()
        rows, other = self.parts.words.prompts(prompts), self.parts.words.prompts([negative])[0]
        if low is not None and len(low) != len(prompts):
            raise ValueError(f"every prompt needs a small picture, got {len(prompts)} prompts and {len(low)} pictures")
        drawn = []
        for chosen in batches(len(rows), batch_size):
            own = seeds[chosen] if low is None else [derive_seed(seed, "larger") for seed in seeds[chosen]]
            generators = [image_generator(seed) for seed in own]
            before = None if low is None else low[chosen].flatten(1)  # [B, l]
            drawn.append(draw_images(self.parts.model, rows[chosen], other, generators, options, before))  # [B, h, w]
            if progress is not None:
                progress()
        return torch.cat(drawn)  # [n, h, w]

    def pictures_of(self, codes: Tensor, batch_size: int | None = None) -> list[Picture]:
        """[n, h, w] -> n pictures, decoded together or so many at a time."""
        parts = codes.split(batch_size or len(codes))
        return [to_picture(each) for part in parts for each in self.pixels_of(part)]

    def pixels_of(self, codes: Tensor) -> Tensor:
        """[B, h, w] -> [B, 3, H, W] in [-1, 1]."""
        return self.parts.codec.decode(codes[:, None].float())  # [B, 3, H, W]

    def psnr_of(self, codes: Tensor, low: Tensor) -> list[float]:
        """How near pictures that were made larger, shrunk, are to the small ones, in dB: [n, h, w] of each."""
        pairs = zip(codes.split(1), low.split(1), strict=True)
        return [shrunk_psnr(self.pixels_of(large), self.pixels_of(small)).item() for large, small in pairs]

    def codes_of(self, pictures: Sequence[Picture]) -> Tensor:
        """[B, h, w] int64. Larger pictures, and those of other shapes, are cut and shrunk to the model's size as in
        training."""
        pixels = torch.stack([to_model_range(self._fitted(each)) for each in pictures])  # [B, 3, H, W]
        return self.parts.codec.encode(pixels.to(self.parts.codec.device))[:, 0].long()  # [B, h, w]

    def _fitted(self, picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        if (height, width) == self.size:
            return picture
        return crop_image(PilImage.fromarray(picture), plan_center_crop(width, height, self.size))

    def describe(
        self, pictures: Sequence[Picture], beginning: str = "", max_words: int = MAX_WORDS, batch_size: int = 8
    ) -> list[str]:
        """The likeliest caption of each picture, token by token. beginning: what every caption starts with, such as
        "a picture of"; it chooses the language. max_words: tokens written at most after it."""
        words, written = self.parts.words, []
        started = words.ids([beginning])[0] if beginning else []
        for chosen in batches(len(pictures), batch_size):
            codes = self.codes_of(pictures[chosen]).flatten(1)  # [B, L]
            ends = [words.end_token]
            written += describe_images(self.parts.model, codes, words.opening, ends, max_words, started)
        return [words.text(ids) for ids in written]

    def continue_with(self, told: Sequence[Told], seed: int, options: JointOptions, negative: str = "") -> list[Told]:
        """What follows words and pictures, alternating. options: its `end_ids` are the language model's, whatever they
        were. Raises ValueError for nothing to go on from, and as `require_tellable`."""
        words = self.parts.words
        options = replace(options, end_ids=(words.end_token,))
        self.require_tellable(told, options)
        opening = Words(tuple(words.opening))
        prompt: list[Part] = [opening, *(self._part_of(each) for each in told)]
        other = words.prompts([negative])[0]
        found = continue_sequence(self.parts.model, prompt, other, image_generator(seed), options)
        return [self._told(part) for part in found]

    def require_tellable(self, told: Sequence[Told], options: JointOptions) -> None:
        """Raises ValueError if all words and pictures that may follow are more than the language model has positions
        for, before any is written."""
        words, model = self.parts.words, self.parts.model
        texts = [each for each in told if isinstance(each, str)]
        shown = (len(told) - len(texts)) * (model.config.num_tokens + 2)  # with <img> and </img>
        drawn = options.max_images * (math.prod(options.draw.grid_of(model)) + 2)
        given = len(words.opening) + sum(map(len, words.ids(texts))) + shown
        try:
            require_room(model.decoder, given + drawn + options.max_words - 1)  # the last word is not read
        except ValueError as error:
            asked = f"max_images {options.max_images} and max_words {options.max_words} after {given} positions"
            raise ValueError(f"{asked}: {error}") from error

    def _part_of(self, each: Told) -> Part:
        return (
            Words(tuple(self.parts.words.ids([each])[0])) if isinstance(each, str) else Image(self.codes_of([each])[0])
        )

    def _told(self, part: Part) -> Told:
        if isinstance(part, Words):
            return self.parts.words.text(part.ids)
        return self.pictures_of(part.codes[None])[0]
