"""Stage 3 of StructMAR: a frozen detector says how well images fit their captions and boxes, and the model learns.

By GRPO the model samples images and is rewarded (the default); with --objective reward_gradient it predicts images, and
the gradient of the detector's loss says what to change.

    python main_rl.py --resume output/stage2_sft/checkpoint-last.pth --detector_path pretrained_models/detector.pth ...
    torchrun --nproc_per_node 8 main_rl.py ...

`python main_rl.py --help` lists every flag; `--config FILE.yaml` gives any of them. Before the first update the log
says what the command will cost. The run folder (--output_dir) has args.yaml, environment.json, log.txt, metrics.jsonl,
tensorboard/, rollouts/ or predictions/, and checkpoint-last.pth, which holds the frozen start too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.arguments_rl import rl_parser
from engine.cli.sampling import parse_sampling_args
from engine.cli.sizes import head_of
from engine.cli.validate import validate_rl_args
from util.failures import first_process_speaks, one_line_errors


def main(argv: Sequence[str] | None = None) -> int:
    """See `engine.cli.main.run_main`. PyTorch is imported once the arguments are known to be right."""
    parser = rl_parser()
    with first_process_speaks(), one_line_errors(parser.prog):
        args, note = parse_sampling_args(parser, argv, validate_rl_args, head_of, for_rollouts=True)
        from engine.cli.build_reward_gradient import build_reward_gradient
        from engine.cli.build_rl import build_rl
        from engine.cli.main import run_main
    build = build_reward_gradient if args.objective == "reward_gradient" else build_rl
    return run_main(parser.prog, args, build, note)


if __name__ == "__main__":
    sys.exit(main())
