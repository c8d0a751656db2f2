"""The arguments of a pipeline call, checked before anything runs and made into scenes, generators and options.

Every mistake is one ValueError that names the argument and the values, as in a layout file (engine/data/scenes.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from engine.data.scenes import KnownLabels, Scene, read_entry
from engine.sample.generate import Hooks, image_generator
from models.sampling.config import SamplingConfig, require_options_of
from util.plain import from_plain
from util.ranges import MAX_SEED

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
OPTION_NAMES = {
    "num_inference_steps": "num_iter",
    "num_diffusion_steps": "num_sampling_steps",
    "guidance_scale": "cfg_text",
    "layout_guidance_scale": "cfg_layout",
}
BOUNDS = ("clip_x0", "t_max", "num_sampling_steps_last", "top_k", "top_p", "mask_threshold", "start_step")
NO_BOUND: Literal["none"] = "none"
PRECISION_OF = {None: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16"}


class CallOptions(TypedDict, total=False):
    """The options of a call that have the names of the command line's flags; "none" takes away a bound."""

    cfg_schedule: str | None
    temperature: float | None
    clip_x0: float | Literal["none"] | None
    t_max: int | Literal["none"] | None
    num_sampling_steps_last: int | Literal["none"] | None
    order: str | None
    guidance_interval: tuple[float, float] | None
    uncond_refresh: int | None
    schedule: str | None
    choice_temperature: float | None
    top_k: int | Literal["none"] | None
    top_p: float | Literal["none"] | None
    prefix_k: int | None
    layout_schedule: tuple[float, float] | None
    layout_scale: float | None
    drop_grounding_tokens: bool | None
    mask_threshold: float | Literal["none"] | None
    start_step: int | Literal["none"] | None
    auto_update: bool | None
    negative_prompt: str | None


def read_scenes(
    prompt: Any,
    boxes: Any,
    phrases: Any,
    known: KnownLabels,
    num_images: Any,
    scales: Any = None,
    classes: Any = None,
) -> list[Scene]:
    """One scene per image: every prompt with its boxes `num_images` times.

    prompt: a string, or a list of them. boxes, phrases: the boxes and their labels; of a list of prompts, a list for
    each (or None where one has none). scales: how strongly each box counts, None: as the options say. classes: the
    label of each box whose phrase stands beside a label, None where it stands alone.
    """
    _require_count("num_images_per_prompt", num_images)
    is_single = isinstance(prompt, str)
    if not is_single and not (isinstance(prompt, list | tuple) and prompt):
        raise ValueError(f"prompt must be a string or a list of at least one, got {prompt!r}")
    prompts = [prompt] if is_single else list(prompt)
    for number, each in enumerate(prompts):
        if not isinstance(each, str):
            raise ValueError(f"prompt {number} must be a string, got {each!r}")
    boxes_of = _per_prompt("boxes", boxes, prompts, is_single)
    phrases_of = _per_prompt("phrases", phrases, prompts, is_single)
    scales_of = _per_prompt("subject_scales", scales, prompts, is_single)
    classes_of = _per_prompt("classes", classes, prompts, is_single)
    rows = zip(prompts, boxes_of, phrases_of, scales_of, classes_of, strict=True)
    scenes = [_read_scene(*row, f"prompt {number}", known) for number, row in enumerate(rows)]
    return [scene for scene in scenes for _ in range(num_images)]


