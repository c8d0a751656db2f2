"""From parsed arguments to pictures, captions and both by MARS (scripts/sample.py, caption.py, tell.py): every input
read and checked, then drawn or written."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.checkpoint.mars_weights import read_mars_identity, require_use
from engine.data.scenes import scenes_from_dataset, text_scene
from engine.sample.generate import batches
from engine.sample.grid import scene_grid
from engine.sample.mars import MarsPipeline, Told
from engine.sample.output import (
    GRID_NAME,
    LIST_NAME,
    MADE_WITH,
    PAGE_NAME,
    picture_name,
    picture_text,
    replacing,
    require_free,
)
from models.config import PRECISIONS
from models.mars.decoding import JointOptions
from models.mars.sampling import DrawOptions
from util.buckets import Size, read_size
from util.coco import CocoIndex
from util.config import resolved_dict, told_as_flags
from util.distributed import init_distributed
from util.images import Picture, load_image, save_png
from util.logging import progress, setup_logging
from util.output import held_folder, write_text_atomic

GRID_MAX = 64  # images
SMALL = "small"  # in what is written down of weights that make pictures larger: those that drew the small ones


def open_pipeline(args: argparse.Namespace, upscale: str = "") -> MarsPipeline:
    """The weights and frozen parts that the flags name. upscale: weights that make pictures larger, in the place of
    --resume. Raises FileNotFoundError or ValueError naming file and flag."""
    setup_logging()
    path = upscale or args.resume
    require_use(path, read_mars_identity(path), bool(upscale))  # before anything large is opened
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device, dtype = init_distributed(args.device).device, getattr(torch, PRECISIONS[args.precision])
    frozen = (args.lm_path, args.vae_path)
    return MarsPipeline.from_checkpoint(
        path, *frozen, device, dtype, args.ema, args.allow_other_frozen, bool(upscale)
    )  # fmt: skip


def draw_options(args: argparse.Namespace, has_guidance: bool) -> DrawOptions:
    """has_guidance: whether a flag says how strong it is; else it is that of `DrawOptions`."""
    options = DrawOptions(temperature=args.temperature, top_k=args.top_k)
    scale = args.cfg if args.cfg_text is None else args.cfg_text
    return replace(options, guidance=scale) if has_guidance else options


def draw_mars(args: argparse.Namespace, has_guidance: bool) -> str:
    """Pictures of captions, made larger where --upscale names weights for it. Gives a line that says what was written.
    Raises ValueError or FileNotFoundError before anything is drawn."""
    options = draw_options(args, has_guidance)
    args.cfg = options.guidance  # what is written down is what is used
    pipeline = open_pipeline(args)
    larger = open_pipeline(args, args.upscale) if args.upscale else None
    size = None if args.size is None else read_size(args.size)
    prompts = read_prompts(args, size or pipeline.size)
    negative = args.negative_prompt or ""
    options = replace(options, grid=pipeline.grid_of(size))
    pipeline.require_drawable(prompts, negative, options)
    if larger is not None:
        larger.require_larger_of(pipeline)
        larger.require_drawable(prompts, negative, replace(options, grid=None))
    output_dir = Path(args.output_dir)
    require_free(output_dir, len(prompts))
    seeds = [args.seed + index for index in range(len(prompts))]
    last = pipeline if larger is None else larger
    weights = last.describe_weights() | ({} if larger is None else {SMALL: pipeline.describe_weights()})
    num_batches = len(list(batches(len(prompts), args.batch_size)))
    bar: tqdm[Any] = progress(total=num_batches * (1 if larger is None else 2), desc="drawing")
    with held_folder(output_dir), replacing(output_dir) as folder:
        start = time.perf_counter()
        with bar:
            codes = pipeline.draw_codes(prompts, seeds, options, negative, args.batch_size, bar.update)  # [n, h, w]
            if larger is not None:
                low, options = codes, replace(options, grid=None)
                codes = larger.draw_codes(prompts, seeds, options, negative, args.batch_size, bar.update, low)
            pictures = last.pictures_of(codes, args.batch_size)
        seconds = time.perf_counter() - start
        psnr = [] if larger is None else larger.psnr_of(codes, low)
        write_folder(weights, folder, prompts, seeds, pictures, options, resolved_dict(args), psnr)
    total = len(prompts)
    took = f"in {seconds:.1f} s, {seconds / total:.2f} s an image"
    near = f"; shrunk, {sum(psnr) / total:.2f} dB from the small ones" if psnr else ""
    return f"wrote {total} images to {output_dir} {took}{near}; grid: {output_dir / GRID_NAME}"


def read_prompts(args: argparse.Namespace, size: Size) -> list[str]:
    """`--num_images` times the caption, or a dataset's first captions, those that StructMAR would draw."""
    if not args.coco_root:
        return [args.prompt] * args.num_images
    index = CocoIndex.load(args.coco_root, args.coco_split, img_size=min(size))
    return [scene.prompt for scene in scenes_from_dataset(index, min(size), args.num_images, size)]


