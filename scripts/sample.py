"""Generates images from captions and boxes, and a grid that shows them with the boxes drawn.

    python -m scripts.sample --resume CKPT --prompt "a dog on a bench" --layout configs/layouts/coco.json
    python -m scripts.sample --resume CKPT --prompt "a dog on a bench" --size 96x64
    python -m scripts.sample --resume CKPT --prompt "a dog on a bench" --layout auto --planner_path planner.safetensors
    python -m scripts.sample --resume CKPT --coco_root ./data/coco --coco_split val2014 --num_images 16
    python -m scripts.sample --resume CKPT --layout scene.json --image photo.png --move dog:1 0.5 0.4 0.9 0.9
    python -m scripts.sample --resume CKPT --speech caption.wav --asr_path DIR --layout configs/layouts/coco.json
    python -m scripts.sample --resume mar_huge.safetensors --model mar_huge --class_label 207 360
    python -m scripts.sample --resume mars.safetensors --lm_path DIR --vae_path vq.pt --prompt "a dog on a bench"

--image gives a picture of which a part is drawn anew, and the rest stays. --layout auto proposes boxes for the caption,
or for a dataset's captions, other ones for each image. --speech takes the caption from a WAV file and prints what each
part of the way from sound to picture takes. --class_label samples MAR's own weights, class by class: that is how they
are checked by eye. --lm_path is for MARS, which knows captions alone (models/mars/README.md). Sampling flags that
neither the command nor --config gives have the values that the weights name, where they name some.

Into --output_dir go NNNN.png (plain images; the settings are in the PNG's text), grid.png (the first 64) and
samples.json (all settings and, for each image, its prompt, objects and seed). Image k has the seed --seed + k, and
depends on nothing else that is random: --seed with that number, and its prompt and objects, give it again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import (
    DEFAULT_VAE,
    SWITCH,
    VAE_HELP,
    add_compile_args,
    add_config_arg,
    add_device_arg,
    add_ema_arg,
    add_speed_arg,
    add_text_encoder_args,
    script_parser,
)
from engine.cli.arguments_edit import add_start_args, check_start
from engine.cli.arguments_layout import add_layout_format_args
from engine.cli.arguments_mars_sample import add_lm_arg, require_mars_flags
from engine.cli.arguments_planner import AUTO, add_proposal_args, check_proposal
from engine.cli.arguments_sampling import add_sampling_args, scale_float
from engine.cli.sampling import check_sampling, parse_sampling_args
from models.config import PRECISIONS, ROPE_SCALES, backbone_config
from util.config import given_options, parse_args
from util.failures import one_line_errors
from util.output import require_output_dir
from util.ranges import (
    batch_int,
    depth_int,
    nonnegative_int,
    picture_size,
    pixels_int,
    seed_int,
    threads_int,
    whole,
    width_int,
)
from util.read import read_text, require_regular_file, require_text, short_repr


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.sample", __doc__)
    add_config_arg(parser)
    add_weight_args(parser)
    add_source_args(parser)
    add_speech_args(parser)
    add_start_args(parser)
    add_size_args(parser)
    add_mar_args(parser)
    add_sampling_args(parser)
    add_run_args(parser)
    return parser


def add_weight_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    group.add_argument("--resume", required=True,
                       help="training checkpoint or its folder, exported .safetensors, or MAR's weights")  # fmt: skip
    add_ema_arg(group)
    group.add_argument("--vae_path", default=DEFAULT_VAE, help=VAE_HELP)
    add_text_encoder_args(group)
    add_lm_arg(group)
    group.add_argument(
        "--allow_other_frozen", action=SWITCH, default=False,
        help="sample with another VAE, text encoder or language model than the one trained with"
    )  # fmt: skip


def add_source_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to generate: captions and boxes, or a dataset's, or MAR's classes")
    group.add_argument("--prompt", default=None,
                       help="caption; with --layout it replaces the file's, alone there are no boxes")  # fmt: skip
    group.add_argument("--layout", default=None,
                       help='json: {"prompt": ..., "objects": [{"label": ..., "bbox": [x0, y0, x1, y1]}]}, boxes '
                            "normalised to [0, 1], or a list of these, or another project's file "
                            "(engine/data/README.md); auto: --planner_path proposes one for each image; empty: none, "
                            "also over --config")  # fmt: skip
    add_layout_format_args(group)
    group.add_argument("--subject_scales", type=scale_float, nargs="+", default=None,
                       help="strength of each box of --layout, in its order, instead of the file's own")  # fmt: skip
    add_proposal_args(group)
    group.add_argument("--coco_root", default=None,
                       help="take captions and boxes from this dataset (only its annotations/ is read)")  # fmt: skip
    group.add_argument("--coco_split", default="val2014",
                       help="split of --coco_root: its first images with boxes, in the order of their ids")  # fmt: skip
    group.add_argument(
        "--class_label", type=nonnegative_int, nargs="+", default=None, help="class indices, for MAR's own weights"
    )
    group.add_argument("--num_images", type=whole(1, 10**6), default=4,
                       help="images per scene or class; of a dataset: scenes, with one image each")  # fmt: skip
    group.add_argument("--seed", type=seed_int, default=0, help="image k has seed + k")


def add_speech_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a spoken caption")
    group.add_argument(
        "--speech", default=None, help="WAV file that says the caption, in place of --prompt; empty: none"
    )
    group.add_argument(
        "--asr_path", default=None, help="local Hugging Face directory of the recogniser: Whisper, or one with CTC"
    )
    group.add_argument("--speech_repeats", type=whole(0, 1000), default=1,
                       help="with --speech: the first batch is drawn this many times more, to print the median time of "
                            "each part; 0: none")  # fmt: skip


def add_size_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("another size than the checkpoint's square (no learned positions)")
    group.add_argument(
        "--size", type=picture_size, default=None,
        help="HEIGHTxWIDTH in pixels; a layout file's own height and width give way to it"
    )  # fmt: skip
    group.add_argument(
        "--rope_scale", default=None, choices=ROPE_SCALES,
        help="positions counted in tokens, or scaled to the trained area (None: the checkpoint's)"
    )  # fmt: skip


def add_mar_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes of MAR's own weights (with --class_label; our checkpoints know theirs)")
    group.add_argument("--model", default="mar_huge", help="preset: mar_mini, mar_base, mar_large or mar_huge")
    group.add_argument("--diffloss_d", type=depth_int, default=None, help="depth of the diffusion head (the preset's)")
    group.add_argument("--diffloss_w", type=width_int, default=None, help="width of the diffusion head (the preset's)")
    group.add_argument("--img_size", type=pixels_int, default=None, help="side of the images in pixels (the preset's)")
    group.add_argument(
        "--class_num", type=whole(1, 10**6), default=None, help="rows of the class embedding (the preset's)"
    )


def add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=batch_int, default=8, help="images sampled at a time")
    add_speed_arg(group)
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    add_device_arg(group)
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_compile_args(group)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="./output/samples",
                       help="made if missing; what an earlier run of this program left in it (NNNN.png, grid.png, "
                            "samples.json) is replaced, other files stay")  # fmt: skip
    group.add_argument(
        "--grid_columns", type=whole(1, 64), default=None, help="images per row of the grid (None: square)"
    )
    group.add_argument("--grid_scale", type=whole(1, 64), default=None,
                       help="enlargement of the images in the grid (None: at least 256 pixels wide)")  # fmt: skip


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict one another."""
    if args.prompt is not None:
        require_text(args.prompt, "--prompt")
    check_speech(args)
    has_file, has_prompt = bool(args.layout) and args.layout != AUTO, args.prompt is not None or bool(args.speech)
    check_proposal(args, has_prompt or bool(args.coco_root))
    has_scene = has_file or has_prompt
    sources = {
        "--layout/--prompt/--speech": has_scene,
        "--coco_root": bool(args.coco_root),
        "--class_label": args.class_label is not None,
    }
    given = [name for name, is_given in sources.items() if is_given]
    if len(given) != 1:
        raise ValueError(
            f"say what to generate by exactly one of {', '.join(sources)}; got {', '.join(given) or 'none'}"
        )
    if args.class_label is not None and (args.size is not None or args.rope_scale is not None):
        raise ValueError("--size and --rope_scale do not go with --class_label: MAR's positions are of one size")
    for flag in ("layout_format", "layout_canvas"):
        if vars(args)[flag] is not None and not has_file:
            raise ValueError(f"--{flag} {vars(args)[flag]} needs --layout, the file that it is about")
    if args.subject_scales is not None and not has_file:
        listed = " ".join(f"{scale:g}" for scale in args.subject_scales)
        raise ValueError(f"--subject_scales {listed} are of the boxes of a --layout, which is not given")
    if has_file:
        read_text(args.layout, "layout file")  # what it says is checked once the weights' categories are known
    check_start(args)
    require_output_dir("--output_dir", args.output_dir)
    check_sampling(args)


