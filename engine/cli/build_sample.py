"""From parsed arguments to sampled images (scripts/sample.py): every input read and checked, then drawn and written."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint.files import read_identity
from engine.checkpoint.identity import Identity, require_same_categories
from engine.checkpoint.load import load_mar_for_sampling, require_fitting_codec
from engine.cli.arguments_edit import boxes_of, moves_of
from engine.cli.arguments_planner import AUTO
from engine.cli.sampling import FLAGS, sampling_config
from engine.data.layout_formats import FileFormat
from engine.data.scenes import KnownLabels, Scene, read_layout_file, scenes_from_dataset, text_scene
from engine.plan.propose import layout_generators
from engine.sample.changes import Changes, Move
from engine.sample.editing import (
    Edit,
    Starts,
    iterations_from,
    require_one_size,
    rows_alike,
    start_of_prefix,
    starts_of_edits,
)
from engine.sample.generate import batches, image_generator, require_drawable, rows_by_size
from engine.sample.grid import scene_grid
from engine.sample.holes import hole_of_mask
from engine.sample.naming import told_names
from engine.sample.output import GRID_NAME, LIST_NAME, MADE_WITH, picture_name, picture_text, replacing, require_free
from engine.sample.pipeline import StructMARPipeline
from engine.sample.speech import measure_latency, transcribe
from engine.train.parallel import compile_parts
from models.config import StructMARConfig, backbone_config
from models.frozen.codec import load_codec
from models.frozen.speech import PipelineTranscriber, Transcriber
from models.sampling.auto_layout import require_maps
from models.sampling.config import SamplingConfig
from util.buckets import read_size
from util.coco import BoxFilters, CocoIndex
from util.config import resolved_dict, told_as_flags
from util.distributed import init_distributed
from util.images import Picture, load_image, save_png
from util.logging import progress, setup_logging
from util.output import held_folder
from util.read import short_path

logger = logging.getLogger(__name__)

GRID_MAX = 64  # images
MAX_GRID_PIXELS = 4 * 10**8


@dataclass(frozen=True)
class Job:
    """Everything checked and loaded, ready to run. labels: one per image, for MAR's own weights only. starts: what each
    image begins from, None: nothing."""

    pipeline: StructMARPipeline
    scenes: list[Scene]
    labels: list[int] | None
    seeds: list[int]
    config: SamplingConfig
    starts: Starts | None = None


def draw_samples(args: argparse.Namespace, sampling_note: str | None) -> str:
    """Gives a line that says what was written. Raises ValueError or FileNotFoundError before anything is drawn.

    sampling_note: what the log says of sampling options that come from the weights.
    """
    setup_logging()
    if sampling_note:
        logger.info(sampling_note)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = init_distributed(args.device).device
    heard = hear(args, device) if args.speech else None
    prompt = args.prompt if heard is None else heard.prompt
    job = prepare_classes(args, device) if args.class_label else prepare_scenes(args, device, prompt)
    if args.compile or args.cuda_graphs:
        compile_parts(job.pipeline.model, args.cuda_graphs)
    logger.info(f"{len(job.scenes)} images on {device}, {args.batch_size} at a time")
    written = run(job, args.batch_size, args.precision, Path(args.output_dir), resolved_dict(args))
    if heard is None or not args.speech_repeats:
        return written
    return f"{written}\n{latency_table(job, heard, args.batch_size, args.precision, args.speech_repeats)}"


@dataclass(frozen=True)
class Heard:
    """A spoken caption and who understood it."""

    path: str
    transcriber: Transcriber
    prompt: str


def hear(args: argparse.Namespace, device: torch.device) -> Heard:
    """The caption that --speech says. Raises FileNotFoundError or ValueError naming what is wrong with which file."""
    transcriber = PipelineTranscriber.load(args.asr_path, device)
    prompt = transcribe(args.speech, transcriber)
    logger.info(f"heard in {args.speech}: {prompt}")
    return Heard(args.speech, transcriber, prompt)


def latency_table(job: Job, heard: Heard, batch_size: int, precision: str, repeats: int) -> str:
    """What each part of the way from sound to the first batch of pictures takes."""
    rows = rows_by_size(job.scenes)[0][:batch_size]
    scenes, seeds = [job.scenes[row] for row in rows], [job.seeds[row] for row in rows]
    way = (job.pipeline, heard.transcriber, heard.path, scenes, seeds, job.config, precision)
    return measure_latency(*way, repeats).table()


def prepare_scenes(args: argparse.Namespace, device: torch.device, prompt: str | None) -> Job:
    """The scenes, a StructMAR checkpoint that knows their labels, and the frozen parts it was trained with."""
    identity = read_identity(args.resume)
    if identity is None:
        raise ValueError(f"{args.resume} holds MAR's weights, which know no captions: sample them with --class_label")
    config = sampling_config(args)
    scenes, edits = read_edits(args, identity.config, read_scenes(args, identity, prompt))
    require_drawable(identity.config, config, scenes)
    require_grid(args.grid_scale, identity.config.img_size, scenes)
    require_free(Path(args.output_dir), len(scenes))
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device, args.ema, args.allow_other_frozen,
        max_text_tokens=args.max_text_tokens,
    )  # fmt: skip
    if args.rope_scale is not None:
        pipeline.model.set_rope_scale(args.rope_scale)
    seeds = seeds_of(args, len(scenes))
    if args.layout == AUTO:
        scenes = propose_layouts(args, pipeline, scenes, seeds)
    if config.mask_threshold is not None:
        require_maps(pipeline.model, f"--mask_threshold {config.mask_threshold}")
        logger.info(told_names(pipeline.caption_encoder, scenes))
    starts = read_starts(args, pipeline, scenes, edits)
    return Job(pipeline, scenes, None, seeds, config, starts)


def propose_layouts(
    args: argparse.Namespace, pipeline: StructMARPipeline, scenes: Sequence[Scene], seeds: Sequence[int]
) -> list[Scene]:
    """The captions with boxes of --planner_path, drawn by the images' seeds. Raises ValueError naming the planner if it
    does not fit the weights."""
    planner = pipeline.load_planner(args.planner_path)
    generators = layout_generators([image_generator(seed) for seed in seeds])
    encoder, temperature = pipeline.caption_encoder, args.planner_temperature
    return planner.scenes(scenes, pipeline.known_labels, encoder, generators, temperature)


def prepare_classes(args: argparse.Namespace, device: torch.device) -> Job:
    """MAR's own weights and class indices."""
    identity = read_identity(args.resume)
    sizes = {name: vars(args)[name] for name in ("diffloss_d", "diffloss_w", "img_size", "class_num")}
    overrides = {name: value for name, value in sizes.items() if value is not None}
    architecture = backbone_config(args.model, **overrides) if identity is None else identity.config
    for label in args.class_label:
        if not 0 <= label < architecture.class_num:
            raise ValueError(f"--class_label {label} is outside 0 ... {architecture.class_num - 1}")
    config = sampling_config(args)
    with told_as_flags(FLAGS):
        config.require_uncontrolled("--class_label: classes have neither captions nor boxes")
    config.require_fitting(math.prod(architecture.unit_grid()))
    labels = [label for label in args.class_label for _ in range(args.num_images)]
    scenes, edits = read_edits(args, architecture, [text_scene(f"class {label}") for label in labels])
    require_grid(args.grid_scale, architecture.img_size, scenes)
    require_free(Path(args.output_dir), len(labels))
    codec = load_codec(args.vae_path, device)
    require_fitting_codec(codec, args.vae_path, architecture)
    model = load_mar_for_sampling(args.resume, architecture, device, use_ema=args.ema)
    pipeline = StructMARPipeline.from_parts(model, codec, caption_encoder=None)
    pipeline.source = args.resume
    starts = read_starts(args, pipeline, scenes, edits)
    return Job(pipeline, scenes, labels, seeds_of(args, len(labels)), config, starts)


