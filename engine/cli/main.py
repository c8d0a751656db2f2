"""What main_mar.py and main_rl.py do alike: arguments in, a prepared run, its folder, the loop, an exit code."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from engine.cli.build import PreparedRun
from engine.data.check import DataCheck
from engine.train.loop import train
from util.config import dump_yaml
from util.distributed import DistInfo, init_distributed, shutdown
from util.failures import one_line_errors
from util.logging import MetricWriter, setup_logging
from util.output import held_folder, remove_unfinished, write_text_atomic
from util.run_info import describe_environment
from util.signals import StopRequest

logger = logging.getLogger(__name__)


def run_main(
    program: str,
    args: argparse.Namespace,
    build: Callable[[argparse.Namespace, DistInfo], PreparedRun],
    sampling_note: str | None,
) -> int:
    """Returns the exit code: 0, or 128 + the number of the signal that stopped the run (after saving).

    sampling_note: what the log says of sampling options that come from the weights.
    Raises SystemExit with one line for a user's mistake, the run folder is untouched then, and for what fails later.
    """
    with one_line_errors(program, args.debug):
        dist = init_distributed(args.device, args.dist_timeout)
        if args.fsdp and not torch.distributed.is_initialized():
            start = f"start with torchrun --nproc_per_node N {program} ..."
            raise ValueError(f"--fsdp shards over the processes of torchrun: {start}")
        signum = _run_stage(args, build, dist, sampling_note)
        shutdown()
    return 0 if signum is None else 128 + signum


def _run_stage(
    args: argparse.Namespace,
    build: Callable[[argparse.Namespace, DistInfo], PreparedRun],
    dist: DistInfo,
    sampling_note: str | None,
) -> int | None:
    """Returns the signal that stopped the run."""
    setup_logging(None, dist.rank)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    with held_folder(args.output_dir) if dist.is_main else nullcontext():
        prepared = build(args, dist)
        if sampling_note is not None:
            prepared = replace(prepared, notes=(sampling_note, *prepared.notes))
        if args.check_data:
            _end_check(prepared.check, Path(args.output_dir), dist)
            return None
        with StopRequest() as stop, _open_run_folder(args, prepared, dist) as writer:
            return train(prepared.run, prepared.start, writer, stop)


def _end_check(check: DataCheck, folder: Path, dist: DistInfo) -> None:
    """What --check_data does instead of training."""
    for line in check.summary:
        logger.info("%s", line)
    logger.info("all that this run reads is there and whole; it begins without --check_data")
    if dist.is_main:
        check.remember(folder)


def _open_run_folder(args: argparse.Namespace, prepared: PreparedRun, dist: DistInfo) -> MetricWriter:
    """What it takes to repeat the run goes there first."""
    folder = Path(args.output_dir)
    setup_logging(folder, dist.rank)
    if dist.is_main:
        prepared.check.remember(folder)
        remove_unfinished(folder, folder / "samples", folder / "rollouts")
        dump_yaml(prepared.args, folder / "args.yaml")
        environment = {**describe_environment(dist.device), "processes": dist.world_size}
        write_text_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    logger.info("run folder %s, stage '%s', from step %d", folder, prepared.stage, prepared.start.step)
    for note in (*prepared.check.summary, *prepared.notes):
        logger.info("%s", note)
    return MetricWriter(folder, dist.rank, prepared.start.step, args.log_dir)
