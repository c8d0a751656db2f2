"""Scores how well images follow their layouts: generates (or takes a folder), detects, and compares with the boxes.

    python -m scripts.evaluate_layout --profile structmar-256 --resume CKPT --detector DETECTOR --coco_root data/coco
    python -m scripts.evaluate_layout --profile lama3097 --images FOLDER --detector DETECTOR --coco_root data/coco
    torchrun --nproc_per_node 8 -m scripts.evaluate_layout ...

Images are drawn with the sampling flags given, else as the weights say. The second form scores any model: the folder
holds one PNG or JPG per image, named by its id. A profile (configs/eval_*.yaml) fixes images, geometry, boxes and
thresholds; its name and hash stand beside every number, and so do the bounds: real images through the same geometry,
the VAE round trip, and detections shuffled among the layouts.

Into --output_dir go results.json, per_image.jsonl, report.html, ground_truth_{full,conditioned}.json and
detections/*.json (COCO's formats), and generated images. Killed, the same command goes on; --rescore scores the images
that are there again (with another detector, say) and never generates.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint.identity import Identity, require_same_categories
from engine.cli.arguments import (
    DEFAULT_CLIP,
    DEFAULT_VAE,
    SWITCH,
    add_compile_args,
    add_config_arg,
    add_sampling_args,
    add_speed_arg,
)
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.eval.bounds import BoundStore
from engine.eval.generation import GenerationPlan
from engine.eval.judge import Judge, unknown_categories
from engine.eval.names import require_own_name
from engine.eval.pictures import given_pictures
from engine.eval.plan import EvaluationRun, Generation
from engine.eval.profiles import IMAGE_SIZES, Profile, available_profiles, load_profile
from engine.eval.quality import QualityMetrics, load_quality_metrics
from engine.eval.run import round_trip, run_evaluation
from engine.eval.targets import EvalSet, load_eval_set
from engine.sample.generate import PRECISIONS
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import compile_parts
from models.frozen.detections import BoxDetector, DetectorSettings
from models.frozen.faster_rcnn import RESNET50_FPN_V2, load_detector
from models.frozen.vae import LatentCodec
from models.masking import require_fitting_iterations
from util.checkpoint import sha256_file
from util.config import HelpFormatter
from util.distributed import DistInfo, init_distributed, shutdown
from util.logging import setup_logging
from util.ranges import nonnegative_int, positive_int

logger = logging.getLogger(__name__)

DEFAULT_DETECTOR = f"./pretrained_models/{RESNET50_FPN_V2}_coco.pth"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_layout",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_config_arg(parser)
    add_protocol_args(parser)
    add_source_args(parser)
    add_judge_args(parser)
    add_sampling_args(parser)
    add_run_args(parser)
    return parser


def add_protocol_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protocol")
    group.add_argument("--profile", required=True, help=f"a yaml file, or one of {', '.join(available_profiles())}")
    group.add_argument("--coco_root", default="./data/coco", help="folder with annotations/ and the image folders")
    group.add_argument("--coco_split", default=None, help="another split than the profile's")
    group.add_argument("--max_images", type=positive_int, default=None,
                       help="only the profile's first images: another id list and ids hash")  # fmt: skip


def add_source_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is scored: a checkpoint's images, or a folder's")
    group.add_argument("--resume", default=None, help="training checkpoint, its folder, or exported .safetensors")
    group.add_argument(
        "--images", default=None, help="folder of any model's pictures, called as the dataset's files or by image id"
    )
    group.add_argument("--image_size", default="profile", choices=IMAGE_SIZES,
                       help="of --images; source: the photographs' own; any: resized as photographs")  # fmt: skip
    group.add_argument("--name", default=None, help="name of the row (the stage or the folder)")
    group.add_argument("--no_ema", action="store_true", help="a checkpoint's raw weights, not their average")
    group.add_argument("--vae_path", default=DEFAULT_VAE, help="KL VAE checkpoint; with --images for its bound only")
    group.add_argument("--clip_path", default=DEFAULT_CLIP, help="local Hugging Face directory of the CLIP text model")
    group.add_argument("--allow_other_frozen", action="store_true",
                       help="generate with a VAE or text encoder other than the one trained with")  # fmt: skip
    group.add_argument(
        "--seeds", type=nonnegative_int, nargs="+", default=[0], help="one set of images for each; means are taken"
    )
    group.add_argument("--no_layout_run", action="store_true", help="also generate without any boxes")
    group.add_argument("--real_bound", action=SWITCH, default=True, help="score the real images (they must be there)")
    group.add_argument("--vae_bound", action=SWITCH, default=None,
                       help="score the VAE round trip; default: with --resume, or when --vae_path exists")  # fmt: skip
    group.add_argument("--bounds_dir", default=None,
                       help="folder of bounds, for evaluations of the same data, profile and detector")  # fmt: skip


def add_judge_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what scores")
    group.add_argument("--detector", default=DEFAULT_DETECTOR,
                       help="Faster R-CNN weights (.pth) or an export (.onnx: YOLOX, YOLOv8, DETR)")  # fmt: skip
    group.add_argument("--skip_unknown", action="store_true",
                       help="leave out the categories that the detector does not know")  # fmt: skip
    group.add_argument("--reward_detector", nargs="+", default=[],
                       help="files or sha256 of detectors that were a reward; a checkpoint names its own")  # fmt: skip
    group.add_argument(
        "--num_resamples", type=positive_int, default=500, help="bootstrap resamples of the 95 %% intervals"
    )
    group.add_argument("--fid", default=None, help="weights of FID's Inception network")
    group.add_argument("--clip_score", default=None, help="directory of a whole CLIP model (text and vision)")
    group.add_argument("--features", default=None, help="a Faster R-CNN whose features stand in; never called FID")


def add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=positive_int, default=16, help="images sampled at a time (it is part of the pixels)"
    )
    group.add_argument("--detector_batch_size", type=positive_int, default=16, help="images detected at a time")
    add_speed_arg(group)
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    group.add_argument("--device", default=None, help="cuda, cuda:N or cpu (None: cuda if there is one)")
    group.add_argument("--num_threads", type=positive_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_compile_args(group)
    group.add_argument("--output_dir", default="./output/evaluation", help="made if missing; continued if begun")
    group.add_argument("--rescore", action="store_true", help="score the images that are there; never generate")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict one another."""
    if bool(args.resume) == bool(args.images):
        given = "both" if args.resume else "none"
        raise ValueError(f"say what is scored by exactly one of --resume, --images; got {given}")
    if len(set(args.seeds)) != len(args.seeds):
        raise ValueError(f"--seeds must be different numbers, got {args.seeds}")
    if args.name is not None:
        require_own_name(args.name, "--name")
    for name in ("no_layout_run", "rescore"):
        if args.images and vars(args)[name]:
            raise ValueError(f"--{name} is for generated images (--resume), got --images {args.images}")
    if args.resume and args.image_size != "profile":
        raise ValueError(f"--image_size {args.image_size} is for --images, got --resume {args.resume}")


