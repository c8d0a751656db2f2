"""Words and pictures in turn by MARS: what follows some words, or pictures, or both.

    python -m scripts.tell --resume mars.safetensors --lm_path DIR --vae_path vq.pt --prompt "a red kite on a beach"
    python -m scripts.tell --resume CKPT --lm_path DIR --vae_path vq.pt --images photo.png --max_images 0

MARS writes the likeliest words and, after each, asks whether a picture begins: where that is likelier than
--image_threshold it draws one, and writes on. This choice is trained by `main_mar.py --choice_weight`; without it no
picture begins unless the threshold is 0. --max_images 0 is the language model alone, after what it was shown.

Into --output_dir go page.md (words and pictures in order), NNNN.png (shown and drawn ones) and samples.json (settings).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import add_config_arg, add_device_arg, script_parser
from engine.cli.arguments_mars_sample import add_mars_args, add_mars_run_args
from engine.cli.arguments_sampling import guidance_float, temperature_float
from util.config import parse_args
from util.failures import one_line_errors
from util.output import require_output_dir
from util.ranges import fraction, or_none, seed_int, whole


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.tell", __doc__)
    add_config_arg(parser)
    add_mars_args(parser)
    group = parser.add_argument_group("what comes before: pictures, then words")
    group.add_argument("--images", nargs="+", default=None, metavar="FILE", help="picture files")
    group.add_argument("--prompt", default=None, help="words after them")
    group = parser.add_argument_group("what follows")
    group.add_argument("--max_words", type=whole(1, 4096), default=64, help="tokens that are written at most")
    group.add_argument("--max_images", type=whole(0, 64), default=1, help="pictures that are drawn at most")
    group.add_argument("--image_threshold", type=fraction, default=0.5, help="chance above which a picture begins")
    group.add_argument("--cfg", type=guidance_float, default=5.0, help="guidance scale of pictures; 1: none")
    group.add_argument("--temperature", type=temperature_float, default=1.0, help="of codes, above 0")
    group.add_argument(
        "--top_k", type=or_none(whole(1, 10**6)), default=None, help="likeliest codes that are drawn from"
    )
    group.add_argument("--negative_prompt", default=None, help="what guidance leads away from")
    group.add_argument("--seed", type=seed_int, default=0)
    group.add_argument("--output_dir", default="./output/told",
                       help="made if missing; an earlier run's files in it are replaced, others stay")  # fmt: skip
    add_mars_run_args(parser)
    add_device_arg(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        if not (args.prompt or args.images):
            raise ValueError("say what comes before by --prompt, --images or both")
        require_output_dir("--output_dir", args.output_dir)
        from engine.cli.build_mars_sample import write_page  # imports PyTorch

        print(write_page(args))


if __name__ == "__main__":
    main()
