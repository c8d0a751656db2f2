"""What stages 1 and 2 hand in: all images of the split, the diffusion loss, previews and scores by epoch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.cli.build import (
    Frozen,
    Parts,
    PreparedRun,
    Stage,
    build_best_keeper,
    build_dataset,
    build_online_evaluation,
    build_pipeline,
    build_train_state,
    coco_inputs,
    data_config,
    prepare_run,
    read_parts,
)
from engine.cli.sizes import picture_sizes
from engine.data.coco import CocoLayoutDataset
from engine.data.scenes import Scene, scenes_from_dataset
from engine.eval.previews import Preview
from engine.train.loop import TrainConfig
from engine.train.state import TrainState
from engine.train.supervised import DrawNoise, SupervisedStep
from models.structmar import StructMARConfig
from util.distributed import DistInfo

FREE_FLAGS = ("max_steps", "eval_freq")
DEFAULT_PHRASE_PROB = 0.5  # of models that know phrases


def build_training(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything stages 1 and 2 train with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    stage = Stage(args.train_mode, build_images, has_previews(args), keeps_sampling=False, free_flags=FREE_FLAGS)
    parts = read_parts(args, dist, stage)
    return prepare_on_images(args, parts, build_train_state(args, parts, args.train_mode))


def has_previews(args: argparse.Namespace) -> bool:
    return bool(args.online_eval or args.sample_freq > 0)


def prepare_on_images(
    args: argparse.Namespace,
    parts: Parts,
    state: TrainState,
    has_dropout: bool = True,
    draw_noise: DrawNoise | None = None,
    extra: Callable[[], dict[str, Any]] = dict,
    notes: Sequence[str] = (),
) -> PreparedRun:
    """A run whose step is `state.wrapped`'s loss on the batches' images, with previews and scores by epoch.

    draw_noise: see `SupervisedStep`. extra: what its checkpoints hold besides. notes: what its log says first.
    """
    scenes = build_scenes(args, parts.captioned) if parts.stage.has_pictures else []
    pipeline = build_pipeline(parts, state)
    preview = Preview(
        pipeline, state.ema, scenes, parts.sampling, args.seed, args.eval_bsz, args.precision, parts.dist,
        Path(args.output_dir) / "samples",
    )  # fmt: skip
    config, keeper = train_config(args), build_best_keeper(args, parts, state)
    return prepare_run(
        args,
        parts,
        state,
        config,
        step=SupervisedStep(config, state, coco_inputs(args, parts), parts.dist, has_dropout, draw_noise),
        preview=preview if parts.stage.has_pictures else None,
        evaluate=build_online_evaluation(args, parts, pipeline, state.ema, keeper),
        extra=lambda: extra() | keeper.content(),
        notes=notes,
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
        mask_schedule=args.mask_schedule,
        log_freq=args.log_freq,
        save_epochs=args.save_last_freq,
        save_steps=args.save_freq_steps,
        keep_steps=args.keep_every,
        preview_epochs=args.eval_freq if args.online_eval else 0,
        preview_steps=args.sample_freq,
    )


def build_images(args: argparse.Namespace, sizes: StructMARConfig, frozen: Frozen) -> CocoLayoutDataset:
    """All images of the split, with their captions and boxes."""
    data = data_config(args, sizes.img_size, sizes.max_objects, picture_sizes(args, sizes))
    data = replace(data, phrase_prob=phrase_prob(args), has_phrases=args.phrases)
    return build_dataset(args, data, data.load_index(), frozen)


def phrase_prob(args: argparse.Namespace) -> float:
    """--phrase_prob, or the one that goes with the model."""
    if args.phrase_prob is None:
        return DEFAULT_PHRASE_PROB if args.phrases else 0.0
    return float(args.phrase_prob)


def build_scenes(args: argparse.Namespace, training: CocoLayoutDataset) -> Sequence[Scene]:
    """The captions and boxes of the previews: of --eval_split, or of the training split."""
    split, index = args.eval_split or args.coco_split, training.index
    if split != index.split:
        index = replace(training.config, split=split, sizes=()).load_index()
        if index.categories != training.index.categories:
            raise ValueError(f"--eval_split {split} has other categories than --coco_split {training.index.split}")
    return scenes_from_dataset(index, training.config.img_size, args.num_preview)
