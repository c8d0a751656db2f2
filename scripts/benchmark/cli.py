"""Times sampling, training and stage 3 against the public MAR code and our own plain path, and counts what they do.

    git clone https://github.com/LTH14/mar ../mar
    python -m scripts.benchmark --baseline ../mar --output_dir output/benchmark

A case is run by several contenders on the same weights, conditions, orders and noise: the public code as it stands
(`scripts/benchmark/baseline.py`), our plain path that computes everything every time
(`tests/helpers/plain_sampler.py`), and ours. They take turns (A B C A B C ...), so that a busy machine slows all alike;
medians are compared, and the first contender's output with the others'. Without --baseline, without --weights
(StructMAR) or without --mar_weights (MAR's own), the rows that need them are left out. The machine's ceilings are
measured too, with the products that the code uses, before each case: the shares say how far a row is from them. Prints
Markdown; --output_dir gets benchmark.json, benchmark.md and benchmark.png (which needs matplotlib).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from models.config import preset_config
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_dir
from util.ranges import threads_int, whole

PARTS = ("sampling", "rollout", "training", "update", "operations", "curves")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.benchmark", __doc__)
    parser.add_argument("--baseline", type=Path, help="a checkout of LTH14/mar; default: its rows are left out")
    parser.add_argument("--weights", type=Path, help="a trained StructMAR: an export or a training checkpoint")
    parser.add_argument("--mar_weights", type=Path, help="trained MAR weights (class labels)")
    parser.add_argument("--mar_size", default="mar_mini", help="preset of --mar_weights")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure")
    parser.add_argument(
        "--only", default="", help="of the timed cases, those that begin so: 'StructMAR', 'MAR mar_mini, batch 4'"
    )
    parser.add_argument("--repeats", type=whole(1, 1000), default=5, help="counted runs of each contender")
    parser.add_argument("--threads", type=threads_int, default=1)
    parser.add_argument("--output_dir", type=Path, help="folder for benchmark.json, benchmark.md, benchmark.png")
    return parse_checked(parser, argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for paths that cannot be read or written and presets that do not exist."""
    for name, path in (("baseline", args.baseline), ("weights", args.weights), ("mar_weights", args.mar_weights)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"--{name} {path} does not exist")
    preset_config(args.mar_size)
    if args.output_dir is not None:
        require_output_dir("--output_dir", args.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        check_args(args)
        from scripts.benchmark.run import run  # slow to import: once the command line is known to be right

        run(args)
