"""Writes the weights of a training checkpoint as one safetensors file for sampling: no optimizer, no second copy.

    python -m scripts.export_weights --resume output/stage2_sft/checkpoint-last.pth --output structmar.safetensors

What the weights were made for (sizes, categories, ids of the VAE and the text encoder, stage, step) goes into the
file's metadata; `scripts.sample` reads it from there. The averaged (EMA) weights are taken unless --no_ema is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint.load import DTYPES, export_weights
from util.checkpoint import sha256_file
from util.logging import setup_logging


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", required=True, help="training checkpoint, or a folder with checkpoint-last.pth")
    parser.add_argument("--output", required=True, help="the .safetensors file to write (replaced if it exists)")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="fp16 and bf16 halve the file")
    parser.add_argument("--no_ema", action="store_true", help="the raw weights, not their average")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging()
    try:
        info = export_weights(args.resume, args.output, args.dtype, use_ema=not args.no_ema)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    size = Path(args.output).stat().st_size / 1e6
    print(f"wrote {args.output}: {info.weights} weights of stage {info.stage} after {info.step} steps, {args.dtype},")
    print(f"{size:.1f} MB, sha256 {sha256_file(args.output)}")


if __name__ == "__main__":
    main()
