"""Stages 1 and 2 of StructMAR: align the new parts of a MAR model to captions and boxes, then fine-tune all of it.
Before them, optionally, that model itself: pretraining by class. After them, guidance trained into the weights.

    python main_mar.py --train_mode class --class_root data/imagenet ...
    python main_mar.py --train_mode text_layout --resume pretrained_models/mar_huge.safetensors ...
    python main_mar.py --train_mode full --resume output/stage1_align/checkpoint-last.pth ...
    python main_mar.py --train_mode distill --resume output/stage2_sft/checkpoint-last.pth ...
    torchrun --nproc_per_node 8 main_mar.py ...

`python main_mar.py --help` lists every flag; `--config FILE.yaml` gives any of them. The run folder (--output_dir) has
args.yaml, environment.json, log.txt, metrics.jsonl, tensorboard/, samples/ and checkpoint-last.pth.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.arguments import train_parser
from engine.cli.sampling import parse_sampling_args
from engine.cli.sizes import head_of
from engine.cli.validate import validate_train_args
from util.failures import first_process_speaks, one_line_errors


def main(argv: Sequence[str] | None = None) -> int:
    """See `engine.cli.main.run_main`. PyTorch is imported once the arguments are known to be right."""
    parser = train_parser()
    with first_process_speaks(), one_line_errors(parser.prog):
        args, note = parse_sampling_args(parser, argv, validate_train_args, head_of)
        from engine.cli.build_class import build_class_training
        from engine.cli.build_distill import build_distillation
        from engine.cli.build_few_step import build_few_step
        from engine.cli.build_train import build_training
        from engine.cli.main import run_main
    own = {"class": build_class_training, "distill": build_distillation, "few_step": build_few_step}
    return run_main(parser.prog, args, own.get(args.train_mode, build_training), note)


if __name__ == "__main__":
    sys.exit(main())
