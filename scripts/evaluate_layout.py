"""Scores how well images follow their layouts: generates (or takes a folder), detects, and compares with the boxes.

    python -m scripts.evaluate_layout --profile structmar-256 --resume CKPT --detector DETECTOR --coco_root data/coco
    python -m scripts.evaluate_layout --profile lama3097 --images FOLDER --detector DETECTOR --coco_root data/coco
    torchrun --nproc_per_node 8 -m scripts.evaluate_layout ...

Images are drawn with the sampling flags given, else as the weights say. The second form scores any model: the folder
holds one picture per image, called as the dataset's file or by the image's id. A profile (configs/eval_*.yaml) fixes
images, geometry, boxes and thresholds; its name and hash stand beside every number, and so do the bounds: real images
through the same geometry, the VAE round trip, and detections shuffled among the layouts.

Into --output_dir go results.json, per_image.jsonl, report.html, ground_truth_{full,conditioned}.json and
detections/*.json (COCO's formats), and generated images. Killed, the same command goes on; --rescore scores the images
that are there again (with another detector, say) and never generates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import (
    DEFAULT_DETECTOR,
    DEFAULT_VAE,
    SWITCH,
    VAE_HELP,
    add_compile_args,
    add_config_arg,
    add_device_arg,
    add_ema_arg,
    add_speed_arg,
    add_text_encoder_args,
    add_timeout_arg,
    script_parser,
)
from engine.cli.arguments_sampling import add_sampling_args
from engine.cli.sampling import check_sampling, parse_sampling_args
from engine.cli.validate import require_path
from engine.eval.names import BOXES_BY, require_own_name
from engine.eval.profiles import IMAGE_SIZES, available_profiles, load_profile
from models.config import PRECISIONS
from util.failures import first_process_speaks, one_line_errors
from util.output import require_output_dir
from util.ranges import batch_int, positive_int, seed_int, threads_int, whole


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.evaluate_layout", __doc__)
    add_config_arg(parser)
    add_protocol_args(parser)
    add_source_args(parser)
    add_judge_args(parser)
    add_sampling_args(parser)
    add_run_args(parser)
    return parser


def add_protocol_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protocol")
    group.add_argument("--profile", required=True, help=f"a yaml file, or one of {', '.join(available_profiles())}")
    group.add_argument("--coco_root", default="./data/coco", help="folder with annotations/ and the image folders")
    group.add_argument("--coco_split", default=None, help="another split than the profile's")
    group.add_argument("--max_images", type=positive_int, default=None,
                       help="only the profile's first images: another id list and ids hash")  # fmt: skip


def add_source_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is scored: a checkpoint's images, or a folder's")
    group.add_argument("--resume", default=None, help="training checkpoint, its folder, or exported .safetensors")
    group.add_argument(
        "--images",
        default=None,
        help="folder of any model's pictures, called as the dataset's files or by image id",
    )
    group.add_argument("--image_size", default="profile", choices=IMAGE_SIZES,
                       help="of --images; source: the photographs' own; any: resized as photographs")  # fmt: skip
    group.add_argument("--name", default=None, help="name of the row (the stage or the folder)")
    add_ema_arg(group)
    group.add_argument("--vae_path", default=DEFAULT_VAE, help=f"{VAE_HELP}; with --images for its bound only")
    add_text_encoder_args(group)
    group.add_argument("--allow_other_frozen", action=SWITCH, default=False,
                       help="generate with a VAE or text encoder other than the one trained with")  # fmt: skip
    group.add_argument(
        "--seeds", type=seed_int, nargs="+", default=[0], help="one set of images for each; means are taken"
    )
    group.add_argument("--without_layout", action=SWITCH, was="no_layout_run", was_negative=False, default=False,
                       help="also generate without any boxes")  # fmt: skip
    group.add_argument("--boxes_by", default="class", choices=BOXES_BY,
                       help="what the model is told of a box: its class, its annotation's phrase, or both")  # fmt: skip
    group.add_argument("--real_bound", action=SWITCH, default=True, help="score the real images (they must be there)")
    group.add_argument("--vae_bound", action=SWITCH, default=None,
                       help="score the VAE round trip; default: with --resume, or when --vae_path exists")  # fmt: skip
    group.add_argument("--bounds_dir", default=None,
                       help="folder of bounds, for evaluations of the same data, profile and detector")  # fmt: skip


def add_judge_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what scores")
    group.add_argument("--detector", default=DEFAULT_DETECTOR,
                       help="Faster R-CNN weights (.pth) or an export (.onnx: YOLOX, YOLOv8, DETR)")  # fmt: skip
    group.add_argument("--skip_unknown", action=SWITCH, default=False,
                       help="leave out the categories that the detector does not know")  # fmt: skip
    group.add_argument("--reward_detector", nargs="+", default=[],
                       help="files or sha256 of detectors that were a reward; a checkpoint names its own")  # fmt: skip
    group.add_argument(
        "--num_resamples", type=whole(1, 20000), default=500, help="bootstrap resamples of the 95 %% intervals"
    )
    group.add_argument("--fid", default=None, help="weights of FID's Inception network")
    group.add_argument("--clip_score", default=None, help="directory of a whole CLIP model (text and vision)")
    group.add_argument("--features", default=None, help="a Faster R-CNN whose features stand in; never called FID")


def add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=batch_int, default=16, help="images sampled at a time (it is part of the pixels)"
    )
    group.add_argument("--detector_batch_size", type=batch_int, default=16, help="images detected at a time")
    add_speed_arg(group)
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    add_device_arg(group)
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_compile_args(group)
    add_timeout_arg(group)
    group.add_argument("--output_dir", default="./output/evaluation", help="made if missing; continued if begun")
    group.add_argument(
        "--rescore", action=SWITCH, default=False, help="score the images that are there; never generate"
    )


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict one another."""
    if bool(args.resume) == bool(args.images):
        given = "both" if args.resume else "none"
        raise ValueError(f"say what is scored by exactly one of --resume, --images; got {given}")
    if len(set(args.seeds)) != len(args.seeds):
        raise ValueError(f"--seeds must be different numbers, got {args.seeds}")
    if args.name is not None:
        require_own_name(args.name, "--name")
    for name in ("without_layout", "rescore"):
        if args.images and vars(args)[name]:
            raise ValueError(f"--{name} is for generated images (--resume), got --images {args.images}")
    if args.images and args.boxes_by != "class":
        raise ValueError(f"--boxes_by {args.boxes_by} is for generated images (--resume), got --images {args.images}")
    if args.resume and args.image_size != "profile":
        raise ValueError(f"--image_size {args.image_size} is for --images, got --resume {args.resume}")
    require_output_dir("--output_dir", args.output_dir)
    if args.bounds_dir is not None:
        require_output_dir("--bounds_dir", args.bounds_dir)
    load_profile(args.profile)
    check_sampling(args)
    require_path("detector", args.detector)


def main(argv: Sequence[str] | None = None) -> None:
    with first_process_speaks(), one_line_errors():
        args, note = parse_sampling_args(get_parser(), argv, check_args)
    with one_line_errors(debug=args.debug):
        from engine.cli.build_evaluation import evaluate  # imports PyTorch: once the arguments are known to be right

        table = evaluate(args, note)
    if table:
        print(table)


if __name__ == "__main__":
    main()
