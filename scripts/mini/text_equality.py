"""Is MARS's language model still the one it was made from? Bit by bit: weights, logits and greedy answers.

    python -m scripts.mini.text_equality --resume CKPT --lm_path DIR --vae_path vq.pt --output text.json
    python -m scripts.mini.text_equality --resume CKPT --lm_path DIR --vae_path vq.pt --prompts "The capital of"

The folder's language model is opened a second time, alone. Its weights are compared with those that stand beside the
experts; on text, both must give equal logits, every number, and write the same greedy answers. Without --prompts the
texts are held-out captions of the mini world in both languages for the logits, and their first words for the answers.

A file of MARS has no weight of the language model, so both sides are opened from --lm_path. Equal weights show that
opening, experts and their file change none in memory; they cannot show that training changed none. Equal logits and
answers show that a pass of text meets no expert.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import add_device_arg, script_parser
from engine.cli.arguments_mars_sample import add_mars_args, add_mars_run_args
from scripts.mini.scene_arguments import add_scene_args
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import whole


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.text_equality", __doc__)
    add_mars_args(parser)
    add_scene_args(parser)
    parser.add_argument("--prompts", nargs="+", default=None, metavar="TEXT", help="texts in the place of captions")
    parser.add_argument("--max_words", type=whole(1, 4096), default=32, help="tokens of an answer at most")
    add_mars_run_args(parser)
    add_device_arg(parser)
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.unchanged import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
