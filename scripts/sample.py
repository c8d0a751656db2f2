"""Generates images from captions and boxes, and a grid that shows them with the boxes drawn.

    python -m scripts.sample --resume CKPT --prompt "a dog on a bench" --layout configs/layouts/coco.json
    python -m scripts.sample --resume CKPT --coco_root ./data/coco --coco_split val2014 --num_images 16
    python -m scripts.sample --resume mar_huge.safetensors --model mar_huge --class_label 207 360

The last form samples MAR's own weights, class by class: that is how they are checked by eye. Sampling flags that
neither the command nor --config gives have the values that the weights name, where they name some.

Into --output_dir go NNNN.png (plain images; the settings are in the PNG's text), grid.png (the first 64) and
samples.json (all settings and, for each image, its prompt, objects and seed). Image k has the seed --seed + k, and
depends on nothing else that is random: --seed with that number, and its prompt and objects, give it again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.checkpoint.identity import Identity, require_same_categories
from engine.checkpoint.load import load_mar_for_sampling, require_fitting_codec
from engine.cli.arguments import (
    DEFAULT_CLIP,
    DEFAULT_VAE,
    add_compile_args,
    add_config_arg,
    add_sampling_args,
    add_speed_arg,
)
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.data.scenes import Scene, read_layout_file, scenes_from_dataset, text_scene
from engine.sample.generate import MAX_SEED, PRECISIONS, num_iterations
from engine.sample.grid import scene_grid
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import compile_parts
from models.frozen.vae import LatentCodec
from models.masking import require_fitting_iterations
from models.sampling.config import SamplingConfig
from models.structmar import preset_config
from util.coco import BoxFilters, CocoIndex
from util.config import HelpFormatter, resolved_dict
from util.distributed import init_distributed
from util.images import Picture, save_png
from util.logging import progress, setup_logging
from util.ranges import Range, nonnegative_int, positive_int
from util.read import require_text

logger = logging.getLogger(__name__)

GRID_MAX = 64


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sample",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_config_arg(parser)
    add_weight_args(parser)
    add_source_args(parser)
    add_mar_args(parser)
    add_sampling_args(parser)
    add_run_args(parser)
    return parser


def add_weight_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    group.add_argument("--resume", required=True,
                       help="training checkpoint or its folder, exported .safetensors, or MAR's weights")  # fmt: skip
    group.add_argument("--no_ema", action="store_true", help="a checkpoint's raw weights, not their average")
    group.add_argument("--vae_path", default=DEFAULT_VAE, help="KL VAE checkpoint in the LDM layout")
    group.add_argument("--clip_path", default=DEFAULT_CLIP, help="local Hugging Face directory of the CLIP text model")
    group.add_argument("--allow_other_frozen", action="store_true",
                       help="sample with a VAE or text encoder other than the one trained with")  # fmt: skip


def add_source_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to generate: captions and boxes, or a dataset's, or MAR's classes")
    group.add_argument("--prompt", default=None,
                       help="caption; with --layout it replaces the file's, alone there are no boxes")  # fmt: skip
    group.add_argument("--layout", default=None,
                       help='json: {"prompt": ..., "objects": [{"label": ..., "bbox": [x0, y0, x1, y1]}]}, boxes '
                            "normalised to [0, 1], or a list of these; empty: none, also over --config")  # fmt: skip
    group.add_argument("--coco_root", default=None,
                       help="take captions and boxes from this dataset (only its annotations/ is read)")  # fmt: skip
    group.add_argument("--coco_split", default="val2014",
                       help="split of --coco_root: its first images with boxes, in the order of their ids")  # fmt: skip
    group.add_argument(
        "--class_label", type=nonnegative_int, nargs="+", default=None, help="class indices, for MAR's own weights"
    )
    group.add_argument("--num_images", type=positive_int, default=4,
                       help="images per scene or class; of a dataset: scenes, with one image each")  # fmt: skip
    group.add_argument(
        "--seed",
        type=Range(int, f"must lie in 0 ... {MAX_SEED}", 0, MAX_SEED, "[]"),
        default=0,
        help="image k has seed + k",
    )


def add_mar_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes of MAR's own weights (with --class_label; our checkpoints know theirs)")
    group.add_argument("--model", default="mar_huge", help="preset: mar_mini, mar_base, mar_large or mar_huge")
    group.add_argument(
        "--diffloss_d", type=positive_int, default=None, help="depth of the diffusion head (the preset's)"
    )
    group.add_argument(
        "--diffloss_w", type=positive_int, default=None, help="width of the diffusion head (the preset's)"
    )
    group.add_argument(
        "--img_size", type=positive_int, default=None, help="side of the images in pixels (the preset's)"
    )
    group.add_argument(
        "--class_num", type=positive_int, default=None, help="rows of the class embedding (the preset's)"
    )


def add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=positive_int, default=8, help="images sampled at a time")
    add_speed_arg(group)
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    group.add_argument("--device", default=None, help="cuda, cuda:N or cpu (None: cuda if there is one)")
    group.add_argument("--num_threads", type=positive_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_compile_args(group)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="./output/samples",
                       help="made if missing; what an earlier run of this program left in it (NNNN.png, grid.png, "
                            "samples.json) is replaced, other files stay")  # fmt: skip
    group.add_argument(
        "--grid_columns", type=positive_int, default=None, help="images per row of the grid (None: square)"
    )
    group.add_argument("--grid_scale", type=positive_int, default=None,
                       help="enlargement of the images in the grid (None: at least 256 pixels wide)")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything checked and loaded, ready to run. labels: one per image, for MAR's own weights only."""

    pipeline: StructMARPipeline
    scenes: list[Scene]
    labels: list[int] | None
    seeds: list[int]
    config: SamplingConfig
    device: torch.device


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict one another."""
    from_file = bool(args.layout) or args.prompt is not None
    sources = {
        "--layout/--prompt": from_file,
        "--coco_root": bool(args.coco_root),
        "--class_label": args.class_label is not None,
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) != 1:
        raise ValueError(
            f"say what to generate by exactly one of {', '.join(sources)}; got {', '.join(given) or 'none'}"
        )
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file, not a folder")


def choose_device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_distributed(chosen).device


def prepare(args: argparse.Namespace) -> Job:
    """Reads and checks every input before anything runs. Raises ValueError or FileNotFoundError."""
    check_args(args)
    config = sampling_config(args)
    device = choose_device(args.device)
    job = prepare_classes(args, config, device) if args.class_label else prepare_scenes(args, config, device)
    model = job.pipeline.model
    require_fitting_iterations(config.num_iter, model.config.num_tokens)
    if args.compile or args.cuda_graphs:
        compile_parts(model, args.cuda_graphs)
    return job


def prepare_scenes(args: argparse.Namespace, config: SamplingConfig, device: torch.device) -> Job:
    """A StructMAR checkpoint, the frozen parts it was trained with, and the scenes."""
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device, not args.no_ema, args.allow_other_frozen
    )  # fmt: skip
    assert pipeline.identity is not None
    scenes = read_scenes(args, pipeline.identity)
    seeds = [args.seed + index for index in range(len(scenes))]
    return Job(pipeline, scenes, None, seeds, config, device)


def prepare_classes(args: argparse.Namespace, config: SamplingConfig, device: torch.device) -> Job:
    """MAR's own weights and class indices."""
    codec = LatentCodec.load(args.vae_path, device)
    sizes = {name: vars(args)[name] for name in ("diffloss_d", "diffloss_w", "img_size", "class_num")}
    overrides = {name: value for name, value in sizes.items() if value is not None}
    architecture = preset_config(args.model, **overrides, rope_mode="off")
    model = load_mar_for_sampling(args.resume, architecture, device, use_ema=not args.no_ema)
    require_fitting_codec(codec, args.vae_path, model.config)
    for label in args.class_label:
        if not 0 <= label < model.config.class_num:
            raise ValueError(f"--class_label {label} is outside 0 ... {model.config.class_num - 1}")
    labels = [label for label in args.class_label for _ in range(args.num_images)]
    scenes = [text_scene(f"class {label}") for label in labels]
    seeds = [args.seed + index for index in range(len(labels))]
    pipeline = StructMARPipeline.from_parts(model, codec, caption_encoder=None)
    pipeline.source = args.resume
    return Job(pipeline, scenes, labels, seeds, config, device)


