"""What a set of weights was made for: one record, written into every file of ours and compared before weights are used.

A training checkpoint holds it as entries of its dictionary, an exported `.safetensors` as strings of its metadata:
    config: the model's sizes. categories: [{"id", "name"}, ...]. vae: {"id", "latent_scale"}. text_encoder: {"id"}.
    stage. step. sampling: the options to sample with, where the file says so. reward_detector: where there was one.
    class_names: of labels 0, 1, ..., where the weights were trained on labelled pictures. guidance: the scales of text
    and layout, where guidance was trained into the weights.
    In an exported file also weights: "ema" or "raw", and format: "structmar-1".
The VAE and the text encoder are frozen and not inside: they are named by their ids (sha256), and others are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.config import StructMARConfig
from models.sampling.config import MAX_GUIDANCE, SamplingConfig
from models.sampling.few import require_head_of
from util.plain import from_plain
from util.read import short_repr
from util.types import Category, require_distinct

EXPORT_FORMAT = "structmar-1"
METADATA_KEYS = ("format", "config", "categories", "vae", "text_encoder", "stage", "step", "weights")
_JSON_KEYS = ("config", "categories", "vae", "text_encoder", "sampling", "class_names", "guidance")

TRAINING_FIELDS = (
    "diffusion_batch_mul",
    "attn_dropout",
    "proj_dropout",
    "grad_checkpointing",
    "label_smoothing",
    "loss_on",
    "rope_scale",
)  # may change between runs
NOT_OF_BACKBONES = ("num_categories", "text_dim", "rope_mode", "max_objects", "class_num", "cross_attn_every",
                    "layout_bias_value", "layout_bias_encoder", "layout_bias_decoder", "layout_fourier",
                    "size_condition", "phrases", "few_step_head")  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """What weights are made for. Weights of another identity are refused, except where MAR's weights know none of it.

    text_encoder_id: "" for a model without text parts. stage, step: where they were written; step counts that stage's
    optimizer steps. weights: "ema" or "raw". reward_detector_id: sha256 of the detector whose verdict they were trained
    on, None if on none. sampling: the options to sample them with, None if the file does not say. class_names: of the
    labels 0, 1, ...; none where they were trained on captions. guidance: the scales of text and layout whose guided
    predictions the weights give on their own; such weights are sampled without guidance. None: of no guidance.
    Raises ValueError if the number of categories is not the model's, or a value is out of range.
    """

    config: StructMARConfig
    vae_id: str
    latent_scale: float
    text_encoder_id: str
    categories: tuple[Category, ...]
    stage: str = ""
    step: int = 0
    weights: str = "raw"
    reward_detector_id: str | None = None
    sampling: SamplingConfig | None = None
    class_names: tuple[str, ...] = ()
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.categories) != self.config.num_categories:
            raise ValueError(f"{len(self.categories)} categories, but the model has {self.config.num_categories}")
        if self.class_names and len(self.class_names) != self.config.class_num:
            found, wanted = len(self.class_names), self.config.class_num
            raise ValueError(f"{found} class names, but the model has class_num {wanted}")
        if not (math.isfinite(self.latent_scale) and self.latent_scale > 0):
            raise ValueError(f"latent_scale must be positive and finite, got {self.latent_scale}")
        if self.step < 0:
            raise ValueError(f"step must not be negative, got {self.step}")
        if self.sampling is not None:
            require_head_of(self.sampling, self.config)
        if self.weights not in ("ema", "raw"):
            raise ValueError(f"weights must be 'ema' or 'raw', got '{self.weights}'")
        for scale in self.guidance or ():
            if not 0 <= scale <= MAX_GUIDANCE:  # NaN is refused too
                raise ValueError(f"guidance must be scales in [0, {MAX_GUIDANCE:g}], got {scale}")
        if self.sampling is not None:
            self.require_guided_once(self.sampling, "the file")

    def require_guided_once(self, sampling: SamplingConfig, source: str | Path) -> None:
        """Raises ValueError naming the weights, the option and both values if it would guide what is guided already."""
        if self.guidance is None:
            return
        text, layout = self.guidance
        for name, scale in (("cfg_text", sampling.cfg_text), ("cfg_layout", sampling.cfg_layout)):
            if scale != 1:
                raise ValueError(
                    f"{source} has guidance trained into its weights (text {text:g}, layout {layout:g}) and is sampled "
                    f"without any: {name} must be 1, got {scale:g}"
                )

    def to_dict(self) -> dict[str, Any]:
        """As the plain entries of a training checkpoint: all but `weights`, as it holds raw and averaged ones."""
        entries = {
            "stage": self.stage,
            "step": self.step,
            "config": self.config.to_dict(),
            "vae": {"id": self.vae_id, "latent_scale": self.latent_scale},
            "text_encoder": {"id": self.text_encoder_id},
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }
        if self.class_names:
            entries["class_names"] = list(self.class_names)
        if self.guidance is not None:
            entries["guidance"] = list(self.guidance)
        if self.reward_detector_id is not None:
            entries["reward_detector"] = self.reward_detector_id
        if self.sampling is not None:
            entries["sampling"] = self.sampling.to_dict()
        return entries

    @staticmethod
    def from_dict(entries: Mapping[str, Any], source: str | Path, weights: str) -> Identity:
        """The inverse of `to_dict`; other entries are left alone. weights: which of the file's are meant.

        Raises ValueError naming `source` and what is malformed.
        """
        try:
            sampling = entries.get("sampling")
            vae_id, latent_scale = _fields(entries["vae"], "vae", id=str, latent_scale=float)
            (text_encoder_id,) = _fields(entries["text_encoder"], "text_encoder", id=str)
            stage, step = _fields(entries, "the file", stage=str, step=int)
            return Identity(
                config=StructMARConfig.from_dict(entries["config"]),
                vae_id=vae_id,
                latent_scale=float(latent_scale),
                text_encoder_id=text_encoder_id,
                categories=_categories(entries["categories"]),
                class_names=_class_names(entries.get("class_names", [])),
                guidance=_guidance(entries.get("guidance")),
                stage=stage,
                step=step,
                weights=weights,
                reward_detector_id=entries.get("reward_detector"),
                sampling=None if sampling is None else from_plain(SamplingConfig, sampling, "sampling options"),
            )
        except KeyError as error:
            raise ValueError(f"{source} has malformed metadata: {error} is missing") from error
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"{source} has malformed metadata: {error}") from error

    def to_metadata(self) -> dict[str, str]:
        """As the strings that a safetensors header holds."""
        entries = {**self.to_dict(), "weights": self.weights, "format": EXPORT_FORMAT}
        return {key: json.dumps(value) if key in _JSON_KEYS else str(value) for key, value in entries.items()}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], source: str | Path) -> Identity:
        """The inverse of `to_metadata`. Raises ValueError naming `source` and what is missing or malformed."""
        missing = [key for key in METADATA_KEYS if key not in metadata]
        if missing:
            raise ValueError(f"{source} lacks the metadata {missing}: export it with python -m scripts.export_weights")
        if metadata["format"] != EXPORT_FORMAT:
            raise ValueError(f"{source} has format '{metadata['format']}', this version reads '{EXPORT_FORMAT}'")
        entries: dict[str, Any] = {}
        for key, text in metadata.items():
            try:
                entries[key] = json.loads(text) if key in _JSON_KEYS else text
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source} has malformed metadata: {key}: {error}") from error
        with suppress(ValueError):
            entries["step"] = int(metadata["step"])
        return Identity.from_dict(entries, source, metadata["weights"])


def _fields(entries: Any, where: str, **kinds: type) -> list[Any]:
    """The named fields of a record, in order. Raises ValueError that begins with `where` and names field and value."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} must be names and values, got {short_repr(entries)}")
    for name, kind in kinds.items():
        if name not in entries:
            raise ValueError(f"{where} lacks '{name}'")
        value = entries[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{where}: {name} must be {kind.__name__}, got {short_repr(value)}")
    return [entries[name] for name in kinds]


def _categories(entries: Any) -> tuple[Category, ...]:
    if not isinstance(entries, list):
        raise ValueError(f"categories must be a list, got {short_repr(entries)}")
    found = [Category(*_fields(each, f"categories[{index}]", id=int, name=str)) for index, each in enumerate(entries)]
    require_distinct(found, "categories")
    return tuple(found)


def _class_names(entries: Any) -> tuple[str, ...]:
    if not isinstance(entries, list) or not all(type(name) is str for name in entries):
        raise ValueError(f"class_names must be a list of texts, got {short_repr(entries)}")
    return tuple(entries)


def _guidance(entries: Any) -> tuple[float, float] | None:
    if entries is None:
        return None
    if not isinstance(entries, list) or len(entries) != 2 or any(type(each) not in (int, float) for each in entries):
        raise ValueError(f"guidance must be the scales of text and of layout, got {short_repr(entries)}")
    return float(entries[0]), float(entries[1])


def require_same_identity(
    found: Identity,
    expected: Identity,
    source: str | Path | None,
    is_backbone: bool,
    is_start: bool = False,
    adds_few_step: bool = False,
) -> None:
    """Raises ValueError naming the file, the field and both values if the weights were made for something else.

    is_backbone: the weights have no text or layout parts, hence know no captions and no categories. is_start: a run
    begins with them, and may add the parts for phrases of boxes. adds_few_step: it may add a few-step head too.
    """
    skipped = {*TRAINING_FIELDS, *(NOT_OF_BACKBONES if is_backbone else ())}
    if is_start and expected.config.phrases:
        skipped |= {"phrases"}
    if is_start and adds_few_step:
        skipped |= {"few_step_head"}
    if found.config.rope_mode != "off":  # weights that were trained with rotations need them
        skipped -= {"rope_mode"}
    require_same_config(found.config, expected.config, source, skipped)
    frozen_flag = "--vae_path or --latent_scale"
    _refuse_other(source, "vae id", found.vae_id, expected.vae_id, frozen_flag)
    _refuse_other(source, "vae latent_scale", found.latent_scale, expected.latent_scale, frozen_flag)
    if not is_backbone:
        _refuse_other(source, "text_encoder id", found.text_encoder_id, expected.text_encoder_id, "--text_encoder")
        _refuse_other(
            source, "categories", *_first_difference(found.categories, expected.categories), "--coco_root"
        )  # fmt: skip


def require_same_classes(found: Identity, expected: Identity, source: str | Path | None) -> None:
    """Raises ValueError naming the file and the first label with another name, or both numbers of classes. Weights that
    do not say what their labels stand for are taken."""
    if found.class_names and found.class_names != expected.class_names:
        said = f"{len(found.class_names)} classes, here {len(expected.class_names)}"
        for label, (one, other) in enumerate(zip(found.class_names, expected.class_names, strict=False)):
            if one != other:
                said = f"label {label} is {one!r}, here {other!r}"
                break
        raise ValueError(f"{source} was trained on other classes: {said} (see --class_root)")


def require_same_config(
    found: StructMARConfig, expected: StructMARConfig, source: str | Path | None, skipped: Collection[str] = ()
) -> None:
    """Raises ValueError naming the source, the fields and both values if the architectures differ."""
    here = expected.to_dict()
    differing = [
        f"{name} {value} in the file, {here[name]} here"
        for name, value in found.to_dict().items()
        if name not in skipped and value != here[name]
    ]
    if differing:
        raise ValueError(f"{source} was made for another architecture: {'; '.join(differing)}")


def _refuse_other(source: str | Path | None, field: str, found: Any, wanted: Any, flag: str) -> None:
    if found != wanted:
        raise ValueError(f"{source} was made with {field} {found}, this run has {wanted} (see {flag})")


def _first_difference(found: tuple[Category, ...], wanted: tuple[Category, ...]) -> tuple[Any, Any]:
    """The first entries that differ, or both lengths: eighty names would hide what is wrong."""
    for one, other in zip(found, wanted, strict=False):
        if one != other:
            return asdict(one), asdict(other)
    return len(found), len(wanted)


def require_same_categories(found: Sequence[Category], trained: Sequence[Category], where: str) -> None:
    """Raises ValueError naming both lists if a dataset's categories are not those the weights were trained with."""
    if tuple(found) != tuple(trained):
        raise ValueError(
            f"{where} has the categories {_names(found)}, but the checkpoint was trained with {_names(trained)}"
        )


def _names(categories: Sequence[Category]) -> str:
    names = [f"{category.id} {category.name}" for category in categories]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
