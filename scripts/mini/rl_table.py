"""Tables and curves of the mini world's comparison of reward fine-tunings: what scripts/mini/rl_comparison.sh leaves.

    python -m scripts.mini.rl_table --runs output/mini/rl_200_updates --names stage2 elbo trajectory no_kl

Expected are <runs>/<name>/<sampling>/<detector>/ of `scripts.evaluate_layout`, <sampling>/colour.json of
`scripts.mini.colour_accuracy`, and <runs>/<name>/metrics.jsonl of all but the first name, which is the baseline. One
table for each sampling, a line for each measure. Every number has its 95 % interval over layouts; those of the others
are followed by their gain over the baseline with its own, paired (scripts/mini/rl_measures.py). Evaluations of other
images, profiles, detectors, sampling or seeds are an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors

LABELS = {
    "stage2": "stage 2 (before)",
    "elbo": "GRPO, elbo",
    "trajectory": "GRPO, trajectory",
    "no_kl": "GRPO, elbo, no KL",
    "paper": "the released surrogate",
    "guided": "GRPO, elbo, guided rollouts",
}
REWARD, JUDGE, YOLOX = "reward", "judge", "yolox"
DETECTORS = {REWARD: "reward detector", JUDGE: "judge", YOLOX: "YOLOX"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.rl_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with one folder for each name")
    parser.add_argument("--names", nargs="+", choices=tuple(LABELS), default=list(LABELS), help="the first: baseline")
    parser.add_argument("--detectors", nargs="+", choices=tuple(DETECTORS), default=[REWARD, JUDGE])
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this file too")
    parser.add_argument("--curves", type=Path, default=None, help="PNG of the learning curves (None: not drawn)")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.rl_tables import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