def check_speech(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for a spoken caption beside a written one, or one that is not there."""
    if not args.speech:
        return
    if args.prompt is not None:
        raise ValueError(f"--speech {args.speech} says the caption: give it or --prompt {short_repr(args.prompt)}")
    require_regular_file(args.speech, "speech file")
    if not args.asr_path:
        raise ValueError(f"--speech {args.speech} needs --asr_path, the directory of a recogniser")
    if not Path(args.asr_path).is_dir():
        raise FileNotFoundError(f"recogniser directory not found: {args.asr_path} (--asr_path)")


def backbone_head(args: argparse.Namespace) -> str:
    """Of published weights, which --class_label samples. Raises ValueError for an unknown --model."""
    return backbone_config(args.model).head if args.class_label else "diffusion"


def mars_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, bool] | None:
    """The arguments, and whether they say how strong guidance is, where --lm_path asks for MARS; else None. Raises
    ValueError for flags that mean nothing for it."""
    args = parse_args(get_parser(), argv)
    if not args.lm_path:
        if args.upscale:
            raise ValueError(f"--upscale {args.upscale} needs --lm_path: it makes pictures of MARS larger")
        return None
    given = given_options(get_parser(), argv)
    require_mars_flags(args, given)
    if args.prompt is not None:
        require_text(args.prompt, "--prompt")
    require_output_dir("--output_dir", args.output_dir)
    return args, bool(given & {"cfg", "cfg_text"})


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        asked = mars_args(argv)
    if asked is not None:
        with one_line_errors(debug=asked[0].debug):
            from engine.cli.build_mars_sample import draw_mars  # imports PyTorch

            print(draw_mars(*asked))
        return
    with one_line_errors():
        args, note = parse_sampling_args(get_parser(), argv, check_args, backbone_head=backbone_head)
    with one_line_errors(debug=args.debug):
        from engine.cli.build_sample import draw_samples  # imports PyTorch: once the arguments are known to be right

        print(draw_samples(args, note))


if __name__ == "__main__":
    main()
