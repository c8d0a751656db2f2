"""Trains a planner: captions to layouts, for sampling without boxes (scripts.sample --layout auto).

    python -m scripts.train_planner --coco_root data/coco --coco_split train2017 --text_encoder DIR
    python -m scripts.train_planner --coco_root data/coco --coco_split val2017 --held_out_every 5 --text_encoder DIR
    torchrun --nproc_per_node 8 -m scripts.train_planner ...

Only annotations are read. The second form has one split alone: every fifth image is left out and scored
(scripts.score_layouts with the same flag). A share of the rest (--stop_share) decides which weights are kept.

The run folder (--output_dir) has args.yaml, environment.json, log.txt, metrics.jsonl, tensorboard/, checkpoint-last.pth
and planner.safetensors: the averaged weights with the least loss on the stopping images, in half precision. Killed or
stopped, the same command goes on, bit for bit on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.arguments_planner import check_planner_args, planner_parser
from util.config import parse_args
from util.failures import first_process_speaks, one_line_errors
from util.output import require_output_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 128 + the number of the signal that stopped the run (after saving)."""
    parser = planner_parser(__doc__)
    with first_process_speaks(), one_line_errors(parser.prog):
        args = parse_args(parser, argv)
        check_planner_args(args)
        require_output_dir("--output_dir", args.output_dir)
        from engine.cli.build_planner import build_planner_training  # imports PyTorch: once the arguments are right
        from engine.cli.main import run_main
    return run_main(parser.prog, args, build_planner_training, None)


if __name__ == "__main__":
    sys.exit(main())
