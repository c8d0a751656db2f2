"""How large the residual stream and the attention logits grow in training, of several runs: json and plot.

    python -m scripts.mini.norm_growth --runs pre=output/mini/norms/pre res_post=output/mini/norms/res_post \\
        --vae_path pretrained_models/mini/vq/vq4_mini.pt --output_dir output/mini/norms

Every run folder needs checkpoints of several steps (main_mar.py --keep_every). Each is loaded with its raw weights, not
the averages, and sees the same held-out scenes with the same tokens hidden. Behind every block the root mean square of
the residual stream is taken, and in every block the largest attention logit, q k / sqrt(d) without the layout's bias.
Writes norms.json and norms.png, which needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import VAE_HELP, add_text_encoder_args, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_dir
from util.ranges import batch_int, positive_fraction, seed_int, threads_int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.norm_growth", __doc__)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=DIR", help="run folders and their names")
    parser.add_argument("--vae_path", required=True, help=VAE_HELP)
    add_text_encoder_args(parser)
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="dataset of the held-out scenes")
    parser.add_argument("--coco_split", default="val2017", help="its first images")
    parser.add_argument("--num_images", type=batch_int, default=32, help="scenes, all in one batch")
    parser.add_argument("--hidden_share", type=positive_fraction, default=0.6, help="of the tokens of every image")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the choice of hidden tokens")
    parser.add_argument("--num_threads", type=threads_int, default=1)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets norms.json and norms.png")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        require_output_dir("--output_dir", args.output_dir)
        from scripts.mini.residual_norms import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
