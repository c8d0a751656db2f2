"""Writes the weights of a training checkpoint as one safetensors file for sampling: no optimizer, no second copy.

    python -m scripts.export_weights --resume output/stage2_sft/checkpoint-last.pth --output structmar.safetensors

What the weights were made for (sizes, categories, ids of the VAE and the text encoder, stage, step) goes into the
file's metadata; `scripts.sample` reads it from there. The averaged (EMA) weights are taken unless --no_ema is given.
So do the options to sample them with: those the checkpoint names, or those of --sampling_config, a YAML file of
sampling flags (num_iter: 16, cfg_text: 6.0, ...); flags that the file leaves out have their defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint.load import DTYPES, export_weights
from engine.cli.arguments import add_sampling_args
from engine.cli.sampling import sampling_config
from models.sampling.config import SamplingConfig
from util.checkpoint import sha256_file
from util.config import set_defaults_from_yaml
from util.logging import setup_logging


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", required=True, help="training checkpoint, its folder, or an exported file")
    parser.add_argument("--output", required=True, help="the .safetensors file to write (replaced if it exists)")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="fp16 and bf16 halve the file")
    parser.add_argument("--no_ema", action="store_true", help="the raw weights, not their average")
    parser.add_argument("--sampling_config", default=None, help="YAML of sampling flags that the file shall name")
    return parser


def read_sampling_config(path: str) -> SamplingConfig:
    """The options in a YAML file of sampling flags. Raises ValueError naming the file for other keys and bad values."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_sampling_args(parser)
    set_defaults_from_yaml(parser, path)
    try:
        return sampling_config(parser.parse_args([]))
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging()
    try:
        sampling = read_sampling_config(args.sampling_config) if args.sampling_config else None
        identity = export_weights(args.resume, args.output, args.dtype, not args.no_ema, sampling)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    size = Path(args.output).stat().st_size / 1e6
    kind = f"{identity.weights} weights of stage {identity.stage} after {identity.step} steps"
    print(f"wrote {args.output}: {kind}, {args.dtype},")
    print(f"{size:.1f} MB, sha256 {sha256_file(args.output)}")


if __name__ == "__main__":
    main()
