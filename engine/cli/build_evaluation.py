"""From parsed arguments to an evaluation (scripts/evaluate_layout.py): every input read and checked, then the run."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint.identity import Identity, require_same_categories
from engine.cli.sampling import sampling_config
from engine.data.check import check_pictures
from engine.data.sources import Photograph
from engine.eval.bounds import BoundStore
from engine.eval.generation import GenerationPlan
from engine.eval.judge import Judge, unknown_categories
from engine.eval.names import require_own_name
from engine.eval.pictures import given_pictures
from engine.eval.plan import EvaluationRun, Generation
from engine.eval.profiles import Profile, load_profile
from engine.eval.quality import QualityMetrics, load_quality_metrics
from engine.eval.run import round_trip, run_evaluation
from engine.eval.targets import EvalSet, load_eval_set
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import compile_parts
from models.config import StructMARConfig
from models.frozen.codec import load_codec
from models.frozen.detections import BoxDetector, DetectorSettings
from models.frozen.faster_rcnn import load_detector
from util.checkpoint import sha256_file
from util.distributed import DistInfo, init_distributed, shutdown
from util.logging import setup_logging
from util.read import short_path

logger = logging.getLogger(__name__)


def evaluate(args: argparse.Namespace, sampling_note: str | None) -> str | None:
    """Runs the evaluation; gives its table, None in processes but the first. Raises ValueError or FileNotFoundError.

    sampling_note: what the log says of sampling options that come from the weights.
    """
    dist = init_distributed(args.device, args.dist_timeout)
    setup_logging(None, dist.rank)
    if sampling_note:
        logger.info(sampling_note)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        table = run_evaluation(prepare(args, dist))
    finally:
        shutdown()
    return table if dist.is_main else None


def prepare(args: argparse.Namespace, dist: DistInfo) -> EvaluationRun:
    """Reads and checks every input before anything is generated. Raises ValueError or FileNotFoundError."""
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
        no_layout_run=args.without_layout,
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
    options = {"split": args.coco_split, "max_images": args.max_images, "captions_required": needs_captions,
               "boxes_by": args.boxes_by}  # fmt: skip
    eval_set = load_eval_set(args.coco_root, profile, **options)
    skipped = unknown_categories(detector, eval_set.categories) if args.skip_unknown else []
    if skipped:
        logger.warning("--skip_unknown leaves out %d categories: %s", len(skipped), ", ".join(skipped))
        eval_set = load_eval_set(args.coco_root, profile, skip_categories=frozenset(skipped), **options)
    return eval_set, Judge.of(detector, eval_set.categories, skipped), skipped


def require_photos(eval_set: EvalSet) -> None:
    """Raises FileNotFoundError for the first photograph that is missing, with the flag that does without; ValueError
    for one that is cut off or of another size than the json says."""
    folder = eval_set.root / eval_set.split
    if not folder.is_dir():
        raise FileNotFoundError(f"no photographs at {folder}: they are the bound; --no-real_bound scores without it")
    photographs = [Photograph(each.image_id, folder / each.file_name, each.source_size) for each in eval_set.targets]
    for photograph in photographs:
        if not photograph.path.is_file():
            where = short_path(photograph.path)
            raise FileNotFoundError(
                f"no photograph {where}: it belongs to the bound; --no-real_bound scores without it"
            )
    check_pictures(photographs, f"instances_{eval_set.split}.json")


def plan_generation(args: argparse.Namespace, eval_set: EvalSet, dist: DistInfo) -> Generation:
    """The model with its frozen parts, fitted to the profile; what was begun in --output_dir must be the same."""
    profile = eval_set.profile
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, dist.device, args.ema, args.allow_other_frozen,
        max_text_tokens=args.max_text_tokens,
    )  # fmt: skip
    identity = identity_of(pipeline)
    require_same_categories(eval_set.categories, identity.categories, f"{args.coco_root} {eval_set.split}")
    size = identity.config.img_size
    if profile.resolution is None and not identity.config.learned_pos:
        require_token_sizes(eval_set, identity.config)
    elif profile.resolution != size:
        asked = f"pictures of {profile.resolution} px" if profile.resolution else "photographs at their own sizes"
        raise ValueError(f"profile {profile.name} asks for {asked}, the checkpoint makes {size} px")
    if args.boxes_by != "class" and not identity.config.phrases:
        raise ValueError(f"--boxes_by {args.boxes_by}: {args.resume} was trained without phrases")
    if profile.max_objects > identity.config.max_objects:
        raise ValueError(
            f"profile {profile.name} places up to {profile.max_objects} objects, "
            f"the checkpoint at most {identity.config.max_objects}"
        )
    config = sampling_config(args)
    config.require_fitting(math.prod(identity.config.unit_grid()))
    if args.compile or args.cuda_graphs:
        compile_parts(pipeline.model, args.cuda_graphs)
    plan = GenerationPlan(config, args.batch_size, args.precision, dist)
    return Generation(pipeline, plan, tuple(args.seeds))


def require_token_sizes(eval_set: EvalSet, config: StructMARConfig) -> None:
    """Raises ValueError naming the first photograph whose own size is not one of whole tokens."""
    for target in eval_set.targets:
        try:
            config.grid_of(target.size[::-1])
        except ValueError as error:
            raise ValueError(f"image {target.image_id} of {eval_set.split}: {error}") from error


def add_vae_bound(args: argparse.Namespace, run: EvaluationRun) -> EvaluationRun:
    """With the model's own VAE, or the one of --vae_path; needs the photographs."""
    wanted = args.vae_bound if args.vae_bound is not None else bool(args.resume) or Path(args.vae_path).exists()
    if not wanted or not args.real_bound:
        return run
    codec = run.generation.pipeline.codec if run.generation else load_codec(args.vae_path, run.dist.device)
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
