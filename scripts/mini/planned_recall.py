"""Do pictures show what their captions say, when a planner proposes the boxes? Counted by a detector.

    python -m scripts.mini.planned_recall --num_scenes 250 --output output/mini/planned_recall.json

The same held-out captions and seeds are drawn four times: without boxes, with the planner's, with the real ones, and
with another scene's boxes, as many and of these classes. Two shares, with 95 % bootstrap intervals over scenes:

    recall  objects of the real scene of whose class the detector finds one, anywhere in the picture; each find counts
            once, and what the planner leaves out is missed
    placed  boxes given that the detector finds there (same class, IoU at least 0.5, paired one to one)

extra: finds per picture beyond the scene's objects. Finds have at least the profile's match score.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import add_device_arg, add_text_encoder_args, script_parser
from engine.cli.arguments_planner import add_temperature_arg
from models.config import PRECISIONS
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import batch_int, fraction, positive_int, seed_int, threads_int, whole

MINI = Path("pretrained_models/mini")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.planned_recall", __doc__)
    parser.add_argument("--resume", type=Path, default=MINI / "structmar_mini_stage2.safetensors")
    parser.add_argument("--vae_path", type=Path, default=MINI / "vae" / "kl8_mini.ckpt", help="or the VQ's file")
    add_text_encoder_args(parser, str(MINI / "clip-text-mini"))
    parser.add_argument("--planner_path", type=Path, default=MINI / "planner_mini.safetensors")
    add_temperature_arg(parser)
    parser.add_argument("--detector", type=Path, default=MINI / "fasterrcnn_mini_judge.pth")
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="the mini world's dataset")
    parser.add_argument("--split", default="val2017", help="split whose captions are drawn")
    parser.add_argument("--num_scenes", type=positive_int, default=250, help="the first ones with boxes")
    parser.add_argument("--min_area", type=fraction, default=0.002, help="smallest object, as a share of the picture")
    parser.add_argument("--match_score", type=fraction, default=0.3, help="least confidence of a find")
    parser.add_argument("--seed", type=seed_int, default=0, help="scene k has seed + k")
    parser.add_argument("--batch_size", type=batch_int, default=16)
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    parser.add_argument("--num_resamples", type=whole(1, 20000), default=1000, help="of the intervals")
    parser.add_argument("--output", type=Path, default=None, help="json file of the results (None: not written)")
    add_device_arg(parser)
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.planned import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
