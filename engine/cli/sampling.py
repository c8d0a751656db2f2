"""The sampling flags of a command: what they make, and where their defaults come from.

Command line > YAML file > what the weights say (`Identity.sampling`) > the head's defaults > parser.
Some flags are one head's alone (`OPTIONS_OF_HEAD`); which head it is, the weights say, or the flags of a new model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.sampling.config import OPTIONS_OF_HEAD, SamplingConfig, default_sampling, require_options_of
from models.sampling.few import DEFAULT_EVALS, few_sampling
from util.config import given_options, parse_args, told_as_flags
from util.read import require_text

if TYPE_CHECKING:
    from engine.checkpoint.identity import Identity

SCALES = ("cfg_text", "cfg_layout")
PAIRS = ("guidance_interval", "layout_schedule")
LEANS_ON = {"negative_prompt": ("cfg", "cfg_text"), "mask_threshold": ("num_iter",), "start_step": ("num_iter",),
            "auto_update": ("num_iter",)}  # fmt: skip
FLAGS = tuple(each.name for each in fields(SamplingConfig) if each.name != "head")


@told_as_flags(FLAGS)
def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """The options of the head that the flags are of; flags that are None have its defaults.

    Raises ValueError for a value out of range, and for flags of different heads.
    """
    if args.negative_prompt is not None:
        require_text(args.negative_prompt, "--negative_prompt")
    values: dict[str, Any] = {name: vars(args)[name] for name in FLAGS if vars(args)[name] is not None}
    values |= {name: args.cfg for name in SCALES if name not in values}
    values |= {name: tuple(vars(args)[name]) for name in PAIRS}
    head = implied_head(values, args.order)
    require_options_of(head, values)
    return default_sampling(head, **values)


def check_sampling(args: argparse.Namespace) -> None:
    """Raises ValueError for sampling flags that are wrong, or do not go with --compile. For programs that have it."""
    config = sampling_config(args)
    if config.mask_threshold is not None and (args.compile or args.cuda_graphs):
        flag = "--compile" if args.compile else "--cuda_graphs"
        raise ValueError(
            f"--mask_threshold {config.mask_threshold} looks into the decoder's blocks, which {flag} hides"
        )


def implied_head(given: Collection[str], order: str | None) -> str:
    """The head that options, by name, are of; the diffusion head if they are of any."""
    is_discrete = order == "confidence" or any(name in given for name in OPTIONS_OF_HEAD["discrete"])
    return "discrete" if is_discrete else "diffusion"


def parse_sampling_args(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
    head_of: Callable[[argparse.Namespace], str] | None = None,
    backbone_head: Callable[[argparse.Namespace], str] = lambda args: "diffusion",
    for_rollouts: bool = False,
) -> tuple[argparse.Namespace, str | None]:
    """As `parse_args`, with the options that the weights of --resume name as defaults, or else their head's; and a line
    that says which the weights name.

    check: raises ValueError or FileNotFoundError for arguments that do not go together. It is called before the
    weights are looked at, which takes seconds as PyTorch is imported, and again with what they name. What goes together
    or not by what they name (`LEANS_ON`) is checked then.
    head_of: the head of the model that the flags describe, where a command makes one; None: the weights say.
    backbone_head: the head of published weights, which do not say it.
    for_rollouts: where nothing is asked for, what can be scored stands in for what cannot
    (`SamplingConfig.for_rollouts`).
    Raises ValueError for a flag that is another head's, and for guidance of weights that have it in them, where a
    command draws from these.
    """
    args, given = parse_args(parser, argv), given_options(parser, argv)
    said = {name for name in given & set(FLAGS) if vars(args)[name] is not None}
    _forget_foreign(args, said, implied_head(said, args.order))
    if head_of is None and not _exists(args.resume):
        check(args)
        return args, None
    settled = _settled(parser, args, given)
    check(settled)
    args.resume = settled.resume  # `best` is a path now
    identity = _identity(args.resume)
    if head_of is not None:
        head = head_of(args)
    else:
        head = backbone_head(args) if identity is None else identity.config.head
    _require_own(args, head, said)
    named = None if identity is None or identity.sampling is None or identity.config.head != head else identity.sampling
    plain = default_sampling(head)
    own = plain if named is None else named
    is_few = identity is not None and _is_few(args, identity, own, given)
    if is_few:
        own = few_sampling(own, DEFAULT_EVALS)
    chosen = own.for_rollouts() if for_rollouts else own
    defaults = _defaults(parser, chosen, given, is_named=named is not None or is_few)
    if for_rollouts and head == "discrete" and "num_iter" not in {*given, *defaults}:
        defaults["num_iter"] = chosen.num_iter  # the parser's is for reverse processes
    args = parse_args(parser, argv, defaults)
    _forget_foreign(args, said, head)
    check(args)
    if identity is not None and (head_of is None or for_rollouts):
        with told_as_flags(FLAGS):
            identity.require_guided_once(sampling_config(args), args.resume)
    if named is None:
        return args, None
    standard, chosen_options = plain.to_dict(), chosen.to_dict()
    is_own = {name: value == chosen_options[name] for name, value in own.to_dict().items()}
    used = [
        f"{name} {value}"
        for name, value in defaults.items()
        if is_own[name] and vars(args)[name] == value != standard[name]
    ]
    return args, f"sampling options from the weights: {', '.join(used)}" if used else None


def _is_few(args: argparse.Namespace, identity: Identity, own: SamplingConfig, given: set[str]) -> bool:
    """Whether --speed puts the few-step head in the place of the options that the weights name, or a head's own."""
    asks_less = "speed" in vars(args) and args.speed != "exact"
    return asks_less and identity.config.few_step_head and own.head_evals is None and not given & {"cfg", *SCALES}