def read_scenes(args: argparse.Namespace, identity: Identity) -> list[Scene]:
    """One scene per image: each scene of a layout file `--num_images` times, a dataset's scenes once."""
    if args.coco_root:
        filters = BoxFilters(max_objects=identity.config.max_objects)
        index = CocoIndex.load(args.coco_root, args.coco_split, filters, identity.config.img_size)
        require_same_categories(index.categories, identity.categories, f"{args.coco_root} {args.coco_split}")
        return scenes_from_dataset(index, identity.config.img_size, args.num_images)
    if not args.layout:
        scenes = [text_scene(require_text(args.prompt, "--prompt"))]
    else:
        scenes = read_layout_file(args.layout, identity.categories, identity.config.max_objects, args.prompt)
    return [scene for scene in scenes for _ in range(args.num_images)]


def run(job: Job, batch_size: int, precision: str, output_dir: Path, settings: dict[str, Any]) -> None:
    """Samples batch by batch, writing each image as soon as its batch is done, then the grid and the json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_own_files(output_dir)
    total = len(job.scenes)
    images: list[Picture] = []
    bar: tqdm[Any] = progress(total=num_iterations(total, batch_size, job.config), desc="sampling")

    def tick() -> None:
        bar.update()

    with bar:
        for start in range(0, total, batch_size):
            batch = sample_batch(job, slice(start, start + batch_size), precision, tick)
            for index, image in enumerate(batch, start):
                save_png(image, output_dir / f"{index:04d}.png", png_text(job, index, settings))
            images += batch[: max(0, GRID_MAX - start)]
    grid = scene_grid(images, job.scenes[: len(images)], settings["grid_columns"], settings["grid_scale"])
    save_png(grid, output_dir / "grid.png", {"settings": json.dumps(settings)})
    write_json(job, output_dir / "samples.json", settings)
    shown = "" if total <= GRID_MAX else f" of the first {GRID_MAX}"
    print(f"wrote {total} images to {output_dir}; grid{shown}: {output_dir / 'grid.png'}")


def sample_batch(job: Job, rows: slice, precision: str, on_iteration: Callable[[], None]) -> list[Picture]:
    seeds = job.seeds[rows]
    options = (job.config, seeds, len(seeds), precision, on_iteration)
    if job.labels is not None:
        return job.pipeline.draw_classes(job.labels[rows], *options)
    return job.pipeline.draw(job.scenes[rows], *options)


def image_entry(job: Job, index: int) -> dict[str, Any]:
    """What image `index` was made from: its prompt and objects as in a layout file, its seed, its class."""
    entry = {**job.scenes[index].to_dict(), "seed": job.seeds[index]}
    return entry if job.labels is None else {"class_label": job.labels[index], "seed": job.seeds[index]}


def png_text(job: Job, index: int, settings: dict[str, Any]) -> dict[str, str]:
    """Text of one PNG: strings as they are, everything else as json."""
    entry = image_entry(job, index)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entry.items()}
    made_with = {"sampling": asdict(job.config), "checkpoint": job.pipeline.describe(), "settings": settings}
    return texts | {key: json.dumps(value) for key, value in made_with.items()}


def write_json(job: Job, path: Path, settings: dict[str, Any]) -> None:
    images = [{"file": f"{index:04d}.png", **image_entry(job, index)} for index in range(len(job.scenes))]
    content = {
        "settings": settings,
        "sampling": asdict(job.config),
        "checkpoint": job.pipeline.describe(),
        "images": images,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_own_files(output_dir: Path) -> None:
    """Removes what an earlier run of this program left, so that images of two runs are never mixed."""
    if (output_dir / "samples.json").is_file():
        for path in output_dir.iterdir():
            if re.fullmatch(r"\d{4,}\.png|grid\.png|samples\.json", path.name):
                path.unlink()


def main(argv: Sequence[str] | None = None) -> None:
    args, note = parse_sampling_args(get_parser(), argv)
    setup_logging()
    if note:
        logger.info(note)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        job = prepare(args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    logger.info(f"{len(job.scenes)} images on {job.device}, {args.batch_size} at a time")
    run(job, args.batch_size, args.precision, Path(args.output_dir), resolved_dict(args))


if __name__ == "__main__":
    main()
