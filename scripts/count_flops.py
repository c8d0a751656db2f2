"""Counts the floating-point operations of an image: a training step of stages 1 and 2, and sampling. No weights needed.

    python -m scripts.count_flops --model mar_huge

The model is built on the meta device and its own passes are counted as they run (`models/flops.py`). One multiply-add
is two operations. Element-wise work, the frozen VAE and CLIP are not counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.cli.arguments import script_parser
from engine.cli.arguments_sampling import steps_int
from models.config import StructMARConfig, preset_config
from models.sampling.config import default_sampling
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import whole, width_int

if TYPE_CHECKING:
    from models.structmar import StructMAR

MEAN_MASK_RATIO = {"truncnorm": 0.867, "arccos": 0.637}  # of the heads' own mask schedules
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