def prepare(args: argparse.Namespace, dist: DistInfo) -> EvaluationRun:
    """Reads and checks every input before anything is generated. Raises ValueError or FileNotFoundError."""
    check_args(args)
    profile = load_profile(args.profile)
    detector = load_detector(
        args.detector,
        dist.device,
        DetectorSettings(profile.min_score, profile.nms_iou, profile.max_detections),
    )
    eval_set, judge, skipped = read_targets(args, profile, detector)
    if args.real_bound:
        require_photos(eval_set)
    generation = plan_generation(args, eval_set, dist) if args.resume else None
    given = given_pictures(args.images, args.image_size, eval_set) if args.images else None
    reward_ids = {reward_id(each) for each in args.reward_detector}
    if generation is not None:
        own = identity_of(generation.pipeline).reward_detector_id
        reward_ids |= set() if own is None else {own}
    run = EvaluationRun(
        eval_set=eval_set,
        judge=judge,
        skipped_categories=skipped,
        is_reward=detector.id in reward_ids,
        name=row_name(args, generation),
        generation=generation,
        folder_pictures=given.picture_of if given else None,
        source={"kind": "images", "folder": Path(args.images).name, **given.note} if given else {},
        real_bound=args.real_bound,
        round_trip=None,
        vae_id=None,
        bounds=BoundStore(Path(args.bounds_dir)) if args.bounds_dir else None,
        no_layout_run=args.no_layout_run,
        quality=read_quality(args, dist),
        num_resamples=args.num_resamples,
        detector_batch_size=args.detector_batch_size,
        rescore=args.rescore,
        dist=dist,
        output_dir=Path(args.output_dir),
    )
    return add_vae_bound(args, run)


def read_targets(args: argparse.Namespace, profile: Profile, detector: BoxDetector) -> tuple[EvalSet, Judge, list[str]]:
    """The targets, the detector fitted to their categories, and the categories left out."""
    needs_captions = bool(args.resume or args.clip_score)
    options = {"split": args.coco_split, "max_images": args.max_images, "captions_required": needs_captions}
    eval_set = load_eval_set(args.coco_root, profile, **options)
    skipped = unknown_categories(detector, eval_set.categories) if args.skip_unknown else []
    if skipped:
        logger.warning("--skip_unknown leaves out %d categories: %s", len(skipped), ", ".join(skipped))
        eval_set = load_eval_set(args.coco_root, profile, skip_categories=frozenset(skipped), **options)
    return eval_set, Judge.of(detector, eval_set.categories, skipped), skipped


