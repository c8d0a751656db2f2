"""The training of scripts/mini/pretrain_mar.py, which says what it does."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.identity import Identity
from engine.checkpoint.load import require_fitting_codec
from engine.checkpoint.resume import (
    check_identity,
    check_training_state,
    find_source,
    load_weights,
    restore,
    resumed_position,
)
from engine.checkpoint.writer import CheckpointWriter
from engine.data.classes import ClassBatch
from engine.data.inputs import ClassInputs
from engine.sample.pipeline import StructMARPipeline
from engine.train.loop import TrainConfig, TrainingRun, train
from engine.train.optim import LrSchedule, build_optimizer
from engine.train.state import TrainState
from engine.train.supervised import SupervisedStep
from models.build import build_model
from models.frozen.codec import Codec, load_codec
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR, StructMARConfig, preset_config
from models.weights import select_trainable
from scripts.mini.drawing import CLASSES
from scripts.mini.scenes import render_single
from util.distributed import DistInfo, init_distributed
from util.ema import Ema
from util.images import make_grid, save_png, to_model_range
from util.logging import MetricWriter, progress, setup_logging
from util.rng import derive_seed, generator
from util.signals import StopRequest

logger = logging.getLogger(__name__)

STAGE = "class"


@dataclass(frozen=True)
class SingleObjects:
    """`Batches` of images that were drawn and encoded once. moments: [n, 2C, h, w]; labels: [n]."""

    moments: Tensor
    labels: Tensor
    batch_size: int
    seed: int

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def global_batch(self) -> int:
        return self.batch_size

    def of_epoch(self, epoch: int, start: int) -> Iterator[ClassBatch]:
        order = torch.randperm(len(self.labels), generator=generator(self.seed, "order", epoch))
        for first in range(start, len(order) - self.batch_size + 1, self.batch_size):
            ids = order[first : first + self.batch_size]
            yield ClassBatch(ids.tolist(), self.labels[ids], moments=self.moments[ids])


@torch.no_grad()
def draw_and_encode(codec: Codec, num_images: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """moments [n, 2C, h, w] and labels [n] of `num_images` images; the class of image k is k modulo the classes."""
    labels, chunk = torch.arange(num_images) % len(CLASSES), 100
    moments = []
    for start in progress(range(0, num_images, chunk), desc="drawing"):
        ids = range(start, min(start + chunk, num_images))
        images = [draw(index, size, seed) for index in ids]
        moments.append(codec.encode(torch.stack([to_model_range(image) for image in images])))
    return torch.cat(moments), labels


def draw(index: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(derive_seed(seed, "single", index))
    return render_single(rng, CLASSES[index % len(CLASSES)].id, size).image


def build_train_state(args: argparse.Namespace, config: StructMARConfig, dist: DistInfo) -> TrainState:
    torch.manual_seed(derive_seed(args.seed, "init"))
    model = build_model(config).to(dist.device)
    trainable = select_trainable(model, STAGE)
    optimizer = build_optimizer(trainable, args.lr, weight_decay=0.02)
    return TrainState(model, model, trainable, optimizer, Ema(trainable, args.ema_rate))


def pretrain(args: argparse.Namespace, dist: DistInfo) -> int | None:
    """Returns the signal that stopped it, or None when the weights are written."""
    codec = load_codec(args.vae_path, dist.device)
    config = preset_config("mar_mini", rope_mode="off", diffusion_batch_mul=args.diffusion_batch_mul)
    require_fitting_codec(codec, args.vae_path, config)
    identity = Identity(config, codec.id, codec.latent_scale, "", ())
    source = find_source(args.work_dir, "", auto_resume=True, stage=STAGE)
    check_identity(source, identity)
    check_training_state(source)
    state = build_train_state(args, config, dist)
    load_weights(state.model, source, STAGE)
    restore(state, source)
    moments, labels = draw_and_encode(codec, args.num_images, config.img_size, args.seed)
    logger.info("standard deviation of the scaled latents: %.3f", float(codec.mode(moments).std()))
    batches = SingleObjects(moments, labels, args.batch_size, args.seed)
    steps_per_epoch = args.num_images // args.batch_size
    epochs = -(-args.steps // steps_per_epoch)
    settings = TrainConfig(
        args.seed, epochs, args.steps, precision=args.precision, log_freq=50, save_epochs=0, save_steps=250
    )
    step = SupervisedStep(settings, state, ClassInputs(codec, 0.1, args.seed, dist.device), dist)
    work_dir = Path(args.work_dir)
    written = CheckpointWriter(state, work_dir, STAGE, identity, vars(args), args.batch_size, dist, step.open_interval)
    run = TrainingRun(
        config=settings,
        state=state,
        schedule=LrSchedule(args.lr, args.lr / 50, 2, args.steps / steps_per_epoch, "cosine"),
        batches=batches,
        step=step,
        dist=dist,
        save=written.save,
    )
    start = resumed_position(source, run.course)
    with StopRequest() as stop, MetricWriter(work_dir, dist.rank, start.step) as writer:
        signum = train(run, start, writer, stop)
    if signum is None:
        with state.ema.applied():
            write_weights(state.model, Path(args.output))
            write_samples(state.model, codec, Path(args.work_dir) / "samples.png", args.seed)
    return signum


def write_weights(model: StructMAR, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path)
    logger.info("wrote %s, %.1f MB", path, path.stat().st_size / 1e6)


def write_samples(model: StructMAR, codec: Codec, path: Path, seed: int) -> None:
    labels = [index for index in range(len(CLASSES)) for _ in range(4)]
    sampling = SamplingConfig(num_iter=16, num_sampling_steps=50, cfg_text=2.0, clip_x0=5.0)
    seeds = [derive_seed(seed, "sample", index) for index in range(len(labels))]
    model.eval()
    pipeline = StructMARPipeline.from_parts(model, codec, caption_encoder=None)
    images = pipeline.draw_classes(labels, sampling, seeds, batch_size=len(labels))
    save_png(make_grid(images, columns=12), path)
    logger.info("samples by class: %s", path)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 128 + the number of the signal that stopped it. Raises ValueError or FileNotFoundError."""
    torch.set_num_threads(args.num_threads)
    dist = init_distributed(args.device)
    setup_logging(Path(args.work_dir), dist.rank)
    signum = pretrain(args, dist)
    return 0 if signum is None else 128 + signum
