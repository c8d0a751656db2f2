"""Do few reverse steps, or evaluations, draw the same tokens as many? Distances between the head's samples.

    python -m scripts.compare_heads --resume CKPT --coco_root data/coco --coco_split val2014 --steps 50 50:5 few:2

Steps are written FIRST or, annealed over the iterations, FIRST:LAST; N evaluations of a few-step head few:N. Such a
head is compared with what taught it: give its teacher's options where the weights name others (--head_evals none
--cfg_text 6 ...). A row is accepted where its energy distance is at most 1.1 of the floor (the full number of steps,
other noise) and no channel's mean (in deviations) or deviation moves by more than 2 % beyond the floor's.

How it is measured: engine/sample/step_comparison.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.cli.arguments import (
    DEFAULT_VAE,
    VAE_HELP,
    add_config_arg,
    add_device_arg,
    add_ema_arg,
    add_text_encoder_args,
    script_parser,
)
from engine.cli.arguments_sampling import add_sampling_args, steps_int
from engine.cli.sampling import FLAGS, parse_sampling_args, sampling_config
from models.sampling.config import SamplingConfig
from models.sampling.few import few_sampling, require_head_of
from util.config import told_as_flags
from util.failures import one_line_errors
from util.ranges import positive_int, threads_int, whole

if TYPE_CHECKING:
    from engine.sample.step_comparison import HeadComparison


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.compare_heads", __doc__)
    add_config_arg(parser)
    group = parser.add_argument_group("weights and scenes")
    group.add_argument("--resume", required=True, help="training checkpoint, its folder, or exported .safetensors")
    add_ema_arg(group)
    group.add_argument("--vae_path", default=DEFAULT_VAE, help=VAE_HELP)
    add_text_encoder_args(group)
    group.add_argument("--coco_root", default="./data/coco", help="captions and boxes (only its annotations/ is read)")
    group.add_argument("--coco_split", default="val2014", help="its first images with boxes")
    group.add_argument("--num_images", type=whole(1, 10**6), default=64, help="images sampled to get conditions from")
    add_sampling_args(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--steps", nargs="+", default=["100", "50", "50:5"], help="what is compared: FIRST, FIRST:LAST or few:N"
    )
    group.add_argument("--full_steps", type=steps_int, default=100, help="with what it is compared")
    group.add_argument(
        "--num_iterations", type=positive_int, default=8, help="iterations whose tokens are drawn, evenly spaced"
    )
    group.add_argument("--num_draws", type=whole(1, 1024), default=8, help="draws per token")
    add_device_arg(group, default="cpu")
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    return parser


def read_steps(text: str, config: SamplingConfig) -> SamplingConfig:
    """`config` with other steps: "50" or "50:5" reverse steps, or "few:2" evaluations. Raises ValueError for anything
    else."""
    first, colon, last = text.partition(":")
    if (first != "few" and not first.isdecimal()) or (bool(colon) or first == "few") != last.isdecimal():
        raise ValueError(f"--steps takes FIRST, FIRST:LAST or few:N, got {text!r}")
    if first == "few":
        return few_sampling(config, int(last))
    return replace(config, num_sampling_steps=int(first), num_sampling_steps_last=int(last) if colon else None)


def run(args: argparse.Namespace) -> list[HeadComparison]:
    """Raises ValueError or FileNotFoundError for what does not fit. PyTorch is imported only here."""
    import torch

    from engine.checkpoint.identity import require_same_categories
    from engine.data.scenes import scenes_from_dataset
    from engine.sample.generate import scene_conditions
    from engine.sample.pipeline import StructMARPipeline
    from engine.sample.step_comparison import compare_steps, head_inputs
    from util.coco import BoxFilters, CocoIndex
    from util.distributed import init_distributed

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    config = sampling_config(args)
    options = [read_steps(text, config) for text in args.steps]
    device = init_distributed(args.device).device
    parts = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device, args.ema, max_text_tokens=args.max_text_tokens
    )
    model, identity = parts.model, parts.identity
    assert identity is not None, "a checkpoint says what it is made for"
    for each in options:
        require_head_of(each, model.config)
    index = CocoIndex.load(
        args.coco_root, args.coco_split, BoxFilters(max_objects=model.config.max_objects), model.config.img_size
    )
    require_same_categories(index.categories, identity.categories, f"{args.coco_root} {args.coco_split}")
    scenes = scenes_from_dataset(index, model.config.img_size, args.num_images)
    conditions = scene_conditions(model, parts.caption_encoder, scenes, config)
    assert conditions.text is not None and conditions.layout is not None
    spacing = config.num_iter / args.num_iterations
    iterations = [int((number + 0.5) * spacing) for number in range(args.num_iterations)]
    inputs = head_inputs(model, config, conditions.text, conditions.layout, iterations)
    print(f"{sum(given.z.shape[1] for given in inputs)} tokens, {args.num_draws} draws each", flush=True)
    return compare_steps(model, config, inputs, options, args.num_draws, args.full_steps)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for steps that are none and options that contradict one another."""
    config = sampling_config(args)
    if config.head_evals is not None:
        raise ValueError(
            f"--head_evals {config.head_evals}: few evaluations are compared with the reverse process (--steps few:N): "
            "give --head_evals none and the options of what taught the head"
        )
    for text in args.steps:
        read_steps(text, config)
    with told_as_flags(FLAGS):
        config.require_uncontrolled("scripts.compare_heads, which repeats single iterations")
    if args.num_iterations > config.num_iter:
        raise ValueError(f"--num_iterations {args.num_iterations} is more than --num_iter {config.num_iter}")


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args, note = parse_sampling_args(get_parser(), argv, check_args)
    if note:
        print(note)
    with one_line_errors(debug=args.debug):
        found = run(args)
    print(f"floor: energy {found[0].floor_energy:.4f}, mean shift or std change {100 * found[0].floor_change:.1f} %")
    print("| steps | head calls | energy / floor | mean shift | std change | accepted |\n|---|--:|--:|--:|--:|---|")
    for name, row in zip(args.steps, found, strict=True):
        changes = f"{100 * row.mean_shift:.1f} % | {100 * row.std_change:.1f} %"
        verdict = "yes" if row.is_accepted else "no"
        print(f"| {name} | {row.calls} | {row.energy / row.floor_energy:.2f} | {changes} | {verdict} |")


if __name__ == "__main__":
    main()
