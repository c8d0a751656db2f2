"""From parsed arguments to a ready run: what all three stages are built from, in the order in which it is built.

    read_parts          frozen parts, data, where the run starts; checked to fit together
    build_train_state   the model with its weights, placed; optimizer and average, restored where a run continues
    prepare_run         the loop's TrainingRun around the step, previews and evaluation that a stage hands in

build_train.py hands in what stages 1 and 2 need, build_class.py what pretraining by class needs, build_distill.py and
build_few_step.py what the distillations need, build_rl.py what stage 3 needs. These files alone read
`argparse.Namespace` below the mains. Everything that can be wrong is found here, before the run writes its first byte.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from engine.checkpoint.best import BestKeeper
from engine.checkpoint.guidance import Guidance, guidance_found, guidance_to_train, require_unguided_start
from engine.checkpoint.identity import Identity
from engine.checkpoint.load import require_fitting_codec
from engine.checkpoint.resume import (
    Source,
    check_identity,
    check_training_state,
    find_source,
    load_weights,
    log_changed_args,
    log_continuation,
    restore,
    restore_open_interval,
    restore_order,
    resumed_position,
)
from engine.checkpoint.writer import CheckpointWriter
from engine.cli.build_scores import build_online_targets
from engine.cli.sampling import FLAGS, sampling_config
from engine.cli.sizes import model_config
from engine.data.cache import LatentCache, LatentCacheKey, TextCache, TextCacheKey
from engine.data.check import DataCheck, check_dataset
from engine.data.classes import ClassBatch, ClassDataset
from engine.data.coco import CocoLayoutDataset, DataConfig, ResumableSampler, collate
from engine.data.inputs import CocoInputs, DropRates
from engine.data.loader import TrainingDataset, load_batches, sampler_of
from engine.data.phrases import PhraseEncoder
from engine.eval.judge import Judge
from engine.eval.online import OnlineEvaluation
from engine.eval.targets import EvalSet
from engine.sample.pipeline import StructMARPipeline
from engine.train.loop import Step, TrainConfig, TrainingRun, course_of
from engine.train.optim import LrSchedule, absolute_lr, build_optimizer
from engine.train.parallel import compile_parts, shard, wrap
from engine.train.profile import build_profiler
from engine.train.state import Position, TrainState
from models.build import build_model
from models.frozen.codec import Codec, load_codec
from models.frozen.encoder import CaptionEncoder, load_text_encoder
from models.sampling.config import SamplingConfig
from models.sampling.few import few_sampling
from models.structmar import StructMAR, StructMARConfig
from models.weights import select_trainable, summarize_trainable
from util.buckets import Size
from util.coco import CocoIndex
from util.config import resolved_dict, told_as_flags
from util.distributed import DistInfo, failing_together
from util.ema import Ema
from util.logging import MetricWriter
from util.rng import derive_seed

logger = logging.getLogger(__name__)

FREE_FLAGS = ("output_dir", "log_dir", "resume", "auto_resume", "num_workers", "pin_mem", "log_freq",
              "save_last_freq", "save_freq_steps", "keep_every", "keep_best", "num_threads", "sample_freq", "debug",
              "dist_timeout", "profile_steps", "check_data")  # fmt: skip
"""A continued run may change these without a word: they do not change what it learns."""


def data_config(args: argparse.Namespace, img_size: int, max_objects: int, sizes: tuple[Size, ...] = ()) -> DataConfig:
    return DataConfig(
        coco_root=args.coco_root,
        split=args.coco_split,
        img_size=img_size,
        sizes=sizes,
        crop=args.crop,
        hflip_prob=args.hflip_prob,
        caption_mode=args.caption_mode,
        max_objects=max_objects,
        min_area=args.min_area,
        min_visibility=args.min_visibility,
        keep_crowd=args.keep_crowd,
        seed=args.seed,
    )


def lr_schedule(args: argparse.Namespace, world_size: int) -> LrSchedule:
    images_per_step = args.batch_size * args.accum_iter * world_size
    lr = absolute_lr(args.lr, args.blr, images_per_step)
    logger.info("learning rate %.3e for %d images per step", lr, images_per_step)
    return LrSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs, args.lr_schedule)


@dataclass(frozen=True)
class Frozen:
    """What conditions and decodes, and never trains. caption_encoder: None where no caption is read."""

    codec: Codec
    caption_encoder: CaptionEncoder | None

    @property
    def text_encoder(self) -> CaptionEncoder:
        """Of a stage that trains on captions."""
        assert self.caption_encoder is not None, "this stage reads no captions"
        return self.caption_encoder


def build_frozen(args: argparse.Namespace, device: torch.device, has_captions: bool) -> Frozen:
    codec = load_codec(args.vae_path, device, args.latent_scale)
    return Frozen(codec, load_text_encoder(args.clip_path, device, args.max_text_tokens) if has_captions else None)


def build_dataset(
    args: argparse.Namespace, config: DataConfig, index: CocoIndex, frozen: Frozen, has_images: bool = True
) -> CocoLayoutDataset:
    """The training data, from images or from what the cache folder holds (latents/, text/ or both)."""
    if not args.use_cached:
        return CocoLayoutDataset(index, config, has_images=has_images)
    root, latents, texts = Path(args.cached_path), None, None
    if has_images and (root / "latents").is_dir():
        codec = frozen.codec
        key = LatentCacheKey(
            codec.id, codec.latent_scale, config.split, config.img_size, codebook_size=codec.codebook_size
        )
        latents = LatentCache(root / "latents", key)
    if (root / "text").is_dir():
        encoder = frozen.text_encoder
        texts = TextCache(root / "text", TextCacheKey(encoder.id, config.split, encoder.stated_cut))
    if latents is None and texts is None:
        wanted = "neither latents/ nor text/" if has_images else "no text/"
        raise FileNotFoundError(f"--cached_path {root} has {wanted}: make it with python -m scripts.cache_latents")
    logger.info("cached latents: %s; cached text: %s", latents is not None, texts is not None)
    return CocoLayoutDataset(index, config, latents, texts, has_images)


def build_sampler(args: argparse.Namespace, dataset: TrainingDataset, dist: DistInfo) -> ResumableSampler:
    """This process's share of every epoch. Raises ValueError if an epoch is shorter than a step."""
    sampler = sampler_of(dataset, dist.rank, dist.world_size, args.seed, args.batch_size)
    if sampler.num_batches < args.accum_iter:
        raise ValueError(f"--accum_iter {args.accum_iter} is more than the {sampler.num_batches} batches of an epoch")
    return sampler


