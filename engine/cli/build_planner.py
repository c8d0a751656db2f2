"""From parsed arguments to a planner's training run (scripts/train_planner.py). No pixel is read."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from engine.cli.build import PreparedRun
from engine.data.cache import TextCache, TextCacheKey
from engine.data.check import DataCheck
from engine.data.coco import Batch, CocoLayoutDataset, DataConfig, collate
from engine.data.loader import LoadedBatches, load_batches, sampler_of
from engine.plan.data import MakePlannerInputs, stopping_set, without_held_out
from engine.plan.files import PlannerIdentity
from engine.plan.training import PlannerCheckpoint, PlannerEvaluation, PlannerState, PlannerStep
from engine.train.loop import TrainConfig, TrainingRun, course_of
from engine.train.optim import LrSchedule, absolute_lr, build_optimizer
from engine.train.parallel import wrap
from models.frozen.encoder import CaptionEncoder, load_text_encoder
from models.planner import Planner, PlannerConfig
from util.coco import CocoIndex
from util.config import resolved_dict
from util.distributed import DistInfo
from util.ema import Ema
from util.rng import derive_seed

logger = logging.getLogger(__name__)

STAGE = "planner"
EVALUATED_AT_ONCE = 256  # captions


def annotation_config(args: argparse.Namespace, max_objects: int, hflip_prob: float) -> DataConfig:
    return DataConfig(
        coco_root=args.coco_root,
        split=args.coco_split,
        img_size=args.img_size,
        hflip_prob=hflip_prob,
        max_objects=max_objects,
        min_area=args.min_area,
        min_visibility=args.min_visibility,
        drop_empty=True,
        seed=args.seed,
    )


def build_planner_training(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything that a planner trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    data = annotation_config(args, args.max_objects, args.hflip_prob)
    index = without_held_out(data.load_index(), args.held_out_every)
    trains, decides = stopping_set(index, args.stop_share, args.seed)
    encoder = load_text_encoder(args.clip_path, dist.device, args.max_text_tokens)
    sizes = PlannerConfig(
        len(index.categories), encoder.dim, args.max_objects, args.num_bins, args.width, args.depth, args.num_heads,
        args.dropout,
    )  # fmt: skip
    identity = PlannerIdentity(sizes, index.categories, encoder.id)
    make_inputs = MakePlannerInputs(encoder, sizes, dist.device)
    batches = training_batches(args, data, trains, encoder, dist)
    state = build_state(args, sizes, dist, batches.global_batch)
    config = TrainConfig(
        args.seed, args.epochs, args.max_steps, precision=args.precision, grad_clip=args.grad_clip,
        log_freq=args.log_freq, save_steps=args.save_freq_steps, eval_steps=args.eval_freq, preview_epochs=args.epochs,
    )  # fmt: skip
    step, folder = PlannerStep(config, state, make_inputs, dist), Path(args.output_dir)
    asked = stopping_batches(annotation_config(args, args.max_objects, 0.0), decides)
    evaluation = PlannerEvaluation(state, identity, make_inputs, asked, folder, args.seed, args.patience, dist)
    flags = resolved_dict(args)
    checkpoint = PlannerCheckpoint(state, identity, step, evaluation, folder, flags, dist)
    course = course_of(config, batches.num_images, batches.global_batch)
    start = course.entered(checkpoint.restore(args.auto_resume))
    lr = absolute_lr(args.lr, args.blr, batches.global_batch)
    schedule = LrSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs, args.lr_schedule)
    run = TrainingRun(config, state, schedule, batches, step, dist, checkpoint.save, evaluate=evaluation)
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    size = f"{len(trains)} images train and {len(decides)} decide, {num_parameters:,} parameters on {dist.device}"
    return PreparedRun(run, start, STAGE, flags, (size,), DataCheck())


def build_state(args: argparse.Namespace, sizes: PlannerConfig, dist: DistInfo, global_batch: int) -> PlannerState:
    torch.manual_seed(derive_seed(args.seed, "init"))  # modules are initialised from the global generator
    model = Planner(sizes).to(dist.device)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, absolute_lr(args.lr, args.blr, global_batch), args.weight_decay)
    ema = Ema(parameters, args.ema_rate, has_warmup=True)
    return PlannerState(model, wrap(model, dist.device, dist.world_size), optimizer, ema)


def training_batches(
    args: argparse.Namespace, data: DataConfig, index: CocoIndex, encoder: CaptionEncoder, dist: DistInfo
) -> LoadedBatches:
    """Batches of captions and layouts; with text states where --cached_path has them."""
    texts = None
    if args.cached_path:
        folder = Path(args.cached_path) / "text"
        if not folder.is_dir():
            raise FileNotFoundError(f"--cached_path {args.cached_path} has no text/: see scripts.cache_latents")
        texts = TextCache(folder, TextCacheKey(encoder.id, data.split))
    dataset = CocoLayoutDataset(index, data, texts=texts, has_images=False)
    sampler = sampler_of(dataset, dist.rank, dist.world_size, args.seed, args.batch_size)
    return load_batches(dataset, sampler, collate(args.max_objects), args.num_workers, False)


def stopping_batches(data: DataConfig, index: CocoIndex) -> list[Batch]:
    """All images of the stopping set, each with one caption, the same ones always."""
    dataset = CocoLayoutDataset(index, data, has_images=False)
    samples = [dataset[item] for item in range(len(dataset))]
    parts = [samples[first : first + EVALUATED_AT_ONCE] for first in range(0, len(samples), EVALUATED_AT_ONCE)]
    return [collate(data.max_objects)(part) for part in parts]
