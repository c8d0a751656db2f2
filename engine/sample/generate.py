"""What drawing an image takes, whoever asks for it: its generator, its conditions, the sampler on a batch.

Image k depends on its own scene and seed alone, not on the images it shares a batch with (up to float rounding: the
kernels' summation order may depend on the batch).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.data.phrases import PhraseEncoder
from engine.data.scenes import Scene
from engine.sample.naming import phrase_weights
from models.config import PRECISIONS, StructMARConfig
from models.frozen.base import ImageCodec, TextEncoder
from models.sampling.config import SamplingConfig
from models.sampling.sampler import KnownTokens, SampleOutput, sample
from models.structmar import StructMAR
from util.buckets import Size
from util.images import to_picture
from util.read import short_repr
from util.rng import generator
from util.types import LayoutBatch, TextContext


@dataclass(frozen=True)
class ImageConditions:
    """What a batch of images is drawn from, [B, ...] each: captions and boxes, or MAR's class labels. grid: (rows,
    columns) of tokens; None: the model's own. known: tokens that they start from. phrase_weights: which of a caption's
    tokens name which box, where that is asked for (`naming.py`). negative: what all are guided away from, one row."""

    text: TextContext | None = None
    layout: LayoutBatch | None = None
    labels: Tensor | None = None
    grid: tuple[int, int] | None = None
    known: KnownTokens | None = None
    phrase_weights: Tensor | None = None
    negative: TextContext | None = None


@dataclass(frozen=True)
class Hooks:
    """What the sampler calls while it draws a batch.

    on_iteration: gets the iteration and the tokens [B, L, C] after it; tokens that it returns replace these.
    should_stop: asked before every iteration; True leaves the tokens that are not known yet at zero.
    """

    on_iteration: Callable[[int, Tensor], Tensor | None] | None = None
    should_stop: Callable[[], bool] | None = None

    @staticmethod
    def counting(progress: Callable[[], None] | None) -> Hooks:
        """Calls `progress` after every iteration."""
        if progress is None:
            return Hooks()
        step = progress

        def on_iteration(_iteration: int, _tokens: Tensor) -> None:
            step()

        return Hooks(on_iteration)


def draw_batch(
    model: StructMAR,
    conditions: ImageConditions,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    precision: str = "fp32",
    hooks: Hooks | None = None,
    record: bool = False,
) -> SampleOutput:
    """One image per generator, as the sampler gives it. The model's mode is put back afterwards."""
    hooks = hooks or Hooks()
    dtype = sampling_dtype(precision)
    with _evaluating(model):
        return sample(
            model,
            config,
            generators,
            text=conditions.text,
            layout=conditions.layout,
            labels=conditions.labels,
            negative=conditions.negative,
            grid=conditions.grid,
            known=conditions.known,
            phrase_weights=conditions.phrase_weights,
            on_iteration=hooks.on_iteration,
            should_stop=hooks.should_stop,
            record=record,
            dtype=dtype,
        )


def scene_conditions(
    model: StructMAR,
    text_encoder: TextEncoder,
    scenes: Sequence[Scene],
    config: SamplingConfig,
    phrases: PhraseEncoder | None = None,
) -> ImageConditions:
    """Of scenes of one size, with what these options need. An empty prompt means no text, a scene without boxes no
    layout. phrases: where phrases of boxes are encoded and kept, so that none is encoded twice. Raises ValueError for
    too many boxes, and for phrases that the model does not know."""
    device, max_objects = model.fake_latent.device, model.config.max_objects
    require_known_boxes(model.config, scenes)
    text = encode_prompts(text_encoder, [scene.prompt for scene in scenes]).to(device)
    layout = LayoutBatch.collate([scene.layout for scene in scenes], max_objects).to(device)
    if model.config.phrases:
        phrases = phrases or PhraseEncoder(text_encoder)
        layout = phrases.fill(layout, [scene.layout.phrases for scene in scenes])
    weights = None
    if config.mask_threshold is not None:
        weights = phrase_weights(text_encoder, scenes, text.valid.shape[1], max_objects).to(device)  # [B, T, N]
    negative = encode_prompts(text_encoder, [config.negative_prompt]).to(device) if config.negative_prompt else None
    grid = grid_of_scenes(model.config, scenes)
    return ImageConditions(text, layout, grid=grid, phrase_weights=weights, negative=negative)


