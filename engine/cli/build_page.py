"""From parsed arguments to a page that is served (scripts/page.py): every input read and checked first."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Callable
from typing import Any

import torch

from engine.cli.sampling import sampling_config
from engine.cli.speed import SPEEDS, speed_preset
from engine.data.scenes import Scene, read_layout_file
from engine.page.server import PageServer
from engine.page.studio import Studio
from engine.sample.generate import require_drawable
from engine.sample.pipeline import StructMARPipeline
from models.frozen.faster_rcnn import load_detector
from models.sampling.config import OPTIONS_OF_HEAD, SamplingConfig
from util.distributed import init_distributed
from util.logging import setup_logging

logger = logging.getLogger(__name__)


def serve_page(args: argparse.Namespace, sampling_note: str | None, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted. say: gets the page's address once it can be opened.

    sampling_note: what the log says of sampling options that come from the weights.
    Raises ValueError or FileNotFoundError for weights, files or an address that cannot be used.
    """
    setup_logging()
    if sampling_note:
        logger.info(sampling_note)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    server = PageServer(args.host, args.port, make_studio(args), (args.host, *args.allowed_hosts))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start programs in the background without it
    try:
        say(server.url)
        server.serve_forever()
    finally:
        server.server_close()


def make_studio(args: argparse.Namespace) -> Studio:
    """The pipeline of the weights, the detector and the examples, where some are named."""
    device = init_distributed(args.device).device
    config = sampling_config(args)
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume,
        args.vae_path,
        args.clip_path,
        device,
        args.ema,
        args.allow_other_frozen,
        args.planner_path or None,
        max_text_tokens=args.max_text_tokens,
    )
    examples: list[Scene] = read_layout_file(args.examples, pipeline.known_labels) if args.examples else []
    require_drawable(pipeline.model.config, config, examples)
    return Studio(
        pipeline,
        config,
        sample_command(args),
        page_speeds(config, args.precision),
        examples,
        args.precision,
        args.batch_size,
        load_detector(args.detector, device) if args.detector else None,
    )


def sample_command(args: argparse.Namespace) -> tuple[str, ...]:
    """The words of `scripts.sample` with these weights."""
    words = ["python", "-m", "scripts.sample", "--resume", args.resume]
    words += ["--vae_path", args.vae_path, "--text_encoder", args.clip_path]
    if args.max_text_tokens is not None:
        words += ["--max_text_tokens", str(args.max_text_tokens)]
    switches = {"--no-ema": not args.ema, "--allow_other_frozen": args.allow_other_frozen}
    words += [flag for flag, is_given in switches.items() if is_given]
    if args.device != "auto":
        words += ["--device", args.device]
    if args.num_threads is not None:
        words += ["--num_threads", str(args.num_threads)]
    return tuple(words)


def page_speeds(config: SamplingConfig, precision: str) -> dict[str, dict[str, Any]]:
    """What every preset makes of the options and the precision that the page begins with: the fields that differ from
    those of any other preset. Options of another head are left out, and presets that come to the same as another."""
    foreign = {name for head, names in OPTIONS_OF_HEAD.items() if head != config.head for name in names}
    plain = {**config.to_dict(), "precision": precision}
    touched = sorted({key for name in SPEEDS for key in speed_preset(name, plain)} - foreign)
    speeds: dict[str, dict[str, Any]] = {}
    for name in SPEEDS:
        values = {**plain, **speed_preset(name, plain)}
        own = {key: values[key] for key in touched}
        if own not in speeds.values():
            speeds[name] = own
    return speeds
