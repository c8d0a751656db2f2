"""A page in the browser to draw boxes, say what is in them, and watch the picture appear.

    python -m scripts.page                      # the committed weights
    python -m scripts.page --resume CKPT --vae_path VAE --text_encoder DIR --detector DETECTOR
    python -m scripts.page --config configs/page.yaml --port 8001

Then open the address that it prints. On another machine: `ssh -L 8000:localhost:8000 MACHINE`, and open
http://localhost:8000/ here. Sampling flags are what the page begins with; where none is given, what the weights name.

Whoever reaches the port can draw, there is no password: it listens on this machine alone, unless --host says otherwise.
Under other names than localhost and --host it answers only if --allowed_hosts has them. It writes no files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.cli.arguments import (
    DEFAULT_VAE,
    SWITCH,
    VAE_HELP,
    add_config_arg,
    add_device_arg,
    add_ema_arg,
    add_speed_arg,
    add_text_encoder_args,
    script_parser,
)
from engine.cli.arguments_sampling import add_sampling_args
from engine.cli.sampling import parse_sampling_args, sampling_config
from models.config import PRECISIONS
from util.failures import one_line_errors
from util.ranges import batch_int, threads_int, whole
from util.read import read_text, require_regular_file

DEFAULT_CONFIG = "configs/page.yaml"
ANYWHERE = ("0.0.0.0", "::", "")


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.page", __doc__)
    add_config_arg(parser)
    add_weight_args(parser)
    add_server_args(parser)
    add_sampling_args(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=batch_int, default=1, help="images drawn at a time; 1: each depends on its own seed alone"
    )
    add_speed_arg(group)
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    add_device_arg(group)
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    return parser


def add_weight_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"weights (none: those of {DEFAULT_CONFIG})")
    group.add_argument("--resume", default="", help="training checkpoint or its folder, or exported .safetensors")
    add_ema_arg(group)
    group.add_argument("--vae_path", default=DEFAULT_VAE, help=VAE_HELP)
    add_text_encoder_args(group)
    group.add_argument("--allow_other_frozen", action=SWITCH, default=False,
                       help="sample with a VAE or text encoder other than the one trained with")  # fmt: skip
    group.add_argument("--planner_path", default="", help="proposes layouts for captions without boxes; empty: none")
    group.add_argument("--detector", default="", help="shows what it finds in the pictures; empty: none")
    group.add_argument("--examples", default="", help="layout file with scenes to begin with; empty: none")


def add_server_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=whole(0, 65535), default=8000, help="0: any that is free")
    group.add_argument("--allowed_hosts", nargs="+", default=[], metavar="NAME",
                       help="names that the page is reached by, beside localhost and --host")  # fmt: skip


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for files that are not there and addresses that nobody could open."""
    if not args.resume:
        raise ValueError(f"--resume is empty: name weights, or leave it out for those of {DEFAULT_CONFIG}")
    if args.host in ANYWHERE and not args.allowed_hosts:
        raise ValueError(f"--host {args.host!r} is no name: --allowed_hosts says by which names the page is reached")
    for name, path in {"detector": args.detector, "planner": args.planner_path}.items():
        if path:
            require_regular_file(path, name)
    if args.examples:
        read_text(args.examples, "layout file")  # what it says is checked once the weights' categories are known
    sampling_config(args)


def with_default_config(argv: Sequence[str]) -> list[str]:
    """The command line, with the config that stands in where it names neither weights nor a config."""
    flags = {word.partition("=")[0] for word in argv}
    return list(argv) if flags & {"--resume", "--config"} else ["--config", DEFAULT_CONFIG, *argv]


def main(argv: Sequence[str] | None = None) -> None:
    words = with_default_config(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        args, note = parse_sampling_args(get_parser(), words, check_args)
    with one_line_errors(debug=args.debug):
        from engine.cli.build_page import serve_page  # imports PyTorch: once the arguments are known to be right

        serve_page(args, note, lambda url: print(f"page: {url} (Ctrl-C ends it)", flush=True))


if __name__ == "__main__":
    main()
