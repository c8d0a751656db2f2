"""Learning curves of several runs of stage 3 as one PNG, from their metrics.jsonl.

    python -m scripts.mini.rl_curves --runs output/mini/rl_200_updates/elbo output/mini/rl_200_updates/no_kl \\
        --output curves.png

Four panels over updates: reward of the rollouts, held-out AP50 (by --eval_detector), KL to the reference, norm of the
gradient. Any numbers of any runs: `python -m scripts.plot_metrics`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.names import METRICS_NAME
from util.output import require_output_file

if TYPE_CHECKING:
    from util.images import Picture

PANELS = {
    "reward": "reward of the rollouts, over updates",
    "eval/AP50": "held-out AP50, another detector, over updates",
    "kl": "KL to stage 2, over updates",
    "grad_norm": "gradient norm, over updates",
}


def learning_curves(runs: Mapping[str, Path]) -> Picture:
    """runs: name -> metrics.jsonl. Raises FileNotFoundError, and ValueError for none or more than there are colours."""
    from util.plots import metrics_figure, picture_of, read_metrics

    return picture_of(metrics_figure({name: read_metrics(path) for name, path in runs.items()}, PANELS))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.rl_curves", __doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help=f"run folders, each with a {METRICS_NAME}")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        require_output_file("--output", args.output)
        from util.images import save_png  # slow to import: once the command line is known to be right

        save_png(learning_curves({folder.name: folder / METRICS_NAME for folder in args.runs}), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
