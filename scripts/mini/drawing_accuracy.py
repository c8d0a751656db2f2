"""Do pictures drawn from captions alone show what the captions say? MARS, from English and from Chinese.

    python -m scripts.mini.drawing_accuracy --resume CKPT --lm_path DIR --vae_path vq.pt --output drawings.json

Held-out captions of the mini world are drawn in both languages, and what the judge, a detector that was no reward,
finds anywhere in a picture is compared with the scene: the measures are those of scripts.mini.caption_accuracy, of what
is found in the place of what is told. Finds have at least --match_score. The colour of a find is read off its box by
the rules of scripts.mini.colour_accuracy.

The real drawings, and these through the image tokenizer, are the bounds; finds in the next scene's picture are the
control. --structmar draws the same English captions with a StructMAR, without boxes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import add_device_arg, script_parser
from engine.cli.arguments_mars_sample import add_mars_args, add_mars_run_args
from engine.cli.arguments_sampling import guidance_float, temperature_float
from scripts.mini.scene_arguments import add_scene_args
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import fraction, or_none, seed_int, whole

MINI = Path("pretrained_models/mini")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.drawing_accuracy", __doc__)
    add_mars_args(parser)
    add_scene_args(parser)
    parser.add_argument("--detector", type=Path, default=MINI / "fasterrcnn_mini_judge.pth")
    parser.add_argument("--match_score", type=fraction, default=0.3, help="least confidence of a find")
    parser.add_argument("--cfg", type=guidance_float, default=5.0, help="guidance scale of the caption; 1: none")
    parser.add_argument("--temperature", type=temperature_float, default=1.0, help="of codes, above 0")
    parser.add_argument("--top_k", type=or_none(whole(1, 10**6)), default=None, help="likeliest codes, None: all")
    parser.add_argument("--seed", type=seed_int, default=0, help="scene k has seed + k")
    parser.add_argument("--grid", type=Path, default=None, help="PNG of the first pictures of each row (None: none)")
    group = parser.add_argument_group("a StructMAR to compare with")
    group.add_argument("--structmar", type=Path, default=None, help="its weights (None: no such row)")
    group.add_argument("--structmar_vae", type=Path, default=MINI / "vae" / "kl8_mini.ckpt")
    group.add_argument("--structmar_text", type=Path, default=MINI / "clip-text-mini", help="its text encoder")
    add_mars_run_args(parser)
    add_device_arg(parser)
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.drawn import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