def _settled(parser: argparse.ArgumentParser, args: argparse.Namespace, given: Collection[str]) -> argparse.Namespace:
    """A copy without the flags that only the weights' own options make right or wrong."""
    open_ones = [name for name, others in LEANS_ON.items() if not set(others) & set(given)]
    return argparse.Namespace(**vars(args) | {name: parser.get_default(name) for name in open_ones})


@told_as_flags(FLAGS)
def _require_own(args: argparse.Namespace, head: str, said: Collection[str]) -> None:
    """Raises ValueError for flags that are another head's."""
    require_options_of(head, said)
    if head != "discrete" and "order" in said and args.order == "confidence":
        raise ValueError(f"--order confidence is an option of the discrete head, but the head is {head}")


def _defaults(
    parser: argparse.ArgumentParser, config: SamplingConfig, given: Collection[str], is_named: bool
) -> dict[str, Any]:
    """What stands in for the parser's defaults of what is not given: all that weights name, or what is a head's own."""
    kept = {*given, "head"} | {name for head, names in OPTIONS_OF_HEAD.items() if head != config.head for name in names}
    if "cfg" in given or not is_named:
        kept |= set(SCALES)  # --cfg stands for both
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in kept and (is_named or (value is not None and parser.get_default(name) is None))
    }


def _forget_foreign(args: argparse.Namespace, said: Collection[str], head: str) -> None:
    """Takes back what a preset sets of another head's options."""
    for other, names in OPTIONS_OF_HEAD.items():
        for name in names:
            if other != head and name not in said:
                setattr(args, name, None)


def _exists(path: str | None) -> bool:
    return bool(path) and Path(str(path)).exists()


def _identity(path: str | None) -> Identity | None:
    """What the weights were made for; None for MAR's, and for what loading will refuse."""
    if not path or not _exists(path):
        return None
    from engine.checkpoint.files import read_identity

    try:
        return read_identity(path)
    except (FileNotFoundError, ValueError):
        return None  # loading the weights says what is wrong with them, after the flags are checked
