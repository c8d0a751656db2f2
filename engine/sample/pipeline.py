"""What turns captions and boxes into images: the model together with the frozen parts it was trained with.

    pipe = StructMARPipeline.from_pretrained("folder").to("cuda")
    image = pipe("a dog on a bench", boxes=[[0.1, 0.3, 0.6, 0.9]], phrases=["dog"], seed=0).images[0]

A diffusers pipeline: components, folders, `to` and progress bars are those of `DiffusionPipeline`. Weights and states
stay float32; with bf16 the sampler casts the networks itself (`scripts.sample --precision bf16`).
The module's path is written into saved folders (model_index.json): it has to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from engine.checkpoint.identity import Identity, require_same_config
from engine.checkpoint.load import load_for_sampling, require_fitting_codec, require_same_frozen
from engine.data.scenes import Scene
from engine.sample.editing import (
    Start,
    finishing,
    grid_of_images,
    read_edit_arguments,
    start_of_edit,
    starting_from,
)
from engine.sample.folder import FolderRecord, align_memory, caption_encoder_of, contents_of
from engine.sample.generate import (
    Hooks,
    ImageConditions,
    conditions_of_classes,
    draw_batch,
    draw_latents,
    grid_of_scenes,
    image_generator,
    num_iterations,
    output_of,
    require_drawable,
    rows_by_size,
    scene_conditions,
)
from engine.sample.inputs import (
    CallOptions,
    call_hooks,
    check_call,
    one_of,
    precision_of,
    read_generators,
    read_options,
    read_scenes,
    sized,
)
from engine.sample.transformer import StructMARTransformer
from models.frozen.codec import Autoencoder, Codec, codec_around, load_codec
from models.frozen.text import ClipTextEncoder
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.sampler import SampleOutput
from models.structmar import StructMAR
from util.images import Picture, to_picture

ConditionsOf = Callable[[slice], ImageConditions]
StepCallback = Callable[["StructMARPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class StructMARPipelineOutput(BaseOutput):
    """images: a list of PIL images; or an array [n, H, W, 3] or tensor [n, 3, H, W], both in [0, 1]; or scaled latents
    [n, C, h, w]."""

    images: Any


class StructMARPipeline(DiffusionPipeline):
    """Made by `from_pretrained`, `from_checkpoint` or `from_parts`.

    model, codec, caption_encoder: the components as the rest of the code uses them.
    identity: what the weights were made for, None around a model in training. source: where they come from.
    precision: of calls. interrupt: set by a callback, ends the call after the iteration.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers reads both from the class
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012

    def __init__(
        self,
        transformer: StructMARTransformer,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        identity: Identity | None = None,
        codec: Codec | None = None,
        caption_encoder: ClipTextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        if codec is None:
            if identity is None:
                raise ValueError("make a pipeline by from_pretrained, from_checkpoint or from_parts")
            codec = codec_around(vae, identity.latent_scale, identity.vae_id)
            caption_encoder = caption_encoder_of(text_encoder, tokenizer, identity.text_encoder_id)
        self.codec, self.identity = codec, identity
        self._caption_encoder = caption_encoder
        self.source = ""
        self.precision = "fp32"
        self.interrupt = False

    @classmethod
    def from_parts(
        cls,
        model: StructMAR,
        codec: Codec,
        caption_encoder: ClipTextEncoder | None,
        identity: Identity | None = None,
    ) -> StructMARPipeline:
        """Around live objects, in training, compiled or sharded too: nothing is copied."""
        transformer = StructMARTransformer.around(model)
        text_model = None if caption_encoder is None else caption_encoder.model
        tokenizer = None if caption_encoder is None else caption_encoder.tokenizer
        return cls(transformer, codec.autoencoder, text_model, tokenizer, identity, codec, caption_encoder)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        vae_path: str | Path,
        clip_path: str | Path,
        device: torch.device | str = "cpu",
        use_ema: bool = True,
        allow_other_frozen: bool = False,
    ) -> StructMARPipeline:
        """From a training checkpoint or an exported file, and the frozen parts it was trained with.

        Raises FileNotFoundError or ValueError naming the file that is missing or does not fit the weights.
        """
        loaded = load_for_sampling(path, device, use_ema=use_ema)
        model, identity = loaded.model, loaded.identity
        codec = load_codec(vae_path, device, identity.latent_scale)
        require_same_frozen("VAE", vae_path, codec.id, identity.vae_id, allow_other_frozen)
        require_fitting_codec(codec, vae_path, identity.config)
        encoder = ClipTextEncoder.load(clip_path, device)
        require_same_frozen("text encoder", clip_path, encoder.id, identity.text_encoder_id, allow_other_frozen)
        if encoder.dim != identity.config.text_dim:
            raise ValueError(
                f"text encoder {clip_path} has width {encoder.dim}, the checkpoint {identity.config.text_dim}"
            )
        pipeline = cls.from_parts(model, codec, encoder, identity)
        pipeline.source = str(path)
        return pipeline

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> StructMARPipeline:
        """From a folder that `save_pretrained` wrote; nothing is downloaded. dtype: bfloat16 makes calls in bf16.

        Raises FileNotFoundError or ValueError if it is no such folder, or a component has other contents than saved.
        """
        folder, precision = str(pretrained_model_name_or_path), precision_of(torch_dtype if dtype is None else dtype)
        record = FolderRecord.read(folder)
        kwargs = {"low_cpu_mem_usage": False, **kwargs}  # diffusers warns of a missing accelerate otherwise
        pipeline = super().from_pretrained(folder, identity=record.identity, **kwargs)
        align_memory(pipeline.transformer, pipeline.vae, pipeline.text_encoder)
        record.require_same(pipeline._contents(), folder)
        require_same_config(pipeline.model.config, record.identity.config, f"{folder}/transformer/config.json")
        pipeline.model.eval()
        pipeline.source, pipeline.precision = folder, precision
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """One folder that any machine loads: model_index.json, the four components, and what they are.

        Raises ValueError for a pipeline that does not know what its weights were made for, or has other frozen parts.
        """
        if self.identity is None or self._caption_encoder is None:
            raise ValueError("only a pipeline of finished weights can be saved: export the training checkpoint first")
        for kind, found, trained in (
            ("VAE", self.codec.id, self.identity.vae_id),
            ("text encoder", self.caption_encoder.id, self.identity.text_encoder_id),
        ):
            if found != trained:
                raise ValueError(f"the pipeline's {kind} has id {found}, but the weights were trained with {trained}")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file, not a folder")
        super().save_pretrained(str(folder), **kwargs)
        FolderRecord(self.identity, self._contents()).write(folder)

    def to(self, *args: Any, **kwargs: Any) -> StructMARPipeline:
        """As `DiffusionPipeline.to`; a dtype sets the precision of calls and leaves the weights float32."""
        given = [*args, *kwargs.values()]
        for dtype in (each for each in given if isinstance(each, torch.dtype)):
            self.precision = precision_of(dtype)
        args = tuple(each for each in args if not isinstance(each, torch.dtype))
        kwargs = {name: each for name, each in kwargs.items() if not isinstance(each, torch.dtype)}
        return super().to(*args, **kwargs) if args or kwargs else self

    @property
    def model(self) -> StructMAR:
        return self.transformer.model

    @property
    def caption_encoder(self) -> ClipTextEncoder:
        """Raises ValueError for MAR's own weights, which have none."""
        if self._caption_encoder is None:
            raise ValueError("these are MAR's own weights, which know classes instead of captions: see draw_classes")
        return self._caption_encoder

    @property
    def labels(self) -> list[str]:
        """The names that `phrases` may hold."""
        return [] if self.identity is None else [category.name for category in self.identity.categories]

    @property
    def own_sampling(self) -> SamplingConfig:
        """The options that the weights name; where they name none, the defaults of their head."""
        named = None if self.identity is None else self.identity.sampling
        return default_sampling(self.model.config.head) if named is None else named

    def describe(self) -> dict[str, Any]:
        """Which weights these are, for what is written beside images."""
        identity = self.identity
        checkpoint: dict[str, Any] = {"path": self.source, "stage": "mar" if identity is None else identity.stage}
        if identity is not None:
            checkpoint |= {"step": identity.step, "weights": identity.weights}
        frozen = {"vae": self.codec.id, "latent_scale": self.codec.latent_scale}
        if self._caption_encoder is not None:
            frozen["text_encoder"] = self.caption_encoder.id
        return {**checkpoint, **frozen}

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
        mask: Any = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        gligen_boxes: Any = None,
        gligen_phrases: Any = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Images of captions with objects at given places. Everything is checked before anything is drawn.

        prompt: a caption, or a list of them; "" is none. boxes: [x0, y0, x1, y1] as fractions of the image, one list
        per prompt; phrases: what each box holds, of `labels`. gligen_boxes and gligen_phrases mean the same.
        guidance_scale: of the caption; layout_guidance_scale: of the boxes; 1 is none. num_inference_steps: iterations;
        num_diffusion_steps: reverse steps per token. These and `options`, which have the names of the command line's
        flags: None means the weights' own (`own_sampling`), "none" takes away a bound that these name.
        image: a picture (PIL or uint8 [H, W, 3]) of which all images keep what `mask`, a picture of its size or bool
        [H, W], leaves dark or False.
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
        categories = () if self.identity is None else self.identity.categories
        scenes = read_scenes(prompt, boxes, phrases, categories, self.model.config.max_objects, num_images_per_prompt)
        scenes = sized(scenes, height, width, self.model.config.img_size)
        generators = read_generators(seed, generator, len(scenes))
        given = {
            "num_inference_steps": num_inference_steps,
            "num_diffusion_steps": num_diffusion_steps,
            "guidance_scale": guidance_scale,
            "layout_guidance_scale": layout_guidance_scale,
            **options,
        }
        grid = grid_of_scenes(self.model.config, scenes)
        config = read_options(self.own_sampling, given, math.prod(self.model.config.unit_grid(grid)))
        edit = read_edit_arguments(image, mask)
        start = None if edit is None else start_of_edit(self.model, self.codec, edit)
        grid = grid_of_images(start, self.model.config, scenes)
        self.interrupt = False
        with self.progress_bar(total=num_iterations(len(scenes), batch_size, config)) as bar:
            callback = None if callback_on_step_end is None else partial(callback_on_step_end, self)
            hooks = call_hooks(config, bar.update, callback, callback_on_step_end_tensor_inputs, lambda: self.interrupt)
            way = (self.model, starting_from(start, self._of_scenes(scenes)), grid, config, generators)
            drawn = list(draw_latents(*way, batch_size, self.precision, hooks))
            images = output_of(self.codec, drawn, output_type, finishing(start))
        return StructMARPipelineOutput(images=images) if return_dict else (images,)

    def draw(
        self,
        scenes: Sequence[Scene],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int = 8,
        precision: str = "fp32",
        progress: Callable[[], None] | None = None,
        start: Start | None = None,
    ) -> list[Picture]:
        """One picture per scene and seed. An empty prompt means no text, a scene without boxes means no layout.

        Scenes of one size share batches. progress: called after every iteration of every batch. start: what all begin
        from. Raises ValueError if scenes and seeds differ in number, or the model cannot draw a scene's boxes or size.
        """
        if len(scenes) != len(seeds):
            raise ValueError(f"every scene needs its seed, got {len(scenes)} scenes and {len(seeds)} seeds")
        if start is None:
            require_drawable(self.model.config, config, scenes)
        pictures: dict[int, Picture] = {}
        for rows in rows_by_size(scenes):
            part = [scenes[row] for row in rows]
            grid = grid_of_images(start, self.model.config, part)
            way = (self._of_scenes(part), grid, config, [seeds[row] for row in rows])
            pictures.update(zip(rows, self._pictures(*way, batch_size, precision, progress, start), strict=True))
        return [pictures[row] for row in range(len(scenes))]

    def draw_classes(
        self,
        labels: Sequence[int],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int = 8,
        precision: str = "fp32",
        progress: Callable[[], None] | None = None,
        start: Start | None = None,
    ) -> list[Picture]:
        """Class-conditional pictures, as MAR generates them: one per label and seed, without text and layout."""
        if len(labels) != len(seeds):
            raise ValueError(f"every label needs its seed, got {len(labels)} labels and {len(seeds)} seeds")

        grid = self.model.config.grid if start is None else start.grid
        way = (conditions_of_classes(self.model, labels), grid, config, seeds)
        return self._pictures(*way, batch_size, precision, progress, start)

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
        return draw_batch(self.model, conditions, config, generators, precision, hooks, record)

    def pictures(self, latents: Tensor, start: Start | None = None) -> list[Picture]:
        """Scaled latents [B, C, h, w] -> B decoded pictures, with what stays of a picture that they started from."""
        return [to_picture(pixels) for pixels in finishing(start)(self.codec.decode(latents.float()))]

    def _of_scenes(self, scenes: Sequence[Scene]) -> ConditionsOf:
        encoder = self.caption_encoder
        return lambda rows: scene_conditions(self.model, encoder, scenes[rows])

    def _pictures(
        self,
        conditions_of: ConditionsOf,
        grid: tuple[int, int],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int,
        precision: str,
        progress: Callable[[], None] | None,
        start: Start | None,
    ) -> list[Picture]:
        generators, conditions_of = [image_generator(seed) for seed in seeds], starting_from(start, conditions_of)
        way = (self.model, conditions_of, grid, config, generators)
        drawn = draw_latents(*way, batch_size, precision, Hooks.counting(progress))
        return [picture for latents in drawn for picture in self.pictures(latents, start)]

    def _contents(self) -> dict[str, str]:
        return contents_of(self.model, self.vae, self.caption_encoder.model, self.caption_encoder.tokenizer)
