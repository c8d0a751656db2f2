"""The parts of a pipeline, loaded and saved: the model, and the frozen parts it was trained with.

A diffusers pipeline: components, folders and `to` are those of `DiffusionPipeline`. Weights and states stay float32;
with bf16 the sampler casts the networks itself (`scripts.sample --precision bf16`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.checkpoint.identity import Identity, require_same_config
from engine.checkpoint.load import load_for_sampling, require_fitting_codec, require_same_frozen
from engine.data.phrases import PhraseEncoder
from engine.data.scenes import KnownLabels
from engine.plan.propose import LayoutPlanner
from engine.sample.folder import FolderRecord, align_memory, contents_of
from engine.sample.inputs import precision_of
from engine.sample.transformer import StructMARTransformer
from models.frozen.codec import Autoencoder, Codec, codec_around, load_codec
from models.frozen.encoder import CaptionEncoder, encoder_around, load_text_encoder
from models.sampling.config import SamplingConfig, default_sampling
from models.structmar import StructMAR


class PipelineComponents(DiffusionPipeline):
    """What a pipeline is made of, loaded and saved.

    model, codec, caption_encoder: the components as the rest of the code uses them.
    identity: what the weights were made for, None around a model in training. source: where they come from.
    phrases: of boxes, each encoded once. planner: proposes layouts for captions without boxes, None: nothing does.
    precision: of calls. interrupt: set by a callback, ends the call after the iteration.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers reads both from the class
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012

    def __init__(
        self,
        transformer: StructMARTransformer,
        vae: Autoencoder,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        identity: Identity | None = None,
        codec: Codec | None = None,
        caption_encoder: CaptionEncoder | None = None,
        max_text_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        if codec is None:
            if identity is None:
                raise ValueError("make a pipeline by from_pretrained, from_checkpoint or from_parts")
            codec = codec_around(vae, identity.latent_scale, identity.vae_id)
            caption_encoder = encoder_around(text_encoder, tokenizer, max_text_tokens, identity.text_encoder_id)
        self.codec, self.identity = codec, identity
        self._caption_encoder = caption_encoder
        self.phrases = None if caption_encoder is None else PhraseEncoder(caption_encoder)
        self.source = ""
        self.planner: LayoutPlanner | None = None
        self.precision = "fp32"
        self.interrupt = False

    @classmethod
    def from_parts(
        cls,
        model: StructMAR,
        codec: Codec,
        caption_encoder: CaptionEncoder | None,
        identity: Identity | None = None,
    ) -> Self:
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
        planner_path: str | Path | None = None,
        max_text_tokens: int | None = None,
    ) -> Self:
        """From a training checkpoint or an exported file, and the frozen parts it was trained with. clip_path: the
        folder of the text encoder, CLIP or a language model. planner_path: see `load_planner`. max_text_tokens: read
        of a caption, None: the encoder's own number.

        Raises FileNotFoundError or ValueError naming the file that is missing or does not fit the weights.
        """
        loaded = load_for_sampling(path, device, use_ema=use_ema)
        model, identity = loaded.model, loaded.identity
        codec = load_codec(vae_path, device, identity.latent_scale)
        require_same_frozen("VAE", vae_path, codec.id, identity.vae_id, allow_other_frozen)
        require_fitting_codec(codec, vae_path, identity.config)
        encoder = load_text_encoder(clip_path, device, max_text_tokens)
        require_same_frozen("text encoder", clip_path, encoder.id, identity.text_encoder_id, allow_other_frozen)
        if encoder.dim != identity.config.text_dim:
            raise ValueError(
                f"text encoder {clip_path} has width {encoder.dim}, the checkpoint {identity.config.text_dim}"
            )
        pipeline = cls.from_parts(model, codec, encoder, identity)
        pipeline.source = str(path)
        if planner_path is not None:
            pipeline.load_planner(planner_path)
        return pipeline

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        planner_path: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """From a folder that `save_pretrained` wrote; nothing is downloaded. dtype: bfloat16 makes calls in bf16.
        planner_path: see `load_planner`.

        Raises FileNotFoundError or ValueError if it is no such folder, or a component has other contents than saved.
        """
        folder, precision = str(pretrained_model_name_or_path), precision_of(torch_dtype if dtype is None else dtype)
        record = FolderRecord.read(folder)
        kwargs = {"low_cpu_mem_usage": False, **kwargs}  # diffusers warns of a missing accelerate otherwise
        pipeline = super().from_pretrained(folder, **record.known, **kwargs)
        align_memory(pipeline.transformer, pipeline.vae, pipeline.text_encoder)
        record.require_same(pipeline._contents(), folder)
        require_same_config(pipeline.model.config, record.identity.config, f"{folder}/transformer/config.json")
        pipeline.model.eval()
        pipeline.source, pipeline.precision = folder, precision
        if planner_path is not None:
            pipeline.load_planner(planner_path)
        return pipeline

    def load_planner(self, path: str | Path) -> LayoutPlanner:
        """From now on, captions without boxes get layouts of this planner. Saved folders do not hold it.

        Raises FileNotFoundError or ValueError naming the file if it is no planner of these weights.
        """
        planner = LayoutPlanner.load(path, self.device)
        planner.require_fitting(self.known_labels, self.caption_encoder.id)
        self.planner = planner
        return planner

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
        FolderRecord(self.identity, self._contents(), self.caption_encoder.stated_cut).write(folder)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.to`; a dtype sets the precision of calls and leaves the weights float32."""
        given = [*args, *kwargs.values()]
        for dtype in (each for each in given if isinstance(each, torch.dtype)):
            self.precision = precision_of(dtype)
        args = tuple(each for each in args if not isinstance(each, torch.dtype))
        kwargs = {name: each for name, each in kwargs.items() if not isinstance(each, torch.dtype)}
        if args or kwargs:
            super().to(*args, **kwargs)
        if self.planner is not None:
            self.planner.model.to(self.device)
        return self

    @property
    def model(self) -> StructMAR:
        return self.transformer.model

    @property
    def caption_encoder(self) -> CaptionEncoder:
        """Raises ValueError for MAR's own weights, which have none."""
        if self._caption_encoder is None:
            raise ValueError("these are MAR's own weights, which know classes instead of captions: see draw_classes")
        return self._caption_encoder

    @property
    def known_labels(self) -> KnownLabels:
        """What the weights can place."""
        return KnownLabels.of(self.model.config, () if self.identity is None else self.identity.categories)

    @property
    def labels(self) -> list[str]:
        """The names that `phrases` may hold."""
        return [] if self.identity is None else [category.name for category in self.identity.categories]

    @property
    def own_sampling(self) -> SamplingConfig:
        """The options that the weights name; where they name none, the defaults of their head."""
        named = None if self.identity is None else self.identity.sampling
        return default_sampling(self.model.config.head) if named is None else named

    def require_guided_once(self, config: SamplingConfig) -> None:
        """Raises ValueError for guidance of weights that have it in them."""
        if self.identity is not None:
            self.identity.require_guided_once(config, self.source or "the model")

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

    def _contents(self) -> dict[str, str]:
        return contents_of(self.model, self.vae, self.caption_encoder.model, self.caption_encoder.tokenizer)
