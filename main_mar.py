"""Stages 1 and 2 of StructMAR: align the new parts of a MAR model to captions and boxes, then fine-tune all of it.
Before them, optionally, that model itself: pretraining by class. After them, guidance trained into the weights. Beside
them, MARS: a frozen language model that learns to draw and to describe (models/mars/README.md).

    python main_mar.py --train_mode class --class_root data/imagenet ...
    python main_mar.py --train_mode text_layout --resume pretrained_models/mar_huge.safetensors ...
    python main_mar.py --train_mode full --resume output/stage1_align/checkpoint-last.pth ...
    python main_mar.py --train_mode distill --resume output/stage2_sft/checkpoint-last.pth ...
    python main_mar.py --backbone mars --lm_path DIR --train_mode joint --vae_path pretrained_models/vq_ds16_t2i.pt ...
    torchrun --nproc_per_node 8 main_mar.py ...

`python main_mar.py --help` lists every flag; `--config FILE.yaml` gives any of them. The run folder (--output_dir) has
args.yaml, environment.json, log.txt, metrics.jsonl, tensorboard/, samples/ and checkpoint-last.pth.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.arguments import train_parser
from engine.cli.validate_mars import parse_train_args
from models.mars.stages import STAGES
from util.failures import first_process_speaks, one_line_errors


def main(argv: Sequence[str] | None = None) -> int:
    """See `engine.cli.main.run_main`. PyTorch is imported once the arguments are known to be right."""
    parser = train_parser()
    with first_process_speaks(), one_line_errors(parser.prog):
        args, note = parse_train_args(parser, argv)
        from engine.cli.build_class import build_class_training
        from engine.cli.build_distill import build_distillation
        from engine.cli.build_few_step import build_few_step
        from engine.cli.build_mars import build_mars_training
        from engine.cli.build_train import build_training
        from engine.cli.main import run_main
    own = {"class": build_class_training, "distill": build_distillation, "few_step": build_few_step}
    own |= dict.fromkeys(STAGES, build_mars_training)
    return run_main(parser.prog, args, own.get(args.train_mode, build_training), note)


if __name__ == "__main__":
    sys.exit(main())