BuildData = Callable[[argparse.Namespace, StructMARConfig, Frozen], TrainingDataset]


@dataclass(frozen=True)
class Stage:
    """What `read_parts` must know of a stage. name: in checkpoints. has_pictures: whether it samples while it trains.

    keeps_sampling: its checkpoints name the sampling options of the weights it started from, where these name some,
    instead of its own, and keep the guidance in these. folds_guidance: it trains the guidance of its sampling options
    into the weights, and draws pictures without any. few_evals: it trains a few-step head, and draws pictures in so
    many evaluations of it, which its checkpoints name; None: it trains none. free_flags: those of its own flags that a
    continued run may change without a word, see FREE_FLAGS. has_captions: False where it trains on classes: without
    captions, layouts and the model's parts for them.
    """

    name: str
    build_data: BuildData
    has_pictures: bool
    keeps_sampling: bool
    free_flags: tuple[str, ...]
    has_captions: bool = True
    folds_guidance: bool = False
    few_evals: int | None = None


@dataclass(frozen=True)
class Parts:
    """What every stage is made of, read and checked to fit together: no model is built and nothing is written yet.

    identity: what the weights are made for. source: where the run starts. scored: what is scored while it trains and
    what by, None without that. flags: every argument by name, as a checkpoint keeps them.
    """

    stage: Stage
    dist: DistInfo
    sampling: SamplingConfig
    frozen: Frozen
    dataset: TrainingDataset
    check: DataCheck
    sampler: ResumableSampler
    identity: Identity
    source: Source
    scored: tuple[EvalSet, Judge] | None
    flags: dict[str, Any]

    @property
    def config(self) -> StructMARConfig:
        return self.identity.config

    @property
    def captioned(self) -> CocoLayoutDataset:
        """The dataset of a stage that trains on captions."""
        assert isinstance(self.dataset, CocoLayoutDataset), "this stage reads no captions"
        return self.dataset

    def start(self, config: TrainConfig) -> Position:
        """Where a run of that length goes on."""
        return resumed_position(self.source, course_of(config, len(self.dataset), self.sampler.global_batch))

    def num_steps(self, config: TrainConfig) -> int:
        """Of the whole run: those that are done and those that are left."""
        start, course = self.start(config), course_of(config, len(self.dataset), self.sampler.global_batch)
        return start.step + course.steps_left(start)


