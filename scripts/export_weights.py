"""Writes the weights of a training checkpoint as one safetensors file for sampling: no optimizer, no second copy.

    python -m scripts.export_weights --resume output/stage2_sft/checkpoint-last.pth --output structmar.safetensors

What the weights were made for (sizes, categories, ids of the VAE and the text encoder, stage, step) goes into the
file's metadata; `scripts.sample` reads it from there. The averaged (EMA) weights are taken unless --no-ema is given.
So do the options to sample them with: those the checkpoint names, or those of --sampling_config, a YAML file of
sampling flags (num_iter: 16, cfg_text: 6.0, ...); flags that the file leaves out have their defaults.

Of MARS (a checkpoint of `main_mar.py --backbone mars`) all that trains is written, and no weight of its language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.cli.arguments import add_config_arg, add_ema_arg, script_parser
from engine.cli.arguments_sampling import add_sampling_args
from engine.cli.sampling import sampling_config
from models.config import EXPORT_PRECISIONS
from models.sampling.config import HEAD_DEFAULTS, SamplingConfig, require_options_of
from util.config import parse_args, set_defaults_from_yaml
from util.failures import one_line_errors


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.export_weights", __doc__)
    add_config_arg(parser)
    parser.add_argument("--resume", required=True, help="training checkpoint, its folder, or an exported file")
    parser.add_argument("--output", required=True, help="the .safetensors file to write (replaced if it exists)")
    parser.add_argument("--dtype", default="fp32", choices=list(EXPORT_PRECISIONS), help="fp16 and bf16 halve the file")
    add_ema_arg(parser)
    parser.add_argument("--sampling_config", default=None, help="YAML of sampling flags that the file shall name")
    return parser


def read_sampling_config(path: str, head: str) -> SamplingConfig:
    """The options in a YAML file of sampling flags, for a head; what it leaves out has the head's defaults.

    Raises ValueError naming the file for other keys, bad values and another head's options.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_sampling_args(parser)
    said = set_defaults_from_yaml(parser, path)
    args = parser.parse_args([])
    for name, value in HEAD_DEFAULTS[head].items():
        if vars(args)[name] is None:
            setattr(args, name, value)
    try:
        require_options_of(head, [name for name, value in said.items() if value is not None])
        return replace(sampling_config(args), head=head)
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        print(export(args))


def export(args: argparse.Namespace) -> str:
    """Writes the file and gives two lines that describe it. PyTorch is imported only here."""
    from engine.checkpoint.files import read_identity
    from engine.checkpoint.load import export_weights
    from engine.checkpoint.mars_weights import export_mars, is_mars_file
    from util.checkpoint import sha256_file
    from util.logging import setup_logging

    setup_logging()
    if is_mars_file(args.resume):
        if args.sampling_config:
            raise ValueError(f"--sampling_config {args.sampling_config} is for StructMAR, {args.resume} holds MARS")
        said = export_mars(args.resume, args.output, args.dtype, args.ema)
        kind = f"{said.kind} weights of stage {said.identity.stage} after {said.step} steps"
    else:
        sampling = None
        if args.sampling_config:
            known = read_identity(args.resume)
            sampling = read_sampling_config(args.sampling_config, "diffusion" if known is None else known.config.head)
        identity = export_weights(args.resume, args.output, args.dtype, args.ema, sampling)
        kind = f"{identity.weights} weights of stage {identity.stage} after {identity.step} steps"
    size = Path(args.output).stat().st_size / 1e6
    return f"wrote {args.output}: {kind}, {args.dtype},\n{size:.1f} MB, sha256 {sha256_file(args.output)}"


if __name__ == "__main__":
    main()