def grid_of_scenes(config: StructMARConfig, scenes: Sequence[Scene]) -> tuple[int, int]:
    """(rows, columns) of the tokens of scenes of one size. Raises ValueError if they are no whole tokens, or the model
    has learned positions of another grid."""
    sizes = {scene.size for scene in scenes}
    assert len(sizes) == 1, f"a batch has one size, got {sizes}"
    (size,) = sizes
    grid = config.grid if size is None else config.grid_of(size)
    config.check_grid(grid)
    return grid


def rows_by_size(scenes: Sequence[Scene]) -> list[list[int]]:
    """The positions of the scenes of each size, sizes in the order in which they come first."""
    rows: dict[Size | None, list[int]] = {}
    for row, scene in enumerate(scenes):
        rows.setdefault(scene.size, []).append(row)
    return list(rows.values())


def require_drawable(config: StructMARConfig, sampling: SamplingConfig, scenes: Sequence[Scene]) -> None:
    """Raises ValueError for a size that the model cannot draw, or not in so many iterations, and for boxes with phrases
    that it does not know."""
    require_known_boxes(config, scenes)
    for rows in rows_by_size(scenes):
        grid = grid_of_scenes(config, [scenes[rows[0]]])
        sampling.require_fitting(math.prod(config.unit_grid(grid)))


def require_known_boxes(config: StructMARConfig, scenes: Sequence[Scene]) -> None:
    """Raises ValueError naming the first phrase of a box, if the model knows boxes by their classes alone."""
    named = [phrase for scene in scenes for phrase in scene.layout.phrases if phrase]
    if named and not config.phrases:
        raise ValueError(f"a box has the phrase {short_repr(named[0])}, but these weights were trained without phrases")


def class_conditions(model: StructMAR, labels: Sequence[int]) -> ImageConditions:
    """MAR's own conditions. Raises ValueError for a class that the model does not have."""
    for label in labels:
        if not 0 <= label < model.config.class_num:
            raise ValueError(f"class label {label} is outside 0 ... {model.config.class_num - 1}")
    return ImageConditions(labels=torch.tensor(labels, dtype=torch.int64, device=model.fake_latent.device))  # [B]


def draw_latents(
    model: StructMAR,
    conditions_of: Callable[[slice], ImageConditions],
    grid: tuple[int, int],
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    batch_size: int,
    precision: str,
    hooks: Hooks,
) -> Iterator[Tensor]:
    """Scaled latents [B, C, h, w] of a grid of tokens, batch by batch; zeros where the call was ended before."""
    for rows in batches(len(generators), batch_size):
        chosen = generators[rows]
        if hooks.should_stop is None or not hooks.should_stop():
            yield draw_batch(model, conditions_of(rows), config, chosen, precision, hooks).latents.float()
        else:
            num_units, device = math.prod(model.config.unit_grid(grid)), model.fake_latent.device
            yield model.unpatchify(model.head.empty_tokens(len(chosen), num_units, device), grid)


def conditions_of_classes(model: StructMAR, labels: Sequence[int]) -> Callable[[slice], ImageConditions]:
    """Of a batch's rows."""
    return lambda rows: class_conditions(model, labels[rows])


def output_of(
    codec: ImageCodec,
    drawn: Sequence[Tensor],
    output_type: str,
    finish: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Any:
    """What a call gives. drawn: scaled latents [B, C, h, w] of each batch; finish: acts on their pixels [n, 3, H, W] in
    [-1, 1]. pil: a list of images; np: an array [n, H, W, 3], pt: a tensor [n, 3, H, W], both in [0, 1]; latent:
    [n, C, h, w]."""
    if output_type == "latent":
        return torch.cat(list(drawn))  # [n, C, h, w]
    pixels = finish(torch.cat([codec.decode(latents) for latents in drawn]))  # [n, 3, H, W]
    if output_type == "pil":
        return [Image.fromarray(to_picture(each)) for each in pixels]
    shares = pixels / 2 + 0.5  # [n, 3, H, W]
    return shares if output_type == "pt" else shares.permute(0, 2, 3, 1).cpu().numpy()


def sampling_dtype(precision: str) -> torch.dtype:
    """Raises ValueError unless it is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got '{precision}'")
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision])
    return dtype


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
    """Iterations of the sampler over all batches of a run."""
    return math.ceil(num_images / batch_size) * config.num_passes


def batches(total: int, batch_size: int) -> Iterator[slice]:
    """The rows of each batch. Raises ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return (slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size))


@contextlib.contextmanager
def _evaluating(model: StructMAR) -> Iterator[None]:
    """Evaluation mode and no gradients; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
