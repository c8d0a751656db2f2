"""From parsed arguments to a training of MARS (main_mar.py --backbone mars): a frozen language model, experts that
train on captions and codes, and the loop, run folder and checkpoints of all stages. Everything that can be wrong is
found here, before the run writes its first byte."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.mars_run import MarsCheckpoint, check_mars_identity, find_mars_source, load_mars_weights
from engine.checkpoint.resume import (
    Source,
    check_training_state,
    log_changed_args,
    log_continuation,
    restore,
    restore_open_interval,
    restore_order,
    resumed_position,
)
from engine.cli.build import FREE_FLAGS, PreparedRun, build_sampler, lr_schedule
from engine.cli.build_train import train_config
from engine.data.cache import LatentCache, LatentCacheKey
from engine.data.check import DataCheck, check_dataset
from engine.data.coco import CocoLayoutDataset, DataConfig, ResumableSampler, collate
from engine.data.loader import load_batches
from engine.data.pairs import PairInputs
from engine.data.translations import Translations
from engine.eval.mars import HeldOut, MarsEvaluation, MarsLook, MarsPreview, held_out_of
from engine.train.loop import TrainingRun, course_of
from engine.train.mars import LossWeights, MarsState, MarsStep
from engine.train.optim import absolute_lr, build_optimizer
from engine.train.parallel import shard, wrap
from engine.train.profile import build_profiler
from models.config import PRECISIONS
from models.frozen.causal_lm import CausalLm, open_causal_lm
from models.frozen.codec import load_codec
from models.frozen.codes import CodeCodec
from models.mars.identity import MarsIdentity
from models.mars.losses import MarsObjective
from models.mars.model import Mars, MarsConfig
from models.mars.sampling import DrawOptions
from models.mars.stages import JOINT, UPSCALE
from models.mars.words import MAX_TOKENS, CaptionWords
from models.semvie import require_room
from util.buckets import Size
from util.config import resolved_dict, told_as_flags
from util.distributed import DistInfo, failing_together
from util.ema import Ema
from util.names import MARS_ENTRY
from util.rng import generator
from util.split_entries import parts_of

logger = logging.getLogger(__name__)

OWN_FREE_FLAGS = ("max_steps", "eval_freq", "eval_bsz", "eval_images", "online_eval", "num_preview", "lm_path")
MAX_AVERAGED = 10**9
"""Parameters of which a moving average is kept at most: it takes as much memory as they do."""
MAX_OBJECTS = 1  # boxes are read with the images and not used


@dataclass(frozen=True)
class MarsParts:
    """What a run is made of, read and checked to fit together: no expert is made and nothing is written yet."""

    dist: DistInfo
    codec: CodeCodec
    base: CausalLm
    words: CaptionWords
    identity: MarsIdentity
    dataset: CocoLayoutDataset
    translations: Translations | None
    sampler: ResumableSampler
    check: DataCheck
    source: Source
    options: DrawOptions
    held_out: HeldOut | None
    flags: dict[str, Any]

    @property
    def low_size(self) -> Size | None:
        """(height, width) in pixels of the small pictures that stage III makes larger; None in other stages."""
        return low_size_of(self.codec, self.identity.config)


def build_mars_training(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything MARS trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    parts = read_mars_parts(args, dist)
    state = build_mars_state(args, parts)
    source, config, stage = parts.source, train_config(args), parts.identity.stage
    weights = LossWeights(args.caption_weight, args.choice_weight)
    inputs = PairInputs(
        parts.codec, parts.words, parts.translations, args.label_drop_prob, args.seed, dist.device, parts.low_size
    )  # fmt: skip
    step = MarsStep(config, state, inputs, weights, dist)
    pin_memory = args.pin_mem and dist.device.type == "cuda"
    batches = load_batches(parts.dataset, parts.sampler, collate(MAX_OBJECTS), args.num_workers, pin_memory)
    if source.kind == "continue":
        restore_open_interval(step, source, dist)
    written = MarsCheckpoint(
        state, parts.identity, Path(args.output_dir), parts.flags, batches.global_batch, dist, step.open_interval,
        args.keep_every,
    )  # fmt: skip
    preview, evaluation = looks(args, parts, state)
    course = course_of(config, batches.num_images, batches.global_batch)
    start = resumed_position(source, course)
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
        evaluate=evaluation,
        profiler=build_profiler(args.profile_steps, start.step, args.output_dir, dist.is_main),
    )
    log_continuation(source, course, batches.global_batch)
    size = (
        f"{len(parts.dataset)} images, {course.steps_per_epoch} steps per epoch, "
        f"{start.step + course.steps_left(start)} steps in all, {dist.world_size} processes on {dist.device}"
    )
    return PreparedRun(run, start, stage, parts.flags, (size, languages_line(parts)), parts.check)


def read_mars_parts(args: argparse.Namespace, dist: DistInfo) -> MarsParts:
    """Raises ValueError or FileNotFoundError, naming what is missing or does not fit."""
    options = draw_options(args)
    require_other_split(args)
    codec = open_codes(args, dist.device)
    base = open_causal_lm(args.lm_path, getattr(torch, PRECISIONS[args.lm_precision]))
    words = CaptionWords(base.tokenizer, args.max_text_tokens or MAX_TOKENS)
    side = codes_of_side(args, codec)
    source = find_mars_source(args.output_dir, args.resume, args.auto_resume, args.train_mode)
    if args.train_mode != JOINT and source.kind == "scratch":
        raise ValueError(f"--train_mode {args.train_mode} starts from trained weights: --resume names them")
    config = MarsConfig(codec.codebook_size, (side, side), args.copied_norms)
    if args.train_mode == UPSCALE:
        config = larger_than_source(args, config, source)
    require_positions(args, base, words, config)
    identity = MarsIdentity(base.id, base.model_type, config, codec.id, words.max_tokens, args.train_mode)
    check_mars_identity(source, identity)
    check_training_state(source)
    data = data_config(args)
    dataset, translations = build_mars_dataset(args, data, codec)
    with failing_together():
        check = check_dataset(dataset, args.output_dir) if dist.is_main else DataCheck()
    sampler = build_sampler(args, dataset, dist)
    restore_order(sampler, source)
    warmup = args.ema_warmup if args.ema_warmup is not None else source.has_ema_warmup
    flags = resolved_dict(args) | {"ema_warmup": warmup}
    held_out = read_held_out(args, data, codec, low_size_of(codec, config))
    return MarsParts(
        dist, codec, base, words, identity, dataset, translations, sampler, check, source, options, held_out, flags
    )  # fmt: skip


def draw_options(args: argparse.Namespace) -> DrawOptions:
    """How previews are drawn."""
    with told_as_flags(("top_k",)):
        try:
            return DrawOptions(args.cfg, args.temperature, args.top_k)
        except ValueError as error:
            raise ValueError(f"--{error}") from error


def require_other_split(args: argparse.Namespace) -> None:
    """Raises ValueError if losses would be measured, as held-out ones, on pictures that are trained on."""
    if args.online_eval and not set(parts_of(args.eval_split)).isdisjoint(parts_of(args.coco_split)):
        raise ValueError(
            f"--online_eval measures losses on pictures that are not trained on, --eval_split {args.eval_split} and "
            f"--coco_split {args.coco_split} share some"
        )


def open_codes(args: argparse.Namespace, device: torch.device) -> CodeCodec:
    codec = load_codec(args.vae_path, device)
    if not isinstance(codec, CodeCodec):
        raise ValueError(f"--vae_path {args.vae_path} makes continuous latents, --backbone mars needs a VQ, of codes")
    return codec


def codes_of_side(args: argparse.Namespace, codec: CodeCodec) -> int:
    if args.img_size % codec.stride:
        raise ValueError(f"--img_size {args.img_size} is no multiple of the {codec.stride} pixels of a code")
    return int(args.img_size) // codec.stride


def larger_than_source(args: argparse.Namespace, config: MarsConfig, source: Source) -> MarsConfig:
    """What makes the pictures larger that the source draws, or that it makes larger itself if it is of stage III."""
    before = MarsIdentity.of(source.state[MARS_ENTRY], f"{source.path}: {MARS_ENTRY}").config
    try:
        return replace(config, low_grid=before.low_grid or before.grid)
    except ValueError as error:
        raise ValueError(f"--img_size {args.img_size} against {source.path}: {error}") from error


def low_size_of(codec: CodeCodec, config: MarsConfig) -> Size | None:
    low = config.low_grid
    return None if low is None else (low[0] * codec.stride, low[1] * codec.stride)


def require_positions(args: argparse.Namespace, base: CausalLm, words: CaptionWords, config: MarsConfig) -> None:
    """Raises ValueError if the longest sequence is more than the language model is made for: [BOS] <img> codes </img>
    caption, or in stage III [BOS] caption <img> low codes </img> <img> codes."""
    try:
        require_room(base.lm.get_decoder(), words.max_tokens + config.num_tokens + (config.low_length or 2))
    except ValueError as error:
        said = f"--max_text_tokens {words.max_tokens} and --img_size {args.img_size}, {config.num_tokens} codes"
        raise ValueError(f"{said}, do not fit into {args.lm_path}: {error}") from error


def data_config(args: argparse.Namespace) -> DataConfig:
    """Images and captions; of boxes, whatever there is."""
    return DataConfig(
        coco_root=args.coco_root,
        split=args.coco_split,
        img_size=args.img_size,
        crop=args.crop,
        hflip_prob=args.hflip_prob,
        caption_mode=args.caption_mode,
        max_objects=MAX_OBJECTS,
        min_visibility=0.0,
        seed=args.seed,
    )


def build_mars_dataset(
    args: argparse.Namespace, config: DataConfig, codec: CodeCodec
) -> tuple[CocoLayoutDataset, Translations | None]:
    """The training data, from images or from cached codes, and its captions in the other language, if it has them."""
    index, latents = config.load_index(), None
    translations = Translations.find(index)
    if args.use_cached:
        folder = Path(args.cached_path) / "latents"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--cached_path {args.cached_path} has no latents/: make it with python -m scripts.cache_latents"
            )
        key = LatentCacheKey(
            codec.id, codec.latent_scale, config.split, config.img_size, codebook_size=codec.codebook_size
        )
        latents = LatentCache(folder, key)
    sided = translations.sided() if translations else ()
    return CocoLayoutDataset(index, config, latents, sided=sided), translations


def read_held_out(
    args: argparse.Namespace, data: DataConfig, codec: CodeCodec, low_size: Size | None
) -> HeldOut | None:
    """What previews draw and tell, and what losses are measured on; None without both. Of the training split where no
    other one is named, which previews alone allow."""
    has_previews = args.sample_freq > 0 or args.online_eval
    counts = [args.num_preview] * has_previews + [args.eval_images] * args.online_eval
    if not counts:
        return None
    config = DataConfig(data.coco_root, args.eval_split or data.split, data.img_size, max_objects=MAX_OBJECTS,
                        min_visibility=0.0)  # fmt: skip
    return held_out_of(config, max(counts), codec, args.eval_bsz, low_size)


def build_mars_state(args: argparse.Namespace, parts: MarsParts) -> MarsState:
    """The model with the source's weights, placed and wrapped; optimizer and average, restored where the run
    continues."""
    dist, source = parts.dist, parts.source
    log_changed_args(source, parts.flags, FREE_FLAGS + OWN_FREE_FLAGS)
    model = Mars(parts.base.lm, parts.identity.config, generator(args.seed, "mars"), torch.float32)
    load_mars_weights(model, source, parts.identity.stage)
    model.set_grad_checkpointing(args.grad_checkpointing)
    objective = MarsObjective(model.to(dist.device))
    num_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    num_frozen = sum(each.numel() for each in model.parameters()) - num_trained
    logger.info("%s: %s parameters are frozen, %s train", parts.identity.base_type, f"{num_frozen:,}",
                f"{num_trained:,}")  # fmt: skip
    if args.ema_rate > 0 and num_trained > MAX_AVERAGED:
        raise ValueError(
            f"--ema_rate {args.ema_rate} would keep a second copy of {num_trained:,} parameters, at most "
            f"{MAX_AVERAGED:,} are averaged: --ema_rate 0 keeps none"
        )
    if args.fsdp:
        shard(objective, model.fsdp_units(), dist.device, dist.world_size)
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    first_lr = absolute_lr(args.lr, args.blr, args.batch_size * args.accum_iter * dist.world_size)
    optimizer = build_optimizer(trainable, first_lr, args.weight_decay)
    averaged = trainable if args.ema_rate > 0 else {}
    ema = Ema(averaged, args.ema_rate, parts.flags["ema_warmup"])
    wrapped = wrap(objective, dist.device, dist.world_size)
    state = MarsState(objective, wrapped, trainable, optimizer, ema)
    restore(state, source)
    return state


def looks(
    args: argparse.Namespace, parts: MarsParts, state: MarsState
) -> tuple[MarsPreview | None, MarsEvaluation | None]:
    """What shows how far the run has come."""
    if parts.held_out is None:
        return None, None
    look = MarsLook(state, parts.words, args.precision, parts.dist)
    preview = MarsPreview(
        look, parts.held_out.first(args.num_preview), parts.codec, parts.options, args.seed, args.eval_bsz,
        Path(args.output_dir) / "samples",
    )  # fmt: skip
    evaluation = MarsEvaluation(look, parts.held_out.first(args.eval_images), args.eval_bsz)
    return preview, evaluation if args.online_eval else None


def languages_line(parts: MarsParts) -> str:
    """In which languages captions come."""
    if parts.translations is None:
        return "captions are in one language"
    names = ", ".join(path.name for path in parts.translations.paths)
    return f"captions are in two languages, one drawn for each image and epoch: {names}"
