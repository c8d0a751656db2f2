"""A language model in a GGUF file as a folder of transformers, which MARS and every text encoder here can open.

    python -m scripts.mini.gguf_folder --gguf model.gguf --sha256 HEX --output pretrained_models/smollm2

The quantized weights become plain ones of --precision, and the tokenizer becomes tokenizer.json. transformers needs the
packages gguf and accelerate for it, which requirements.txt does not have: scripts/mini/smollm2.sh brings them along.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from models.config import PRECISIONS
from util.config import parse_checked
from util.failures import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.gguf_folder", __doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the file")
    parser.add_argument("--sha256", required=True, help="of the file, in hexadecimal: another one is refused")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, which must not be there")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS, help="of the weights that are written")
    return parse_checked(parser, argv)


def check_files(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError or ValueError, naming both sums, for another file than the one that is meant."""
    from util.checkpoint import sha256_file

    if not args.gguf.is_file():
        raise FileNotFoundError(f"--gguf {args.gguf} does not exist")
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already")
    found = sha256_file(args.gguf)
    if found != args.sha256:
        raise ValueError(f"{args.gguf} has sha256 {found}, --sha256 says {args.sha256}")


def convert(args: argparse.Namespace) -> str:
    """Writes beside the folder and renames, so that a folder of that name is always whole."""
    check_files(args)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.frozen.causal_lm import open_causal_lm

    dtype = getattr(torch, PRECISIONS[args.precision])
    given = {"gguf_file": args.gguf.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(args.gguf.parent, dtype=torch.float32, **given)
    tokenizer = AutoTokenizer.from_pretrained(args.gguf.parent, **given)
    config = quantized.config
    del config.quantization_config  # what is saved has plain weights
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced
        plain = type(quantized)._from_config(config, dtype=dtype)
    plain.load_state_dict(quantized.state_dict())
    partial = args.output.with_name(args.output.name + ".tmp")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, args.output)
    base = open_causal_lm(args.output, dtype)
    total = sum(each.numel() for each in base.lm.parameters())
    return f"wrote {args.output}: {base.model_type}, {total:,} parameters in {args.precision}, id {base.id}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        print(convert(args))


if __name__ == "__main__":
    main()