def read_edits(
    args: argparse.Namespace, config: StructMARConfig, scenes: list[Scene]
) -> tuple[list[Scene], list[Edit] | None]:
    """The scenes that are drawn and what each keeps of --image; None without one. Raises FileNotFoundError or
    ValueError naming the file."""
    if not args.image:
        if any(scene.edited for scene in scenes):
            file = short_path(args.layout)
            raise ValueError(f"layout file {file}: 'edit' needs --image, the picture that it changes")
        return scenes, None
    picture, where = np.asarray(load_image(args.image)), f"image {short_path(args.image)}"
    changes = Changes(
        mask=hole_of_mask(np.asarray(load_image(args.mask))) if args.mask else None,
        edit_boxes=boxes_of(args.edit_boxes, "--edit_boxes"),
        keep_boxes=boxes_of(args.keep_boxes, "--keep_boxes"),
        outpaint=None if args.outpaint is None else tuple(args.outpaint),
        move=[Move(name, box) for name, box in moves_of(args.move)],
        remove=args.remove or (),
        keep_pixels=args.keep_pixels,
    )
    where = f"{where}, {short_path(args.mask)}" if args.mask else where
    unique = {id(scene): scene for scene in scenes}
    changed = {key: changes.of(config, scene, picture, where) for key, scene in unique.items()}
    drawn, edits = zip(*(changed[id(scene)] for scene in scenes), strict=True)
    return list(drawn), list(edits)