def leave_open(prompt: Any, boxes: Any, num_images: int) -> list[bool]:
    """Of each image, whether the call has a caption for it and says nothing of its boxes: `None`, which is not "none",
    []. The arguments are those that `read_scenes` has read."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    entries = [boxes] * len(prompts) if isinstance(prompt, str) or boxes is None else list(boxes)
    pairs = zip(prompts, entries, strict=True)
    return [entry is None and bool(each.strip()) for each, entry in pairs for _ in range(num_images)]


def sized(scenes: Sequence[Scene], height: Any, width: Any, own: int) -> list[Scene]:
    """The scenes in this size; a side that is None is the model's own. Raises ValueError for what is no number of
    pixels."""
    if height is None and width is None:
        return list(scenes)
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            _require_count(name, value)
    size = (own if height is None else height, own if width is None else width)
    return [replace(scene, size=size) for scene in scenes]


def _per_prompt(name: str, value: Any, prompts: Sequence[Any], is_single: bool) -> list[list[Any]]:
    """The entries of each prompt, as lists."""
    entries = [value] if is_single else [None] * len(prompts) if value is None else listed(value)
    if not isinstance(entries, list) or len(entries) != len(prompts):
        raise ValueError(f"{name} must hold one list for each of the {len(prompts)} prompts, got {value!r}")
    own = [[] if entry is None else listed(entry) for entry in entries]
    for number, entry in enumerate(own):
        if not isinstance(entry, list):
            raise ValueError(f"prompt {number}: {name} must be a list, got {entry!r}")
    return own


def _read_scene(
    prompt: Any,
    boxes: list[Any],
    phrases: list[Any],
    scales: list[Any],
    classes: list[Any],
    where: str,
    known: KnownLabels,
) -> Scene:
    if len(boxes) != len(phrases):
        raise ValueError(f"{where}: every box needs its phrase, got {len(boxes)} boxes and {len(phrases)} phrases")
    if scales and len(scales) != len(boxes):
        raise ValueError(f"{where}: {len(boxes)} boxes need as many subject_scales, got {len(scales)}")
    if classes and len(classes) != len(boxes):
        raise ValueError(f"{where}: {len(boxes)} boxes need as many classes, got {len(classes)}")
    objects = [{"label": phrase, "bbox": listed(box)} for phrase, box in zip(phrases, boxes, strict=True)]
    for item, scale in zip(objects, scales, strict=False):
        if scale is not None:
            item["scale"] = scale
    for item, label in zip(objects, classes, strict=False):
        if label is not None:
            item |= {"label": label, "phrase": item["label"]}
    return read_entry({"prompt": prompt, "objects": objects}, where, known)


def listed(value: Any) -> Any:
    """Tuples, arrays and tensors as lists; anything else as it is, for the checks to name."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def read_generators(seed: Any, generator: Any, num_images: int) -> list[torch.Generator]:
    """One generator per image. seed: of the first image, the next ones count up. generator: one that all images draw
    from in turn, or one for each. With neither, a seed is drawn from torch's global generator."""
    if seed is not None and generator is not None:
        raise ValueError(f"give either seed or generator, got seed {seed!r} and a generator")
    if generator is not None:
        given = list(generator) if isinstance(generator, list | tuple) else [generator] * num_images
        if len(given) != num_images or not all(isinstance(each, torch.Generator) for each in given):
            kinds = ", ".join(sorted({type(each).__name__ for each in given}))
            raise ValueError(
                f"generator must be a torch.Generator, or one for each of the {num_images} images, "
                f"got {len(given)} ({kinds})"
            )
        return given
    if seed is None:
        seed = int(torch.randint(MAX_SEED, ()))
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be a whole number in 0 ... {MAX_SEED}, got {seed!r}")
    return [image_generator(seed + index) for index in range(num_images)]


def read_options(
    own: SamplingConfig,
    given: Mapping[str, Any],
    num_tokens: int,
    check: Callable[[SamplingConfig], None] = lambda config: None,
) -> SamplingConfig:
    """The weights' own options with those of the call that are not None. Names as in the call or as the flags; "none"
    takes away a bound that the weights name. check: raises ValueError for options that the weights cannot take."""
    unknown = sorted(given.keys() - OPTION_NAMES.keys() - CallOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"a call takes no argument {', '.join(unknown)}")
    changes = {name: value for name, value in given.items() if value is not None}
    no_bound = {name for name in BOUNDS if isinstance(changes.get(name), str) and changes[name] == NO_BOUND}
    renamed = {OPTION_NAMES.get(name, name): None if name in no_bound else value for name, value in changes.items()}
    try:
        require_options_of(own.head, renamed)
        config = from_plain(SamplingConfig, asdict(own) | renamed, "sampling options")
        check(config)
    except ValueError as error:
        message = str(error)
        for name in changes.keys() & OPTION_NAMES.keys():
            message = re.sub(rf"\b{OPTION_NAMES[name]}\b", name, message)
        raise ValueError(message) from error
    if config.num_iter > num_tokens:
        raise ValueError(f"num_inference_steps {config.num_iter} exceeds the {num_tokens} tokens of an image")
    config.require_fitting(num_tokens)
    return config


def check_call(output_type: Any, batch_size: Any, callback_inputs: Sequence[str], allowed: Sequence[str]) -> None:
    """The arguments that are neither scenes nor options."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    _require_count("batch_size", batch_size)
    unknown = [name for name in callback_inputs if name not in allowed]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {list(allowed)}, got {unknown}")


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")


def precision_of(dtype: torch.dtype | None) -> str:
    """The sampler's word for a dtype; None is float32."""
    if dtype not in PRECISION_OF:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    return PRECISION_OF[dtype]


def one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """An argument that has two names."""
    if value is not None and other is not None:
        raise ValueError(f"give either {name} or {alias}, which mean the same, not both")
    return other if value is None else value


def call_hooks(
    config: SamplingConfig,
    tick: Callable[[], Any],
    callback: Callable[[int, int, dict[str, Tensor]], dict[str, Tensor] | None] | None,
    names: Sequence[str],
    should_stop: Callable[[], bool],
) -> Hooks:
    """What a call lets its caller see and change. callback: gets (iteration, iterations left, tensors by `names`)."""

    def on_iteration(iteration: int, tokens: Tensor) -> Tensor | None:
        tick()
        if callback is None:
            return None
        offered = {"tokens": tokens} if "tokens" in names else {}
        changed = (callback(iteration, config.num_passes - 1 - iteration, offered) or {}).get("tokens")
        if changed is not None and changed.shape != tokens.shape:
            raise ValueError(
                f"callback_on_step_end gave tokens of shape {tuple(changed.shape)}, expected {tuple(tokens.shape)}"
            )
        return changed

    return Hooks(on_iteration, should_stop)
