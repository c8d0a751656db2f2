"""From parsed arguments to ready objects: the only reader of `argparse.Namespace` below the mains.

Everything that can be wrong is found here, before the run writes its first byte: files, sizes, ids, categories.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from engine.checkpoint.identity import Identity, require_same_categories
from engine.checkpoint.resume import (
    Source,
    check_identity,
    checkpoint_content,
    find_source,
    load_weights,
    log_changed_args,
    restore,
    resumed_position,
)
from engine.cli.sampling import sampling_config
from engine.data.cache import LatentCache, LatentCacheKey, TextCache, TextCacheKey
from engine.data.coco import CocoLayoutDataset, DataConfig, ResumableSampler
from engine.data.inputs import CocoInputs, DropRates
from engine.data.loader import CocoBatches, coco_batches
from engine.data.scenes import Scene, scenes_from_dataset
from engine.eval.judge import Judge
from engine.eval.online import OnlineEvaluation
from engine.eval.previews import Preview
from engine.eval.profiles import load_profile
from engine.eval.targets import EvalSet, load_eval_set
from engine.train.loop import Learner, Position, SupervisedStep, TrainConfig, TrainingRun
from engine.train.optim import LrSchedule, absolute_lr, build_optimizer
from engine.train.parallel import compile_parts, shard, wrap
from models.build import build_model
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from models.frozen.text import TextEncoder
from models.frozen.vae import LatentCodec
from models.masking import cosine_masked_counts
from models.structmar import StructMAR, StructMARConfig, preset_config
from models.weights import select_trainable, summarize_trainable
from util.checkpoint import LAST_NAME, save_atomic
from util.coco import CocoIndex
from util.config import resolved_dict
from util.distributed import DistInfo, barrier
from util.ema import Ema
from util.rng import derive_seed
from util.types import Category

logger = logging.getLogger(__name__)

PRESET_FIELDS = ("img_size", "vae_embed_dim", "vae_stride", "patch_size", "class_num", "buffer_size", "diffloss_d",
                 "diffloss_w", "max_objects")  # fmt: skip
NOT_TRAINING = ("output_dir", "log_dir", "resume", "no_auto_resume", "num_workers", "pin_mem", "log_freq", "max_steps",
                "save_last_freq", "save_freq_steps", "num_threads", "sample_freq", "eval_freq")  # fmt: skip


def model_config(args: argparse.Namespace, num_categories: int, text_dim: int) -> StructMARConfig:
    """The preset with what the flags replace. Raises ValueError for an unknown preset or sizes that do not fit."""
    values = vars(args)
    chosen = {name: values[name] for name in PRESET_FIELDS if values[name] is not None}
    return preset_config(
        args.model,
        num_categories=num_categories,
        text_dim=text_dim,
        diffusion_batch_mul=args.diffusion_batch_mul,
        attn_dropout=args.attn_dropout,
        proj_dropout=args.proj_dropout,
        grad_checkpointing=args.grad_checkpointing,
        rope_mode=args.rope_mode,
        learned_pos=not args.no_learned_pos,
        layout_bias_value=args.layout_bias_value,
        layout_bias_encoder=args.layout_bias_encoder,
        layout_bias_decoder=args.layout_bias_decoder,
        layout_fourier=args.layout_fourier,
        cross_attn_every=args.cross_attn_every,
        **chosen,
    )


def require_launched(args: argparse.Namespace, program: str) -> None:
    """Raises ValueError if --fsdp has no processes to shard over."""
    if args.fsdp and not torch.distributed.is_initialized():
        raise ValueError(
            f"--fsdp shards over the processes of torchrun: start with torchrun --nproc_per_node N {program} ..."
        )


def data_config(args: argparse.Namespace, img_size: int, max_objects: int) -> DataConfig:
    return DataConfig(
        coco_root=args.coco_root,
        split=args.coco_split,
        img_size=img_size,
        crop=args.crop,
        hflip_prob=args.hflip_prob,
        caption_mode=args.caption_mode,
        max_objects=max_objects,
        min_area=args.min_area,
        min_visibility=args.min_visibility,
        keep_crowd=args.keep_crowd,
        seed=args.seed,
    )


def train_config(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        seed=args.seed,
        epochs=args.epochs,
        max_steps=args.max_steps,
        accum_iter=args.accum_iter,
        precision=args.precision,
        grad_clip=args.grad_clip,
        mask_ratio_min=args.mask_ratio_min,
        log_freq=args.log_freq,
        save_epochs=args.save_last_freq,
        save_steps=args.save_freq_steps,
        preview_epochs=args.eval_freq if args.online_eval else 0,
        preview_steps=args.sample_freq,
    )


def lr_schedule(args: argparse.Namespace, world_size: int) -> LrSchedule:
    images_per_step = args.batch_size * args.accum_iter * world_size
    lr = absolute_lr(args.lr, args.blr, images_per_step)
    logger.info("learning rate %.3e for %d images per step", lr, images_per_step)
    return LrSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs, args.lr_schedule)


@dataclass(frozen=True)
class Frozen:
    """What conditions and decodes, and never trains."""

    codec: LatentCodec
    text_encoder: TextEncoder


def build_frozen(args: argparse.Namespace, device: torch.device) -> Frozen:
    codec = LatentCodec.load(args.vae_path, device, args.latent_scale)
    return Frozen(codec, TextEncoder.load(args.clip_path, device))


def require_fitting_vae(config: StructMARConfig, codec: LatentCodec, vae_path: str) -> None:
    """Raises ValueError if the VAE makes other latents than the model takes."""
    for flag, wanted, found in (
        ("vae_stride", config.vae_stride, codec.stride),
        ("vae_embed_dim", config.vae_embed_dim, codec.latent_channels),
    ):
        if wanted != found:
            raise ValueError(f"--{flag} is {wanted}, but the VAE {vae_path} has {found}")


def build_dataset(
    args: argparse.Namespace, config: DataConfig, index: CocoIndex, frozen: Frozen, has_images: bool = True
) -> CocoLayoutDataset:
    """The training data, from images or from what the cache folder holds (latents/, text/ or both)."""
    if not args.use_cached:
        return CocoLayoutDataset(index, config, has_images=has_images)
    root, latents, texts = Path(args.cached_path), None, None
    if has_images and (root / "latents").is_dir():
        key = LatentCacheKey(frozen.codec.id, frozen.codec.latent_scale, config.split, config.img_size)
        latents = LatentCache(root / "latents", key)
    if (root / "text").is_dir():
        texts = TextCache(root / "text", TextCacheKey(frozen.text_encoder.id, config.split))
    if latents is None and texts is None:
        wanted = "neither latents/ nor text/" if has_images else "no text/"
        raise FileNotFoundError(f"--cached_path {root} has {wanted}: make it with python -m scripts.cache_latents")
    logger.info("cached latents: %s; cached text: %s", latents is not None, texts is not None)
    return CocoLayoutDataset(index, config, latents, texts, has_images)


def build_sampler(args: argparse.Namespace, dataset: CocoLayoutDataset, dist: DistInfo) -> ResumableSampler:
    """This process's share of every epoch. Raises ValueError if an epoch is shorter than a step."""
    sampler = ResumableSampler(len(dataset), dist.rank, dist.world_size, args.seed, args.batch_size)
    if sampler.num_batches < args.accum_iter:
        raise ValueError(f"--accum_iter {args.accum_iter} is more than the {sampler.num_batches} batches of an epoch")
    return sampler


