"""Scores proposed layouts against the real layouts of the same captions: a planner's, or a language model's in a file.

    python -m scripts.score_layouts --planner_path output/planner/planner.safetensors --coco_root data/coco \\
        --coco_split val2017 --text_encoder DIR
    python -m scripts.score_layouts --layout gpt.json --coco_root data/coco --coco_split val2017

No image is drawn or read. A planner gets the first caption of each image and proposes one layout. The entries of a file
(any format of engine/data/README.md) are compared with the image that has their prompt among its captions. Beside
these stand the real layouts themselves and, as bounds from below, real and proposed layouts of other images' captions.
What the scores mean: engine/eval/layout_scores.py. What pictures of proposed layouts show is another question: draw
them (scripts.sample --layout auto) and let a detector say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import add_config_arg, add_device_arg, script_parser
from engine.cli.arguments_layout import add_layout_format_args
from engine.cli.arguments_planner import MAX_OBJECTS, add_annotation_args, add_temperature_arg, require_planner
from util.config import parse_args
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import positive_int, seed_int, threads_int, whole
from util.read import require_regular_file


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.score_layouts", __doc__)
    add_config_arg(parser)
    group = parser.add_argument_group("what is scored")
    group.add_argument("--planner_path", default=None, help="planner.safetensors of scripts.train_planner")
    add_temperature_arg(group)
    group.add_argument("--seed", type=seed_int, default=0, help="of the proposed layouts")
    group.add_argument("--layout", default=None, help="instead: layout file whose prompts are captions of the split")
    add_layout_format_args(group)
    group = parser.add_argument_group("what it is compared with")
    add_annotation_args(group, "val2017")
    group.add_argument(
        "--max_objects", type=whole(1, MAX_OBJECTS), default=None,
        help="only the largest boxes of real layouts; None: as many as the planner places, or 16"
    )  # fmt: skip
    group.add_argument("--max_images", type=positive_int, default=None, help="only the first images")
    group = parser.add_argument_group("run")
    group.add_argument("--output", default=None, help="json file of the scores (None: not written)")
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_device_arg(group)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for flags that contradict one another, or files that are not there."""
    if bool(args.planner_path) == bool(args.layout):
        given = "both" if args.layout else "none"
        raise ValueError(f"say what is scored by exactly one of --planner_path and --layout; got {given}")
    if args.planner_path:
        require_planner(args.planner_path)
    else:
        require_regular_file(args.layout, "layout file")
    if args.output is not None:
        require_output_file("--output", args.output)
    for flag in ("layout_format", "layout_canvas"):
        if vars(args)[flag] is not None and not args.layout:
            raise ValueError(f"--{flag} {vars(args)[flag]} needs --layout, the file that it is about")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    with one_line_errors(parser.prog):
        args = parse_args(parser, argv)
        check_args(args)
    with one_line_errors(debug=args.debug):
        from engine.cli.build_layout_scores import score  # imports PyTorch: once the arguments are known to be right

        print(score(args))


if __name__ == "__main__":
    main()