def require_photos(eval_set: EvalSet) -> None:
    """Raises FileNotFoundError for the first photograph that is missing, with the flag that does without."""
    folder = eval_set.root / eval_set.split
    if not folder.is_dir():
        raise FileNotFoundError(f"no photographs at {folder}: they are the bound; --no-real_bound scores without it")
    for target in eval_set.targets:
        path = folder / target.file_name
        if not path.is_file():
            raise FileNotFoundError(f"no photograph {path}: it belongs to the bound; --no-real_bound scores without it")


def plan_generation(args: argparse.Namespace, eval_set: EvalSet, dist: DistInfo) -> Generation:
    """The model with its frozen parts, fitted to the profile; what was begun in --output_dir must be the same."""
    profile = eval_set.profile
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, dist.device, not args.no_ema, args.allow_other_frozen
    )  # fmt: skip
    identity = identity_of(pipeline)
    require_same_categories(eval_set.categories, identity.categories, f"{args.coco_root} {eval_set.split}")
    size = identity.config.img_size
    if profile.resolution != size:
        asked = f"pictures of {profile.resolution} px" if profile.resolution else "photographs at their own sizes"
        raise ValueError(f"profile {profile.name} asks for {asked}, the checkpoint makes {size} px")
    if profile.max_objects > identity.config.max_objects:
        raise ValueError(
            f"profile {profile.name} places up to {profile.max_objects} objects, "
            f"the checkpoint at most {identity.config.max_objects}"
        )
    config = sampling_config(args)
    require_fitting_iterations(config.num_iter, identity.config.num_tokens)
    if args.compile or args.cuda_graphs:
        compile_parts(pipeline.model, args.cuda_graphs)
    plan = GenerationPlan(config, args.batch_size, args.precision, dist)
    return Generation(pipeline, plan, tuple(args.seeds))


def add_vae_bound(args: argparse.Namespace, run: EvaluationRun) -> EvaluationRun:
    """With the model's own VAE, or the one of --vae_path; needs the photographs."""
    wanted = args.vae_bound if args.vae_bound is not None else bool(args.resume) or Path(args.vae_path).is_file()
    if not wanted or not args.real_bound:
        return run
    codec = run.generation.pipeline.codec if run.generation else LatentCodec.load(args.vae_path, run.dist.device)
    resolution = run.eval_set.profile.resolution
    if resolution is None or resolution % codec.stride:
        message = f"profile {run.eval_set.profile.name}: pictures of {resolution or 'many sizes'} do not fit its stride"
        if args.vae_bound:
            raise ValueError(f"--vae_bound: {message} {codec.stride}")
        return run
    return replace(run, round_trip=round_trip(codec, run.eval_set), vae_id=codec.id)


def read_quality(args: argparse.Namespace, dist: DistInfo) -> QualityMetrics | None:
    if not (args.fid or args.clip_score or args.features):
        return None
    if not args.real_bound and (args.fid or args.features):
        raise ValueError("--fid and --features compare with the real images, got --no-real_bound")
    return load_quality_metrics(args.fid, args.features, args.clip_score, dist.device)


def row_name(args: argparse.Namespace, generation: Generation | None) -> str:
    if args.name is not None:
        return str(args.name)
    if generation is None:
        return require_own_name(Path(args.images).resolve().name, "--images without --name: the folder's name")
    return f"StructMAR, {identity_of(generation.pipeline).stage}"


def identity_of(pipeline: StructMARPipeline) -> Identity:
    assert pipeline.identity is not None  # it is from a checkpoint
    return pipeline.identity


def reward_id(path_or_id: str) -> str:
    """A detector's sha256, given itself or as a file. Raises FileNotFoundError for what is neither."""
    if len(path_or_id) == 64 and all(letter in "0123456789abcdef" for letter in path_or_id):
        return path_or_id
    if not Path(path_or_id).is_file():
        raise FileNotFoundError(f"--reward_detector {path_or_id} is neither a file nor a sha256")
    return sha256_file(path_or_id)


def main(argv: Sequence[str] | None = None) -> None:
    args, note = parse_sampling_args(get_parser(), argv)
    try:
        dist = init_distributed(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    setup_logging(None, dist.rank)
    if note:
        logger.info(note)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        table = run_evaluation(prepare(args, dist))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        shutdown()
    if dist.is_main:
        print(table)


if __name__ == "__main__":
    main()