def build_scenes(args: argparse.Namespace, training: CocoLayoutDataset) -> Sequence[Scene]:
    """The captions and boxes of the previews: of --eval_split, or of the training split."""
    split, index = args.eval_split or args.coco_split, training.index
    if split != index.split:
        index = replace(training.config, split=split).load_index()
        if index.categories != training.index.categories:
            raise ValueError(f"--eval_split {split} has other categories than --coco_split {training.index.split}")
    return scenes_from_dataset(index, training.config.img_size, args.num_preview)


def build_online_targets(
    args: argparse.Namespace, config: StructMARConfig, categories: Sequence[Category], device: torch.device
) -> tuple[EvalSet, Judge] | None:
    """What --online_eval scores and what by; None without a detector. Raises ValueError where the parts do not fit."""
    if not (args.online_eval and args.eval_detector):
        return None
    profile = load_profile(args.eval_profile)
    if profile.resolution != config.img_size or profile.max_objects > config.max_objects:
        raise ValueError(
            f"--eval_profile {profile.name} has {profile.resolution} px and up to {profile.max_objects} objects, "
            f"the model {config.img_size} px and {config.max_objects}"
        )
    eval_set = load_eval_set(args.coco_root, profile, args.eval_split or None, max_images=args.eval_images)
    require_same_categories(eval_set.categories, categories, f"--coco_root {args.coco_root} {eval_set.split}")
    settings = DetectorSettings(profile.min_score, profile.nms_iou, profile.max_detections)
    return eval_set, Judge.of(load_detector(args.eval_detector, device, settings), eval_set.categories)


def initial_model(args: argparse.Namespace, config: StructMARConfig, source: Source, stage: str) -> StructMAR:
    """A model with the source's weights, on the CPU."""
    torch.manual_seed(derive_seed(args.seed, "init"))  # modules are initialised from the global generator
    model = build_model(config)
    load_weights(model, source, stage)
    return model


def place_model(args: argparse.Namespace, model: StructMAR, dist: DistInfo) -> StructMAR:
    """The same model on its device, compiled and sharded if asked for. What trains is selected before."""
    model.to(dist.device)
    units = model.fsdp_units()
    if args.compile or args.cuda_graphs:
        compile_parts(model, args.cuda_graphs)
    if args.fsdp:
        shard(model, units, dist.device, dist.world_size)
    return model


