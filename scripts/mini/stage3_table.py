"""Tables, curves and gallery of stage 3 in the mini world, from what scripts/mini/stage3.sh leaves.

    python -m scripts.mini.stage3_table --runs output/mini/stage3_runs --rows stage2 distill reward_gradient grpo

Expected are <runs>/scores/<row>/<training>/<detector>/ of `scripts.evaluate_layout`, <training>/colour.json of
`scripts.mini.colour_accuracy`, and <runs>/runs/<name>/<training>/ with metrics.jsonl and weights.safetensors. The first
row is the baseline, what its trainings share with the others are the layouts.

A line for each row: the mean over its trainings and seeds, with the 95 % interval over layouts; then the gains over the
baseline, each with its own interval, paired (scripts/mini/rl_measures.py); then each training apart, as the intervals
leave out how far trainings differ. Evaluations of other images, profiles, detectors or seeds are an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import positive_int

LABELS = {
    "stage2": "stage 2, guided",
    "stage2_cool": "stage 2, guided, temperature 0.6",
    "distill": "guidance distilled",
    "reward_gradient": "reward gradient",
    "few_step_1": "one-step head, 1 evaluation",
    "few_step_2": "one-step head, 2 evaluations",
    "few_step_4": "one-step head, 4 evaluations",
    "grpo": "GRPO",
    "nft": "NFT",
    "best_of": "best of a group",
}
SHOWN = ("stage2", "distill", "reward_gradient", "grpo", "few_step_1")  # columns of the gallery
DETECTORS = {"judge": "judge", "reward": "reward detector", "yolox": "YOLOX"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.stage3_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with runs/ and scores/")
    parser.add_argument("--rows", nargs="+", choices=tuple(LABELS), default=list(LABELS), help="the first: baseline")
    parser.add_argument("--detectors", nargs="+", choices=tuple(DETECTORS), default=["judge", "reward"])
    parser.add_argument("--stage2", type=Path, required=True, help="the weights of the rows of stage 2")
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this file too")
    parser.add_argument("--curves", type=Path, default=None, help="PNG of the learning curves (None: not drawn)")
    parser.add_argument("--gallery", type=Path, default=None, help="PNG of a few layouts, drawn by rows with one seed "
                        "(None: not drawn)")  # fmt: skip
    parser.add_argument("--num_shown", type=positive_int, default=5, help="layouts of the gallery, the first ones")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        files = {"output": args.output, "curves": args.curves, "gallery": args.gallery}
        for flag, path in files.items():
            if path is not None:
                require_output_file(f"--{flag}", path)
        from scripts.mini.stage3_tables import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
