"""Counts the floating-point operations of an image: a training step of each stage and objective, and sampling. No
weights needed.

    python -m scripts.count_flops --model mar_huge

The model is built on the meta device and its own passes are counted as they run (`models/flops.py`). One multiply-add
is two operations. Element-wise work, the frozen VAE and CLIP are not counted; the gradient of a reward goes through
MAR's VAE and the detector of photographs, which are. Objectives have their flags' defaults, NFT and best of a group one
optimizer step on each rollout; the teacher of `distill` is guided by text and by layout.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.cli.arguments import script_parser
from engine.cli.arguments_sampling import steps_int
from models.config import StructMARConfig, preset_config
from models.sampling.config import SamplingConfig, default_sampling
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import whole, width_int

if TYPE_CHECKING:
    from engine.train.cost import RunCost
    from models.structmar import StructMAR

MEAN_MASK_RATIO = {"truncnorm": 0.867, "arccos": 0.637}  # of the heads' own mask schedules
MASK_RATIO_MIN = 0.1  # of what learns without sampling
GROUP_SIZE = 4
TOKENS_DRAWN = 16 * 2  # tokens of an image, draws of each
FEW_EVALS = 2
TERA = 1e12


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.count_flops", __doc__)
    parser.add_argument("--model", default="mar_huge", help="preset")
    parser.add_argument("--num_categories", type=whole(1, 10**6), default=80, help="categories of the layouts")
    parser.add_argument(
        "--text_dim", type=width_int, default=512, help="channels of the text states (CLIP ViT-B/32: 512)"
    )
    parser.add_argument("--num_text", type=whole(1, 4096), default=14, help="text tokens of a caption")
    parser.add_argument("--diffusion_batch_mul", type=whole(1, 1024), default=1, help="noise draws per masked token")
    parser.add_argument("--num_sampling_steps", type=steps_int, default=100, help="diffusion steps per token")
    return parser


def training_flops(model: StructMAR, mode: str, num_text: int) -> float:
    """Forward and backward of one image at the mean mask ratio."""
    import torch

    from models.flops import META, forward_backward, meta_conditions
    from models.masking import TokenMask
    from models.structmar import TrainingNoise
    from models.weights import select_trainable

    config = model.config
    select_trainable(model, mode)
    num_tokens = math.prod(config.unit_grid())
    num_masked = round(num_tokens * MEAN_MASK_RATIO[config.mask_schedule])
    mask = TokenMask(torch.ones(1, num_tokens, dtype=torch.bool, device=META), num_masked)
    rows = config.diffusion_batch_mul * num_masked
    noise = TrainingNoise(mask, model.head.sample_noise(rows, torch.Generator()).to(META))
    side = config.img_size // config.vae_stride
    latents = torch.zeros(1, config.vae_embed_dim, side, side, device=META)
    conditions = meta_conditions(config, 1, num_text)
    flops = forward_backward(model, lambda: model(latents, noise, **conditions))
    return flops.forward + flops.backward


def logits_flops(model: StructMAR, num_text: int) -> float:
    """Of one image with a discrete head: the trunk, prepared conditions apart, and the logits of every code."""
    import torch

    from models.flops import META, meta_conditions
    from util.flops import count_flops

    config = model.config
    tokens = model.head.empty_tokens(1, math.prod(config.unit_grid()), META)  # [1, U, C]
    kept_ids = torch.zeros(1, 0, dtype=torch.int64, device=META)  # [1, 0]
    with torch.no_grad():
        conditions = model.embed_conditions(1, **meta_conditions(config, 1, num_text))
        context = model.prepare(conditions, torch.float32)
        flops: float = count_flops(lambda: model.code_head.logits(model.predict(tokens, kept_ids, context)))[1]
    return flops


def objective_costs(config: StructMARConfig, num_text: int, num_sampling_steps: int) -> dict[str, RunCost]:
    """Of an update of one image, where nothing is sampled, or of one prompt: what stage 3 can do, and before it."""
    from engine.rl.cost import estimate_cost
    from engine.train.cost import distillation_cost, few_step_cost

    guided = default_sampling(config.head, cfg_text=3.0, cfg_layout=4.0)
    masks = ("linear", MASK_RATIO_MIN)
    costs = {"distill": distillation_cost(config, guided, 1, config.diffusion_batch_mul, *masks, num_text, updates=1)}
    if config.head == "discrete":
        sampling = default_sampling("discrete", num_iter=8, order="random")
        costs["grpo, 8 iterations"] = estimate_cost(
            config, sampling, 1, GROUP_SIZE, "exact", sampling.num_iter, None, 2, True, num_text, updates=1
        )
        return costs
    with_few = replace(config, few_step_head=True)
    one_branch = default_sampling("diffusion", num_sampling_steps=num_sampling_steps)
    costs["few_step"] = few_step_cost(with_few, one_branch, 1, TOKENS_DRAWN, *masks, num_text, updates=1)
    costs["reward_gradient"] = gradient_cost(config, num_text)
    steps = {"num_sampling_steps": num_sampling_steps}
    annealed = {"num_sampling_steps": 50, "num_sampling_steps_last": 5}
    for num_iter, said, options in (
        (256, f"{num_sampling_steps} steps", steps),
        (32, "50 to 5 steps", annealed),
        (32, f"a few-step head's {FEW_EVALS} evaluations", {"head_evals": FEW_EVALS}),
    ):
        if num_iter <= math.prod(config.unit_grid()):
            sampling = default_sampling("diffusion", num_iter=num_iter, **options)
            costs |= rollout_costs(f"{num_iter} iterations of {said}", with_few, sampling, num_text)
    return costs


def rollout_costs(said: str, config: StructMARConfig, sampling: SamplingConfig, num_text: int) -> dict[str, RunCost]:
    """Of the objectives that sample."""
    from engine.rl.cost import estimate_cost

    given = (config, sampling, 1, GROUP_SIZE, "elbo", 4, 8)
    once: dict[str, Any] = {"updates": 1, "has_old": False}  # optimizer steps on a rollout
    return {
        f"grpo, {said}": estimate_cost(*given, 2, True, num_text, updates=1),
        f"nft, {said}": estimate_cost(*given, 1, True, num_text, **once),
        f"best_of, {said}": estimate_cost(*given, 1, True, num_text, **once, scored_of_group=1),
    }


def gradient_cost(config: StructMARConfig, num_text: int) -> RunCost:
    """Of one image, by MAR's VAE and the detector of photographs."""
    from engine.rl.cost_gradient import reward_gradient_cost
    from models.config import RESNET50_FPN_V2
    from models.flops import META
    from models.frozen.faster_rcnn import build_detector
    from models.frozen.flops import decoder_flops, detector_flops
    from models.frozen.vae import KL16, LatentCodec, build_autoencoder

    with META:
        codec = LatentCodec(build_autoencoder(KL16), KL16, 1.0, "")
        detector = build_detector(RESNET50_FPN_V2, num_classes=91)
    side = config.img_size // codec.stride
    frozen = (decoder_flops(codec, (side, side)), [detector_flops(detector)])
    return reward_gradient_cost(config, 1, True, *frozen, "linear", MASK_RATIO_MIN, num_text, updates=1)


