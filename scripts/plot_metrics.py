"""Numbers of several runs' metrics.jsonl as one PNG: a panel for each key, a colour for each run.

    python -m scripts.plot_metrics output/stage1_align output/stage2_sft --keys loss grad_norm eval/AP50

Needs matplotlib. An unknown key is an error that lists those that there are.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.names import METRICS_NAME
from util.output import require_output_file


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.plot_metrics", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"run folders, each with a {METRICS_NAME}")
    parser.add_argument("--keys", nargs="+", required=True, metavar="KEY", help="what is plotted, as the file names it")
    parser.add_argument("--output", type=Path, default=Path("output/metrics.png"), help="PNG file")
    return parse_checked(parser, argv)


def run_names(runs: Sequence[Path]) -> dict[str, Path]:
    """The shortest ends of the folders' paths that tell them apart. ValueError if a folder is named twice."""
    places = [run.resolve() for run in runs]
    if len(set(places)) != len(places):
        raise ValueError(f"the same run is named twice: {', '.join(map(str, runs))}")
    depth = 1
    while len({place.parts[-depth:] for place in places}) != len(places):
        depth += 1
    return {"/".join(place.parts[-depth:]): run for place, run in zip(places, runs, strict=True)}


def require_keys(keys: Sequence[str], metrics: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """Raises ValueError naming a key that no run has, and those that there are."""
    known = sorted({key for steps in metrics.values() for values in steps.values() for key in values})
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ValueError(f"--keys {key} is in no run{hint or ';'} there are {', '.join(known) or 'none'}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        require_output_file("--output", args.output)
        from util.images import save_png  # slow to import: once the command line is known to be right
        from util.plots import metrics_figure, picture_of, read_metrics

        metrics = {name: read_metrics(run / METRICS_NAME) for name, run in run_names(args.runs).items()}
        require_keys(args.keys, metrics)
        save_png(picture_of(metrics_figure(metrics, {key: f"{key}, over steps" for key in args.keys})), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
