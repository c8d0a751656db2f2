"""From scenes to images: conditions in, sampled latents, decoded pixels, and the grid that shows them with their boxes.

Image k depends on its own scene and seed alone, not on the images it shares a batch with (up to float rounding: the
kernels' summation order may depend on the batch).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.data.scenes import Scene
from models.frozen.text import TextEncoder
from models.frozen.vae import LatentCodec
from models.sampling.config import SamplingConfig
from models.sampling.sampler import OnIteration, sample
from models.structmar import StructMAR
from util.images import Picture, draw_boxes, make_grid, to_picture
from util.rng import generator
from util.types import LayoutBatch, TextContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = tuple(DTYPES)
GRID_CELL = 256  # pixels: the width below which the grid enlarges images by default
GRID_GAP = 10


def generate_images(
    model: StructMAR,
    codec: LatentCodec,
    text_encoder: TextEncoder,
    scenes: Sequence[Scene],
    config: SamplingConfig,
    seeds: Sequence[int],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: Callable[[], None] | None = None,
) -> list[Picture]:
    """One image per scene and seed. An empty prompt means no text, a scene without boxes means no layout.

    progress: called after every iteration of every batch, `num_iterations(...)` times in all.
    Raises ValueError if scenes and seeds differ in number or a scene has more boxes than the model places.
    """
    dtype = sampling_dtype(precision)
    if len(scenes) != len(seeds):
        raise ValueError(f"every scene needs its seed, got {len(scenes)} scenes and {len(seeds)} seeds")
    images: list[Picture] = []
    for rows in _batches(len(scenes), batch_size):
        part = scenes[rows]
        text = encode_prompts(text_encoder, [scene.prompt for scene in part]).to(device)
        layout = LayoutBatch.collate([scene.layout for scene in part], model.config.max_objects).to(device)
        with _sampling(model):
            generators = [image_generator(seed) for seed in seeds[rows]]
            latents = sample(
                model, config, generators, text=text, layout=layout, on_iteration=_counted(progress), dtype=dtype
            ).latents  # [B, C, h, w]
        images += [to_picture(pixels) for pixels in codec.decode(latents.float())]
    return images


def generate_class_images(
    model: StructMAR,
    codec: LatentCodec,
    labels: Sequence[int],
    config: SamplingConfig,
    seeds: Sequence[int],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: Callable[[], None] | None = None,
) -> list[Picture]:
    """Class-conditional images, as MAR generates them: one per label and seed, without text and layout."""
    dtype = sampling_dtype(precision)
    if len(labels) != len(seeds):
        raise ValueError(f"every label needs its seed, got {len(labels)} labels and {len(seeds)} seeds")
    for label in labels:
        if not 0 <= label < model.config.class_num:
            raise ValueError(f"class label {label} is outside 0 ... {model.config.class_num - 1}")
    images: list[Picture] = []
    for rows in _batches(len(labels), batch_size):
        with _sampling(model):
            generators = [image_generator(seed) for seed in seeds[rows]]
            batch = torch.tensor(labels[rows], dtype=torch.int64, device=device)  # [B]
            latents = sample(
                model, config, generators, labels=batch, on_iteration=_counted(progress), dtype=dtype
            ).latents  # [B, C, h, w]
        images += [to_picture(pixels) for pixels in codec.decode(latents.float())]
    return images


def sampling_dtype(precision: str) -> torch.dtype:
    """Raises ValueError unless it is one of PRECISIONS."""
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {PRECISIONS}, got '{precision}'")
    return DTYPES[precision]


@torch.no_grad()
def encode_prompts(text_encoder: TextEncoder, prompts: Sequence[str]) -> TextContext:
    """The prompts' token states; rows with an empty prompt have no text at all."""
    context = text_encoder.context(list(prompts))
    empty = torch.tensor([not prompt for prompt in prompts], device=context.valid.device)
    return context.dropped(empty)


def image_generator(seed: int) -> torch.Generator:
    """The generator of one image: everything random in it (order, noise) comes from here."""
    return generator("image", seed)


def num_iterations(num_images: int, batch_size: int, config: SamplingConfig) -> int:
    """How often `progress` is called by a run: iterations of the sampler over all batches."""
    return math.ceil(num_images / batch_size) * config.num_iter


def scene_grid(
    images: Sequence[Picture], scenes: Sequence[Scene], columns: int | None = None, scale: int | None = None
) -> Picture:
    """The images side by side, enlarged `scale` times, boxes and labels drawn on them, the caption under each.

    columns: default: as square as possible, at most 8. scale: default: cells at least `GRID_CELL` pixels wide.
    """
    if not images or len(images) != len(scenes):
        raise ValueError(f"a grid needs one scene per image and at least one, got {len(images)} and {len(scenes)}")
    height, width = images[0].shape[:2]
    scale = scale or math.ceil(GRID_CELL / width)
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    min_size = scale * min(height, width)  # draw_boxes then enlarges exactly `scale` times
    boxed = [
        draw_boxes(image, scene.layout.boxes_xyxy, scene.names, min_size)
        for image, scene in zip(images, scenes, strict=True)
    ]
    bands = caption_bands([scene.prompt for scene in scenes], width * scale)
    cells = [np.concatenate(cell) for cell in zip(boxed, bands, strict=True)]
    return make_grid(cells, columns, pad=GRID_GAP)


def caption_bands(captions: Sequence[str], width: int, font_size: int | None = None) -> list[Picture]:
    """Every caption in black on white, wrapped to `width` pixels; all bands have the height of the longest.

    font_size: in px; default: what suits an image that is `width` wide.
    """
    font = ImageFont.load_default(font_size or caption_font_size(width))
    wrapped = [_wrap(caption, font, width) for caption in captions]
    ascent_to_descent = font.getbbox("Ágjy")
    line_height = math.ceil(1.15 * (ascent_to_descent[3] - min(0, ascent_to_descent[1])))
    height = line_height * max(len(lines) for lines in wrapped) + 4
    bands = []
    for lines in wrapped:
        band = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(band)
        for number, line in enumerate(lines):
            draw.text((1, 2 + number * line_height), line, fill="black", font=font)
        bands.append(np.asarray(band))
    return bands


def caption_font_size(width: int) -> int:
    """Pixels, for the caption of an image `width` wide."""
    return max(11, width // 19)


def _batches(total: int, batch_size: int) -> Iterator[slice]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return (slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size))


@contextlib.contextmanager
def _sampling(model: StructMAR) -> Iterator[None]:
    """Evaluation mode and no gradients; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _counted(progress: Callable[[], None] | None) -> OnIteration | None:
    """Calls `progress` after each of the sampler's iterations."""
    if progress is None:
        return None
    count = progress

    def on_iteration(iteration: int, tokens: Tensor) -> None:
        count()

    return on_iteration


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 4) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit in `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        for letter in f"\n{word}":  # words too long for a line are cut
            if letter == "\n" or font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter.strip()
    lines = lines if lines[0] else lines[1:] or [""]
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last + "..."]