def write_folder(
    weights: dict[str, Any],
    folder: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    pictures: Sequence[Picture],
    options: DrawOptions,
    settings: dict[str, Any],
    psnr: Sequence[float] = (),
) -> None:
    """Pictures, grid and list, as `scripts.sample` writes them for StructMAR. weights: what drew them, as it is written
    down; psnr: of larger pictures to the small ones."""
    scenes = [text_scene(prompt) for prompt in prompts]
    entries = [{**scene.to_dict(), "seed": seed} for scene, seed in zip(scenes, seeds, strict=True)]
    if psnr:
        entries = [{**entry, "psnr_to_small": value} for entry, value in zip(entries, psnr, strict=True)]
    for index, (picture, entry) in enumerate(zip(pictures, entries, strict=True)):
        save_png(picture, folder / picture_name(index), picture_text(entry, options, weights, settings))
    shown = scenes[:GRID_MAX]
    grid = scene_grid(pictures[:GRID_MAX], shown, settings["grid_columns"], settings["grid_scale"])
    save_png(grid, folder / GRID_NAME, {MADE_WITH: json.dumps(settings)})
    images = [{"file": picture_name(index), **entry} for index, entry in enumerate(entries)]
    content = {"settings": settings, "sampling": asdict(options), "checkpoint": weights, "images": images}
    (folder / LIST_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_captions(args: argparse.Namespace) -> str:
    """Captions of pictures, one json line each; without --output they are what is returned."""
    files = caption_files(args)
    pipeline = open_pipeline(args)
    texts: list[str] = []
    bar: tqdm[Any] = progress(total=len(files), desc="captions")
    with bar:
        for rows in batches(len(files), args.batch_size):
            pictures = [np.asarray(load_image(entry["file"])) for entry in files[rows]]
            texts += pipeline.describe(pictures, args.begin, args.max_words, args.batch_size)
            bar.update(rows.stop - rows.start)
    entries = [{**entry, "caption": text} for entry, text in zip(files, texts, strict=True)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    if args.output is None:
        return lines.rstrip("\n")
    write_text_atomic(Path(args.output), lines)
    return f"wrote {len(entries)} captions to {args.output}"


def caption_files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The picture files, and of a dataset the image ids. Raises FileNotFoundError for the first that is missing."""
    if args.images:
        found: list[dict[str, Any]] = [{"file": str(path)} for path in args.images]
    else:
        index = CocoIndex.load(args.coco_root, args.coco_split)
        total = len(index) if args.num_images is None else args.num_images
        if total > len(index):
            raise ValueError(f"--num_images {total}: {args.coco_split} of {args.coco_root} has {len(index)} images")
        images = enumerate(index.images[:total])
        found = [{"image_id": image.id, "file": str(index.image_path(place))} for place, image in images]
    missing = next((entry["file"] for entry in found if not Path(entry["file"]).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"picture {missing} does not exist")
    return found


def write_page(args: argparse.Namespace) -> str:
    """Words and pictures in turn, as a page of Markdown with its pictures beside it."""
    told: list[Told] = [np.asarray(load_image(path)) for path in args.images or ()]
    told += [args.prompt] if args.prompt else []
    drawn = DrawOptions(args.cfg, args.temperature, args.top_k)
    options = JointOptions(args.max_words, args.max_images, (), args.image_threshold, drawn)
    pipeline = open_pipeline(args)
    options = replace(options, end_ids=(pipeline.parts.words.end_token,))
    output_dir = Path(args.output_dir)
    require_free(output_dir, len(args.images or ()) + args.max_images, PAGE_NAME)
    with told_as_flags(("max_images", "max_words")):
        found = pipeline.continue_with(told, args.seed, options, args.negative_prompt or "")
    settings = resolved_dict(args)
    with held_folder(output_dir), replacing(output_dir) as folder:
        blocks: list[str] = []
        files: list[dict[str, str]] = []
        for part in [*told, *found]:
            if isinstance(part, str):
                blocks.append(part)
                continue
            name = picture_name(len(files))
            save_png(part, folder / name, {MADE_WITH: json.dumps(settings)})
            files.append({"file": name})
            blocks.append(f"![]({name})")
        (folder / PAGE_NAME).write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")
        content = {"settings": settings, "sampling": asdict(options), "checkpoint": pipeline.describe_weights(),
                   "page": PAGE_NAME, "images": files}  # fmt: skip
        (folder / LIST_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = sum(not isinstance(part, str) for part in found)
    return f"wrote {output_dir / PAGE_NAME}: {pictures} pictures drawn"