def read_starts(
    args: argparse.Namespace, pipeline: StructMARPipeline, scenes: Sequence[Scene], edits: Sequence[Edit] | None
) -> Starts | None:
    """What the images begin from. Raises FileNotFoundError or ValueError naming the file."""
    model, codec = pipeline.model, pipeline.codec
    if edits is not None:
        starts = starts_of_edits(model, codec, edits)
        require_one_size(model.config, scenes, starts)
        return starts
    if args.prefix_k and args.prefix_source != "self":
        return [start_of_prefix(model, codec, args.prefix_source, args.prefix_k)] * len(scenes)
    return None


def require_grid(scale: int | None, img_size: int, scenes: Sequence[Scene]) -> None:
    """Raises ValueError for a grid that would not fit into memory. img_size: the model's own."""
    sizes = [scene.size or (img_size, img_size) for scene in scenes]
    cell = max(height for height, _ in sizes) * max(width for _, width in sizes)
    pixels = min(len(scenes), GRID_MAX) * cell * (scale or 1) ** 2
    if pixels > MAX_GRID_PIXELS:
        raise ValueError(
            f"--grid_scale {scale} makes a grid of {pixels / 1e6:.0f} megapixels, at most {MAX_GRID_PIXELS / 1e6:.0f}"
        )


def seeds_of(args: argparse.Namespace, num_images: int) -> list[int]:
    return [args.seed + index for index in range(num_images)]


def read_scenes(args: argparse.Namespace, identity: Identity, prompt: str | None) -> list[Scene]:
    """One scene per image: each scene of a layout file `--num_images` times, a dataset's scenes once.

    prompt: the caption, written or heard; None: the layout file's.
    """
    size, config, categories = None if args.size is None else read_size(args.size), identity.config, identity.categories
    if args.coco_root:
        filters = BoxFilters(max_objects=config.max_objects, unknown="phrase" if config.phrases else "refuse")
        index = CocoIndex.load(args.coco_root, args.coco_split, filters, config.img_size)
        require_same_categories(index.categories, categories, f"{args.coco_root} {args.coco_split}")
        return scenes_from_dataset(index, config.img_size, args.num_images, size)
    if args.layout and args.layout != AUTO:
        said = FileFormat(args.layout_format, None if args.layout_canvas is None else read_size(args.layout_canvas))
        scenes = read_layout_file(args.layout, KnownLabels.of(config, categories), prompt, said)
        if args.subject_scales is not None:
            where = f"--subject_scales, layout file {short_path(args.layout)}"
            scenes = [scene.with_scales(args.subject_scales, f"{where}, entry {i}") for i, scene in enumerate(scenes)]
    else:
        assert prompt is not None, "the flags were checked: there is a layout file, a dataset or a caption"
        scenes = [text_scene(prompt)]
    if size is not None:
        scenes = [replace(scene, size=size) for scene in scenes]
    return [scene for scene in scenes for _ in range(args.num_images)]