def print_objectives(costs: Mapping[str, RunCost]) -> None:
    for name, cost in costs.items():
        parts = ", ".join(f"{part} {flops / cost.images / TERA:.4g}" for part, flops in cost.parts.items())
        calls = f", {cost.head_calls:,} head calls one after the other" if cost.head_calls else ""
        print(f"{name}: {cost.update_flops / cost.images / TERA:.4g} TFLOP per image ({parts}){calls}")


def count(name: str, config: StructMARConfig, num_text: int, num_sampling_steps: int) -> None:
    """Prints what a model of these sizes costs. PyTorch is imported only here, once the sizes are known to fit."""
    from models.flops import meta_model, sampling_flops

    model = meta_model(config)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    for stage, mode in (("stage 1, text_layout", "text_layout"), ("stage 2, full", "full")):
        flops = training_flops(model, mode, num_text)
        print(f"{stage}: {flops / TERA:.4g} TFLOP per training image (forward and backward)")
    is_discrete = config.head == "discrete"
    if is_discrete:
        print(f"a pass with all logits: {logits_flops(model, num_text) / TERA:.4g} TFLOP per image")
    own_options = {} if is_discrete else {"num_sampling_steps": num_sampling_steps}
    for num_iter in (8, 32) if is_discrete else (64, 256):
        if num_iter <= math.prod(config.unit_grid()):
            for scale, guided in ((1.0, "no guidance"), (3.0, "guidance")):
                scales = {"cfg_text": scale, "cfg_layout": scale}
                sampling = default_sampling(config.head, num_iter=num_iter, **scales, **own_options)
                flops = sampling_flops(model, sampling, num_text)
                print(f"sampling, {num_iter} iterations, {guided}: {flops / TERA:.4g} TFLOP per image")
    print_objectives(objective_costs(config, num_text, num_sampling_steps))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_checked(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        config = preset_config(
            args.model,
            num_categories=args.num_categories,
            text_dim=args.text_dim,
            diffusion_batch_mul=args.diffusion_batch_mul,
        )
        count(args.model, config, args.num_text, args.num_sampling_steps)


if __name__ == "__main__":
    main()
