"""Stage 3 with the surrogate of the paper's released engine instead of GRPO's, as a row of the comparison only.

    python -m scripts.mini.paper_surrogate --config configs/mini_stage3.yaml --kl_coef 0 --output_dir output/mini/paper

Takes main_rl.py's flags. The released loss is the denoising error of the sampled tokens times the advantage,

    L = E[ A * sum_k || eps_k - eps_theta(sqrt(bar_k) x + sqrt(1 - bar_k) eps_k, t_k, z) ||^2 / K ],

with a mask, timesteps and noises of its own at every step: no ratio, no clip, so where A < 0 an error without bound is
raised. Everything else is engine/rl/step.py's: rollouts, rewards, advantages, optimizer, numbers of steps and masks.

Left out: the released KL. It compares errors at unshared noises, which is noise (about 45 where both models are the
same one), and subtracts it from the reward; --kl_coef must be 0. Left out too: dropout in the update.
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
    """See `engine.cli.main.run_main`."""
    parser = rl_parser()
    with first_process_speaks(), one_line_errors(parser.prog):
        args, note = parse_sampling_args(parser, argv, validate_rl_args, head_of)
        from engine.cli.main import run_main
        from scripts.mini.paper_step import build
    return run_main(parser.prog, args, build, note)


if __name__ == "__main__":
    sys.exit(main())