def run(job: Job, batch_size: int, precision: str, output_dir: Path, settings: dict[str, Any]) -> str:
    """Writes all images, the grid and the list, which then replace those of an earlier run. Returns what it did, and
    how long it took from captions to pictures."""
    total = len(job.scenes)
    with held_folder(output_dir), replacing(output_dir) as folder:
        start = time.perf_counter()
        images = write_images(job, batch_size, precision, folder, settings)
        seconds = time.perf_counter() - start
        grid = scene_grid(images, job.scenes[: len(images)], settings["grid_columns"], settings["grid_scale"])
        save_png(grid, folder / GRID_NAME, {MADE_WITH: json.dumps(settings)})
        write_json(job, folder / LIST_NAME, settings)
    shown = "" if total <= GRID_MAX else f" of the first {GRID_MAX}"
    took = f"in {seconds:.1f} s, {seconds / total:.2f} s an image"
    return f"wrote {total} images to {output_dir} {took}; grid{shown}: {output_dir / GRID_NAME}"


def write_images(job: Job, batch_size: int, precision: str, folder: Path, settings: dict[str, Any]) -> list[Picture]:
    """Samples batch by batch, writing each image as soon as its batch is done; gives the first `GRID_MAX`."""
    groups = rows_alike(job.pipeline.model.config, job.scenes, job.starts)
    shown: dict[int, Picture] = {}
    own = [None if job.starts is None else [job.starts[row] for row in group] for group in groups]
    sizes = zip(own, map(len, groups), strict=True)
    total = sum(iterations_from(starts, size, batch_size, job.config) for starts, size in sizes)
    bar: tqdm[Any] = progress(total=total, desc="sampling")

    def tick() -> None:
        bar.update()

    with bar:
        for rows in (group[chosen] for group in groups for chosen in batches(len(group), batch_size)):
            for index, image in zip(rows, sample_batch(job, rows, precision, tick), strict=True):
                save_png(image, folder / picture_name(index), png_text(job, index, settings))
                if index < GRID_MAX:
                    shown[index] = image
    return [shown[index] for index in sorted(shown)]


def sample_batch(job: Job, rows: Sequence[int], precision: str, on_iteration: Callable[[], None]) -> list[Picture]:
    """rows: of images that are drawn in one go."""
    options = (job.config, [job.seeds[row] for row in rows], len(rows), precision, on_iteration)
    starts = None if job.starts is None else [job.starts[row] for row in rows]
    if job.labels is not None:
        return job.pipeline.draw_classes([job.labels[row] for row in rows], *options, starts=starts)
    return job.pipeline.draw([job.scenes[row] for row in rows], *options, starts=starts)


def image_entry(job: Job, index: int) -> dict[str, Any]:
    """What image `index` was made from: its prompt and objects as in a layout file, its seed, its class."""
    entry = {**job.scenes[index].to_dict(), "seed": job.seeds[index]}
    return entry if job.labels is None else {"class_label": job.labels[index], "seed": job.seeds[index]}


def png_text(job: Job, index: int, settings: dict[str, Any]) -> dict[str, str]:
    """Text of one PNG."""
    return picture_text(image_entry(job, index), job.config, job.pipeline.describe(), settings)


def write_json(job: Job, path: Path, settings: dict[str, Any]) -> None:
    images = [{"file": picture_name(index), **image_entry(job, index)} for index in range(len(job.scenes))]
    content = {
        "settings": settings,
        "sampling": asdict(job.config),
        "checkpoint": job.pipeline.describe(),
        "images": images,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
