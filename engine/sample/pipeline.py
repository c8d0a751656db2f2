"""What turns captions and boxes into images: the model together with the frozen parts it was trained with.

    pipe = StructMARPipeline.from_pretrained("folder").to("cuda")
    image = pipe("a dog on a bench", boxes=[[0.1, 0.3, 0.6, 0.9]], phrases=["dog"], seed=0).images[0]

Its parts, how they are loaded and saved: `components.py`. The module's path is written into saved
folders (model_index.json): it has to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from engine.data.scenes import Scene
from engine.plan.propose import DEFAULT_TEMPERATURE, layout_generators
from engine.sample.components import PipelineComponents
from engine.sample.edit_arguments import CallArguments, edit_options, read_edits
from engine.sample.editing import (
    Starts,
    finishing,
    iterations_from,
    require_one_size,
    rows_alike,
    starting_from,
    starts_of_edits,
)
from engine.sample.generate import (
    Hooks,
    ImageConditions,
    batches,
    conditions_of_classes,
    draw_batch,
    draw_latents,
    grid_of_scenes,
    image_generator,
    output_of,
    require_drawable,
    scene_conditions,
)
from engine.sample.inputs import (
    call_hooks,
    check_call,
    leave_open,
    one_of,
    read_generators,
    read_options,
    read_scenes,
    sized,
)
from models.sampling.config import SamplingConfig
from models.sampling.sampler import SampleOutput
from util.images import Picture, to_picture

ConditionsOf = Callable[[slice], ImageConditions]
StepCallback = Callable[["StructMARPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class StructMARPipelineOutput(BaseOutput):
    """images: a list of PIL images; or an array [n, H, W, 3] or tensor [n, 3, H, W], both in [0, 1]; or scaled latents
    [n, C, h, w]. scenes: of each image, the caption and boxes that it was drawn from, proposed ones too."""

    images: Any
    scenes: Any = None


class StructMARPipeline(PipelineComponents):
    """Made by `from_pretrained`, `from_checkpoint` or `from_parts`."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        boxes: Any = None,
        phrases: Any = None,
        guidance_scale: float | None = None,
        layout_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        *,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        gligen_boxes: Any = None,
        gligen_phrases: Any = None,
        classes: Any = None,
        subject_scales: Any = None,
        planner_temperature: float = DEFAULT_TEMPERATURE,
        **options: Unpack[CallArguments],
    ) -> Any:
        """Images of captions with objects at given places. Everything is checked before anything is drawn.

        prompt: a caption, or a list of them; "" is none. boxes: [x0, y0, x1, y1] as fractions of the image, one list
        per prompt; phrases: what each box holds, of `labels`, or in words for weights that were trained with phrases.
        gligen_boxes and gligen_phrases mean the same. classes: the label of each box beside its phrase, None where the
        phrase stands alone. subject_scales: how strongly each box counts, 1 as trained, None: layout_scale.
        Where boxes are None and nothing else says what is drawn where, a pipeline with a `planner` proposes them, other
        ones for each image (planner_temperature: 1 as trained, 0 the likeliest); [] is none.
        guidance_scale: of the caption; layout_guidance_scale: of the boxes; 1 is none. num_inference_steps: iterations;
        num_diffusion_steps: reverse steps per token. These and `options`, which have the names of the command line's
        flags: None means the weights' own (`own_sampling`), "none" takes away a bound that these name.
        image: a picture (PIL or uint8 [H, W, 3]), or one for each prompt, of which a part stays. What is drawn anew,
        one of these says: `mask`, a picture of its size or bool [H, W], light or True; `edit`, True or False for each
        box, or nothing for all boxes; `edit_boxes`, `keep_boxes`; `move`, {"dog:1": [x0, y0, x1, y1]}, and `remove`,
        ["dog:1"], of the boxes as they are in the picture; `outpaint`, cells left, above, right and below of it.
        `keep_pixels`: False shows what stays as its tokens say it.
        seed: image i of the call is the image that scripts.sample draws with seed + i. generator: instead, one that all
        images draw from, or one for each. Without either, images differ from call to call.
        height, width: in pixels, the model's own by default; others need a model without learned positions.
        batch_size: images drawn at a time. output_type: pil, np, pt or latent. return_dict: False gives a tuple.
        callback_on_step_end: called as (pipe, iteration, iterations left, {"tokens": [B, L, C]}) after every iteration
        of every batch. A dictionary that it returns may hold other tokens. It may set pipe.interrupt: the call then
        ends with the tokens known so far, the others at zero.
        Raises ValueError naming the argument and the values.
        """
        check_call(output_type, batch_size, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        boxes = one_of("boxes", boxes, "gligen_boxes", gligen_boxes)
        phrases = one_of("phrases", phrases, "gligen_phrases", gligen_phrases)
        known = self.known_labels
        scenes = read_scenes(prompt, boxes, phrases, known, num_images_per_prompt, subject_scales, classes)
        scenes = sized(scenes, height, width, self.model.config.img_size)
        generators = read_generators(seed, generator, len(scenes))
        of_edit, others = edit_options(options)
        given = {
            "num_inference_steps": num_inference_steps,
            "num_diffusion_steps": num_diffusion_steps,
            "guidance_scale": guidance_scale,
            "layout_guidance_scale": layout_guidance_scale,
            **others,
        }
        grid = grid_of_scenes(self.model.config, scenes)
        num_tokens = math.prod(self.model.config.unit_grid(grid))
        config = read_options(self.own_sampling, given, num_tokens, self.require_guided_once)
        scenes, starts = self._read_starts(scenes, num_images_per_prompt, image, of_edit, isinstance(prompt, str))
        grid = grid if starts is None else starts[0].grid
        if self.planner is not None and image is None:
            asked = leave_open(prompt, boxes, num_images_per_prompt)
            drawn_by = layout_generators(generators)
            scenes = self.planner.scenes(scenes, known, self.caption_encoder, drawn_by, planner_temperature, asked)
        self.interrupt = False
        with self.progress_bar(total=iterations_from(starts, len(scenes), batch_size, config)) as bar:
            callback = None if callback_on_step_end is None else partial(callback_on_step_end, self)
            hooks = call_hooks(config, bar.update, callback, callback_on_step_end_tensor_inputs, lambda: self.interrupt)
            way = (self.model, starting_from(starts, self._of_scenes(scenes, config)), grid, config, generators)
            drawn = list(draw_latents(*way, batch_size, self.precision, hooks))
            images = output_of(self.codec, drawn, output_type, finishing(starts))
        return StructMARPipelineOutput(images=images, scenes=scenes) if return_dict else (images,)

    def draw(
        self,
        scenes: Sequence[Scene],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int = 8,
        precision: str = "fp32",
        progress: Callable[[], None] | None = None,
        starts: Starts | None = None,
        hooks: Hooks | None = None,
    ) -> list[Picture]:
        """One picture per scene and seed. An empty prompt means no text, a scene without boxes means no layout.

        Scenes of one size share batches. progress: called after every iteration of every batch; hooks: what is called
        instead. starts: what each begins from; those with as many tokens to draw share batches. Raises ValueError if
        scenes and seeds differ in number, the model cannot draw a scene's boxes or size, or the weights are guided
        already.
        """
        if len(scenes) != len(seeds):
            raise ValueError(f"every scene needs its seed, got {len(scenes)} scenes and {len(seeds)} seeds")
        self.require_guided_once(config)
        if starts is None:
            require_drawable(self.model.config, config, scenes)
        pictures: dict[int, Picture] = {}
        for rows in rows_alike(self.model.config, scenes, starts):
            part = [scenes[row] for row in rows]
            own = None if starts is None else [starts[row] for row in rows]
            grid = grid_of_scenes(self.model.config, part) if own is None else own[0].grid
            way = (self._of_scenes(part, config), grid, config, [seeds[row] for row in rows])
            called = hooks or Hooks.counting(progress)
            pictures.update(zip(rows, self._pictures(*way, batch_size, precision, called, own), strict=True))
        return [pictures[row] for row in range(len(scenes))]

    def draw_classes(
        self,
        labels: Sequence[int],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int = 8,
        precision: str = "fp32",
        progress: Callable[[], None] | None = None,
        starts: Starts | None = None,
    ) -> list[Picture]:
        """Class-conditional pictures, as MAR generates them: one per label and seed, without text and layout."""
        if len(labels) != len(seeds):
            raise ValueError(f"every label needs its seed, got {len(labels)} labels and {len(seeds)} seeds")

        grid = self.model.config.grid if starts is None else starts[0].grid
        way = (conditions_of_classes(self.model, labels), grid, config, seeds)
        return self._pictures(*way, batch_size, precision, Hooks.counting(progress), starts)

    def sample(
        self,
        conditions: ImageConditions,
        config: SamplingConfig,
        generators: Sequence[torch.Generator],
        precision: str = "fp32",
        hooks: Hooks | None = None,
        record: bool = False,
    ) -> SampleOutput:
        """One batch as the sampler gives it: tokens, latents, orders and, if recorded, the trace."""
        self.require_guided_once(config)
        return draw_batch(self.model, conditions, config, generators, precision, hooks, record)

    def pictures(self, latents: Tensor, starts: Starts | None = None) -> list[Picture]:
        """Scaled latents [B, C, h, w] -> B decoded pictures, with what stays of the pictures that they started from."""
        return [to_picture(pixels) for pixels in finishing(starts)(self.codec.decode(latents.float()))]

    def _read_starts(
        self, scenes: list[Scene], num_images: int, image: Any, options: Mapping[str, Any], is_single: bool
    ) -> tuple[list[Scene], Starts | None]:
        """The scenes that are drawn and what they start from; `num_images` of each in a row."""
        drawn, edits = read_edits(self.model.config, scenes[::num_images], image, options, is_single)
        if edits is None:
            return scenes, None
        starts = starts_of_edits(self.model, self.codec, edits)
        require_one_size(self.model.config, drawn, starts)
        if len({start.grid for start in starts}) > 1:
            raise ValueError("the images of one call must have one size")
        return [each for each in drawn for _ in range(num_images)], [each for each in starts for _ in range(num_images)]

    def _of_scenes(self, scenes: Sequence[Scene], config: SamplingConfig) -> ConditionsOf:
        encoder = self.caption_encoder
        return lambda rows: scene_conditions(self.model, encoder, scenes[rows], config, self.phrases)

    def _pictures(
        self,
        conditions_of: ConditionsOf,
        grid: tuple[int, int],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int,
        precision: str,
        hooks: Hooks,
        starts: Starts | None,
    ) -> list[Picture]:
        generators, conditions_of = [image_generator(seed) for seed in seeds], starting_from(starts, conditions_of)
        way = (self.model, conditions_of, grid, config, generators)
        drawn = draw_latents(*way, batch_size, precision, hooks)
        parts = zip(batches(len(seeds), batch_size), drawn, strict=True)
        return [each for rows, own in parts for each in self.pictures(own, None if starts is None else starts[rows])]