def read_parts(args: argparse.Namespace, dist: DistInfo, stage: Stage) -> Parts:
    """Raises ValueError or FileNotFoundError, naming what is missing or does not fit."""
    sampling = sampling_config(args)
    sizes = model_config(args, num_categories=0, text_dim=0)  # before anything is read: do the sizes fit together?
    if stage.has_pictures:
        sampling.require_fitting(math.prod(sizes.unit_grid()))
    frozen = build_frozen(args, dist.device, stage.has_captions)
    require_fitting_codec(frozen.codec, args.vae_path, sizes)
    dataset = stage.build_data(args, sizes, frozen)
    with failing_together():
        check = check_dataset(dataset, args.output_dir) if dist.is_main else DataCheck()
    categories = () if isinstance(dataset, ClassDataset) else dataset.index.categories
    class_names = dataset.index.classes if isinstance(dataset, ClassDataset) else ()
    encoder = frozen.caption_encoder
    config = model_config(args, len(categories), 0 if encoder is None else encoder.dim)
    sampler = build_sampler(args, dataset, dist)
    scored = build_online_targets(args, config, categories, dist.device)
    source = find_source(args.output_dir, args.resume, args.auto_resume, stage.name)
    guidance = guidance_of(stage, source, sampling)
    sampling = sampling_of(stage, sampling)
    kept = source.identity.sampling if stage.keeps_sampling and source.identity is not None else None
    codec, text_encoder_id = frozen.codec, "" if encoder is None else encoder.id
    identity = Identity(
        config, codec.id, codec.latent_scale, text_encoder_id, categories, sampling=kept or sampling,
        class_names=class_names, guidance=guidance,
    )  # fmt: skip
    check_identity(source, identity, adds_few_step=stage.few_evals is not None)
    check_training_state(source)
    restore_order(sampler, source)
    warmup = args.ema_warmup if args.ema_warmup is not None else source.has_ema_warmup
    flags = resolved_dict(args) | {"ema_warmup": warmup}
    return Parts(stage, dist, sampling, frozen, dataset, check, sampler, identity, source, scored, flags)


def sampling_of(stage: Stage, sampling: SamplingConfig) -> SamplingConfig:
    """How the weights of this stage are sampled. sampling: the options that were asked for."""
    if stage.few_evals is not None:
        return few_sampling(sampling, stage.few_evals)
    return sampling.unguided() if stage.folds_guidance else sampling


def guidance_of(stage: Stage, source: Source, sampling: SamplingConfig) -> Guidance | None:
    """What will be in the weights of this stage. Raises ValueError where it would be undone, or applied twice."""
    if stage.folds_guidance:
        return guidance_to_train(source, sampling)
    if not stage.keeps_sampling and stage.few_evals is None:
        require_unguided_start(source, stage.name)
    elif source.identity is not None:
        with told_as_flags(FLAGS):
            source.identity.require_guided_once(sampling, str(source.path))
    return guidance_found(source)


def build_train_state(
    args: argparse.Namespace,
    parts: Parts,
    mode: str,
    as_module: Callable[[StructMAR], nn.Module] = lambda model: model,
) -> TrainState:
    """The model with the source's weights, what `mode` trains selected, placed and wrapped; optimizer and average,
    restored where the run continues. as_module: the module that a step calls, with the model inside."""
    log_changed_args(parts.source, parts.flags, FREE_FLAGS + parts.stage.free_flags)
    torch.manual_seed(derive_seed(args.seed, "init"))  # modules are initialised from the global generator
    model = build_model(parts.config)
    load_weights(model, parts.source, parts.stage.name)
    select_trainable(model, mode)
    for part, total, trained in summarize_trainable(model):
        logger.info("  %-10s %13s parameters, %13s train", part, f"{total:,}", f"{trained:,}")
    place_model(args, model, parts.dist)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    schedule_lr = absolute_lr(args.lr, args.blr, args.batch_size * args.accum_iter * parts.dist.world_size)
    optimizer = build_optimizer(trainable, schedule_lr, args.weight_decay)
    called = as_module(model)
    wrapped = called if isinstance(model, FSDPModule) else wrap(called, parts.dist.device, parts.dist.world_size)
    state = TrainState(model, wrapped, trainable, optimizer, Ema(trainable, args.ema_rate, parts.flags["ema_warmup"]))
    restore(state, parts.source)
    return state


