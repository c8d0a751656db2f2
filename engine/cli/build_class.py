"""What pretraining by class hands in (--train_mode class): labelled pictures, the model without captions and boxes."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli.build import Frozen, PreparedRun, Stage, build_pipeline, build_train_state, prepare_run, read_parts
from engine.cli.build_train import train_config
from engine.data.cache import LatentCache, LatentCacheKey
from engine.data.classes import SPLIT, ClassDataset, ClassIndex
from engine.data.inputs import ClassInputs
from engine.data.scenes import text_scene
from engine.eval.previews import Preview
from engine.train.supervised import SupervisedStep
from models.structmar import StructMARConfig
from util.distributed import DistInfo


def build_class_training(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything main_mar.py pretrains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    has_previews = args.sample_freq > 0
    stage = Stage(
        args.train_mode, build_classes, has_previews, keeps_sampling=False, free_flags=("max_steps",),
        has_captions=False,
    )  # fmt: skip
    parts = read_parts(args, dist, stage)
    state = build_train_state(args, parts, args.train_mode)
    names = parts.identity.class_names
    labels = [number * len(names) // args.num_preview for number in range(args.num_preview)]
    preview = Preview(
        build_pipeline(parts, state), state.ema, [text_scene(names[label]) for label in labels], parts.sampling,
        args.seed, args.eval_bsz, args.precision, dist, Path(args.output_dir) / "samples", labels,
    )  # fmt: skip
    config = train_config(args)
    inputs = ClassInputs(parts.frozen.codec, args.label_drop_prob, args.seed, dist.device)
    return prepare_run(
        args,
        parts,
        state,
        config,
        step=SupervisedStep(config, state, inputs, dist),
        preview=preview if has_previews else None,
        evaluate=None,
    )


def build_classes(args: argparse.Namespace, sizes: StructMARConfig, frozen: Frozen) -> ClassDataset:
    """All pictures of --class_root, or their latents from --cached_path. Raises ValueError unless the model has as many
    classes, and where the cache is none of these pictures."""
    index = ClassIndex.load(args.class_root)
    index.require_class_num(sizes.class_num)
    latents = None
    if args.use_cached:
        codec = frozen.codec
        key = LatentCacheKey(codec.id, codec.latent_scale, SPLIT, sizes.img_size, codebook_size=codec.codebook_size)
        latents = LatentCache(Path(args.cached_path) / "latents", key)
    return ClassDataset(index, sizes.img_size, args.crop, args.hflip_prob, args.seed, latents)