def build_learner(
    args: argparse.Namespace,
    model: StructMAR,
    mode: str,
    source: Source,
    dist: DistInfo,
    as_module: Callable[[StructMAR], nn.Module] = lambda model: model,
) -> Learner:
    """What trains selected, the model placed and wrapped; optimizer and EMA, restored if continued.

    as_module: the module that a step calls, with the model inside.
    """
    select_trainable(model, mode)
    for part, total, trained in summarize_trainable(model):
        logger.info("  %-10s %13s parameters, %13s train", part, f"{total:,}", f"{trained:,}")
    place_model(args, model, dist)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    schedule_lr = absolute_lr(args.lr, args.blr, args.batch_size * args.accum_iter * dist.world_size)
    optimizer = build_optimizer(trainable, schedule_lr, args.weight_decay)
    called = as_module(model)
    wrapped = called if isinstance(model, FSDPModule) else wrap(called, dist.device, dist.world_size)
    learner = Learner(model, wrapped, trainable, optimizer, Ema(trainable, args.ema_rate))
    restore(learner, source)
    return learner


@dataclass(frozen=True)
class Prepared:
    """A run that has checked everything and written nothing. notes: what the log says first."""

    run: TrainingRun
    start: Position
    stage: str
    args: dict[str, Any]
    notes: tuple[str, ...]


def build_training(args: argparse.Namespace, dist: DistInfo) -> Prepared:
    """Everything main_mar.py trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    require_launched(args, "main_mar.py")
    sampling = sampling_config(args)
    sizes = model_config(args, num_categories=0, text_dim=0)  # before anything is read: do the sizes fit together?
    frozen = build_frozen(args, dist.device)
    require_fitting_vae(sizes, frozen.codec, args.vae_path)
    data = data_config(args, sizes.img_size, sizes.max_objects)
    dataset = build_dataset(args, data, data.load_index(), frozen)
    categories = dataset.index.categories
    config = model_config(args, len(categories), frozen.text_encoder.dim)
    identity = Identity(
        config, frozen.codec.id, frozen.codec.latent_scale, frozen.text_encoder.id, categories, sampling=sampling
    )
    sampler = build_sampler(args, dataset, dist)
    has_previews = args.online_eval or args.sample_freq > 0
    if has_previews:
        cosine_masked_counts(config.num_tokens, sampling.num_iter)  # raises if num_iter does not fit
    scenes = build_scenes(args, dataset) if has_previews else []
    scored = build_online_targets(args, config, categories, dist.device)
    source = find_source(args.output_dir, args.resume, not args.no_auto_resume, args.train_mode)
    check_identity(source, identity)

    values = resolved_dict(args)
    log_changed_args(source, values, NOT_TRAINING)
    model = initial_model(args, config, source, args.train_mode)
    learner = build_learner(args, model, args.train_mode, source, dist)
    batches = coco_batches(
        dataset, sampler, config.max_objects, args.num_workers, args.pin_mem and dist.device.type == "cuda"
    )
    global_batch = args.batch_size * dist.world_size
    start = resumed_position(source, global_batch, args.accum_iter, len(batches) // args.accum_iter)
    output_dir = Path(args.output_dir)
    preview = Preview(
        learner, frozen.codec, frozen.text_encoder, scenes, sampling, args.seed, args.eval_bsz, args.precision, dist,
        output_dir / "samples",
    )  # fmt: skip
    evaluation = None
    if scored is not None:
        evaluation = OnlineEvaluation(
            learner,
            frozen.codec,
            frozen.text_encoder,
            *scored,
            sampling,
            args.seed,
            args.eval_bsz,
            args.precision,
            dist,
        )
    settings = train_config(args)
    run = TrainingRun(
        config=settings,
        learner=learner,
        schedule=lr_schedule(args, dist.world_size),
        batches=batches,
        step=SupervisedStep(settings, learner, coco_inputs(args, frozen, dist.device), dist),
        dist=dist,
        save=saver(learner, output_dir, args.train_mode, identity, values, global_batch, dist),
        preview=preview if has_previews else None,
        evaluate=evaluation,
    )
    return Prepared(run, start, args.train_mode, values, (describe_size(run, batches, dist),))


def coco_inputs(args: argparse.Namespace, frozen: Frozen, device: torch.device) -> CocoInputs:
    rates = DropRates(args.label_drop_prob, args.text_drop_prob, args.layout_drop_prob)
    return CocoInputs(frozen.codec, frozen.text_encoder, rates, args.seed, device)


def describe_size(run: TrainingRun, batches: CocoBatches, dist: DistInfo) -> str:
    return (
        f"{len(batches.dataset)} images, {run.steps_per_epoch} steps per epoch, {run.total_steps} steps in all, "
        f"{dist.world_size} processes on {dist.device}"
    )


def saver(
    learner: Learner,
    output_dir: Path,
    stage: str,
    identity: Identity,
    args: dict[str, Any],
    global_batch: int,
    dist: DistInfo,
    extra: Callable[[], dict[str, Any]] = dict,
) -> Callable[[Position], None]:
    """Writes checkpoint-last.pth, atomically, on rank 0. extra: what this stage keeps besides (every process calls)."""

    def save(position: Position) -> None:
        content = checkpoint_content(learner, position, stage, identity, args, global_batch) | extra()
        if dist.is_main:
            save_atomic(content, output_dir / LAST_NAME)
            logger.info("saved %s at epoch %d, step %d", output_dir / LAST_NAME, position.epoch, position.step)
        barrier()

    return save