def place_model(args: argparse.Namespace, model: StructMAR, dist: DistInfo) -> None:
    """Moves the model to its device, compiles and shards it if asked for. What trains is selected before."""
    model.to(dist.device)
    units = model.fsdp_units()
    if args.compile or args.cuda_graphs:
        compile_parts(model, args.cuda_graphs)
    if args.fsdp:
        shard(model, units, dist.device, dist.world_size)


def coco_inputs(args: argparse.Namespace, parts: Parts) -> CocoInputs:
    rates = DropRates(args.label_drop_prob, args.text_drop_prob, args.layout_drop_prob)
    frozen = parts.frozen
    phrases = PhraseEncoder(frozen.text_encoder) if parts.config.phrases else None
    return CocoInputs(frozen.codec, frozen.text_encoder, rates, args.seed, parts.dist.device, phrases)


def build_pipeline(parts: Parts, state: TrainState) -> StructMARPipeline:
    """What draws the run's images: the weights as they are in each moment."""
    return StructMARPipeline.from_parts(state.model, parts.frozen.codec, parts.frozen.caption_encoder, parts.identity)


def build_best_keeper(args: argparse.Namespace, parts: Parts, state: TrainState) -> BestKeeper:
    keeper = BestKeeper(args.keep_best, state, Path(args.output_dir), parts.stage.name, parts.identity, parts.dist)
    keeper.restore(parts.source)
    return keeper


def build_online_evaluation(
    args: argparse.Namespace, parts: Parts, pipeline: StructMARPipeline, ema: Ema, keeper: BestKeeper
) -> OnlineEvaluation | None:
    """None where nothing is scored."""
    if parts.scored is None:
        return None
    return OnlineEvaluation(
        pipeline, ema, *parts.scored, parts.sampling, args.seed, args.eval_bsz, args.precision, parts.dist, keeper.note
    )


@dataclass(frozen=True)
class PreparedRun:
    """A run that has checked everything and written nothing. notes: what the log says first. check: of its data."""

    run: TrainingRun
    start: Position
    stage: str
    args: dict[str, Any]
    notes: tuple[str, ...]
    check: DataCheck


def prepare_run(
    args: argparse.Namespace,
    parts: Parts,
    state: TrainState,
    config: TrainConfig,
    step: Step,
    preview: Callable[[int, MetricWriter], None] | None,
    evaluate: Callable[[int, MetricWriter], str | None] | None,
    extra: Callable[[], dict[str, Any]] = dict,
    notes: Sequence[str] = (),
) -> PreparedRun:
    """The run around a stage's step. extra: what its checkpoints hold besides. notes: what its log says besides."""
    dist, stage = parts.dist, parts.stage.name
    pin_memory = args.pin_mem and dist.device.type == "cuda"
    collate_fn = ClassBatch.collate if isinstance(parts.dataset, ClassDataset) else collate(parts.config.max_objects)
    batches = load_batches(parts.dataset, parts.sampler, collate_fn, args.num_workers, pin_memory)
    global_batch = parts.sampler.global_batch
    if parts.source.kind == "continue":
        restore_open_interval(step, parts.source, dist)
    written = CheckpointWriter(
        state, Path(args.output_dir), stage, parts.identity, parts.flags, global_batch, dist, step.open_interval,
        lambda: extra() | parts.sampler.state(), args.keep_every,
    )  # fmt: skip
    run = TrainingRun(
        config=config,
        state=state,
        schedule=lr_schedule(args, dist.world_size),
        batches=batches,
        step=step,
        dist=dist,
        save=written.save,
        save_alone=None if args.fsdp else written.save_alone,
        preview=preview,
        evaluate=evaluate,
        profiler=build_profiler(args.profile_steps, parts.start(config).step, args.output_dir, dist.is_main),
    )
    start, course = parts.start(config), run.course
    log_continuation(parts.source, course, global_batch)
    size = (
        f"{len(parts.dataset)} images, {course.steps_per_epoch} steps per epoch, "
        f"{start.step + course.steps_left(start)} steps in all, {dist.world_size} processes on {dist.device}"
    )
    return PreparedRun(run, start, stage, parts.flags, (size, *notes), parts.check)
