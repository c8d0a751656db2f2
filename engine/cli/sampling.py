"""The sampling flags of a command: what they make, and where their defaults come from.

Command line > YAML file > what the weights say (`Identity.sampling`) > parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from models.sampling.config import SamplingConfig
from util.config import given_options, parse_args


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """Raises ValueError for a value out of range."""
    return SamplingConfig(
        num_iter=args.num_iter,
        num_sampling_steps=args.num_sampling_steps,
        cfg_text=args.cfg if args.cfg_text is None else args.cfg_text,
        cfg_layout=args.cfg if args.cfg_layout is None else args.cfg_layout,
        cfg_schedule=args.cfg_schedule,
        temperature=args.temperature,
        clip_x0=args.clip_x0,
        t_max=args.t_max,
        num_sampling_steps_last=args.num_sampling_steps_last,
        order=args.order,
        guidance_interval=tuple(args.guidance_interval),
        uncond_refresh=args.uncond_refresh,
    )


def parse_sampling_args(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
) -> tuple[argparse.Namespace, str | None]:
    """As `parse_args`, with the options that the weights of --resume name as defaults; and a line that says which.

    check: raises ValueError or FileNotFoundError for arguments that do not go together. It is called before the
    weights are looked at, which takes seconds as PyTorch is imported, and again with what they name.
    """
    args = parse_args(parser, argv)
    check(args)
    own = _named_by_weights(args.resume)
    if own is None:
        return args, None
    given = given_options(parser, argv)
    both_scales = {"cfg_text", "cfg_layout"} if "cfg" in given else set()  # --cfg stands for both
    options = asdict(own) | {"guidance_interval": list(own.guidance_interval)}
    defaults = {name: value for name, value in options.items() if name not in given | both_scales}
    args = parse_args(parser, argv, defaults)
    check(args)
    used = [
        f"{name} {value}"
        for name, value in defaults.items()
        if vars(args)[name] == value != parser.get_default(name)
    ]  # fmt: skip
    return args, f"sampling options from the weights: {', '.join(used)}" if used else None


def _named_by_weights(path: str | None) -> SamplingConfig | None:
    if not path or not Path(path).exists():
        return None
    from engine.checkpoint.files import read_identity

    try:
        identity = read_identity(path)
    except (FileNotFoundError, ValueError):
        return None  # loading the weights says what is wrong with them, after the flags are checked
    return None if identity is None else identity.sampling
