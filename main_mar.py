"""Stages 1 and 2 of StructMAR: align the new parts of a MAR model to captions and boxes, then fine-tune all of it.

    python main_mar.py --train_mode text_layout --resume pretrained_models/mar_huge.safetensors ...
    python main_mar.py --train_mode full --resume output/stage1_align/checkpoint-last.pth ...
    torchrun --nproc_per_node 8 main_mar.py ...

`python main_mar.py --help` lists every flag; `--config FILE.yaml` gives any of them. The run folder (--output_dir) has
args.yaml, environment.json, log.txt, metrics.jsonl, tensorboard/, samples/ and checkpoint-last.pth.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.arguments import train_parser
from engine.build import Prepared, build_training
from engine.train import train
from engine.validate import validate_train_args
from util.config import dump_yaml, parse_args
from util.distributed import DistInfo, init_distributed, shutdown
from util.logging import MetricWriter, setup_logging
from util.run_info import describe_environment
from util.signals import StopRequest

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 128 + the number of the signal that stopped the run (after saving).

    Raises SystemExit with one line for a user's mistake; the run folder is untouched then.
    """
    args = parse_args(train_parser(), argv)
    try:
        validate_train_args(args)
        dist = init_distributed(args.device)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"main_mar.py: error: {error}") from error
    try:
        return run_stage(args, dist)
    finally:
        shutdown()


def run_stage(args: argparse.Namespace, dist: DistInfo) -> int:
    setup_logging(None, dist.rank)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        prepared = build_training(args, dist)
    except (ValueError, FileNotFoundError) as error:
        logger.debug("where it was found", exc_info=True)
        raise SystemExit(f"main_mar.py: error: {error}") from error
    with StopRequest() as stop, open_run_folder(args, prepared, dist) as writer:
        signum = train(prepared.run, prepared.start, writer, stop)
    return 0 if signum is None else 128 + signum


def open_run_folder(args: argparse.Namespace, prepared: Prepared, dist: DistInfo) -> MetricWriter:
    """What it takes to repeat the run goes there first."""
    folder = Path(args.output_dir)
    setup_logging(folder, dist.rank)
    if dist.is_main:
        dump_yaml(prepared.args, folder / "args.yaml")
        environment = {**describe_environment(dist.device), "processes": dist.world_size}
        (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    logger.info("run folder %s, stage '%s', from step %d", folder, args.train_mode, prepared.start.step)
    return MetricWriter(folder, dist.rank, prepared.start.step, args.log_dir)


if __name__ == "__main__":
    sys.exit(main())
