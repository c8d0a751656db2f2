"""What guidance distillation hands in, between stages 2 and 3: the frozen start as a teacher under guidance."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from engine.cli.build import Parts, PreparedRun, Stage, build_train_state, read_parts
from engine.cli.build_reference import build_reference, open_denoise, reference_content
from engine.cli.build_train import FREE_FLAGS, build_images, has_previews, prepare_on_images, train_config
from engine.cli.sampling import FLAGS, sampling_config
from engine.cli.sizes import picture_sizes
from engine.train.cost import distillation_cost
from models.distillation import Distilled, GuidedTeacher, require_teachable
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR, StructMARConfig
from util.config import told_as_flags
from util.distributed import DistInfo


def build_distillation(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything --train_mode distill trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    stage = Stage(args.train_mode, build_images, has_previews(args), keeps_sampling=False, free_flags=FREE_FLAGS,
                  folds_guidance=True)  # fmt: skip
    parts = read_parts(args, dist, stage)
    assert parts.identity.guidance is not None, "the stage folds guidance"
    cfg_text, cfg_layout = parts.identity.guidance
    sampling = replace(sampling_config(args), cfg_text=cfg_text, cfg_layout=cfg_layout)
    require_fitting_teacher(args, parts.config, sampling)
    reference = build_reference(args, parts, f"--train_mode {args.train_mode}")
    teacher = GuidedTeacher(reference, sampling)

    def as_student(model: StructMAR) -> Distilled:
        open_denoise(model)
        return Distilled(model, teacher)

    state = build_train_state(args, parts, args.train_mode, as_student)
    told = (
        f"the teacher is guided, text {cfg_text:g} and layout {cfg_layout:g} ({sampling.cfg_schedule}); the student, "
        "its pictures and its scores are not"
    )
    return prepare_on_images(
        args,
        parts,
        state,
        has_dropout=False,
        extra=lambda: {"reference": reference_content(reference, state)},
        notes=[told, *describe_cost(args, parts, sampling)],
    )


def describe_cost(args: argparse.Namespace, parts: Parts, teacher: SamplingConfig) -> list[str]:
    """What the command implies, before anything is done."""
    config = parts.config
    cost = distillation_cost(
        config,
        teacher,
        args.batch_size,
        config.diffusion_batch_mul,
        args.mask_schedule or config.mask_schedule,
        args.mask_ratio_min,
        parts.frozen.text_encoder.max_tokens,
        parts.num_steps(train_config(args)),
        args.accum_iter,
    )
    return cost.describe()


def require_fitting_teacher(args: argparse.Namespace, config: StructMARConfig, sampling: SamplingConfig) -> None:
    """Raises ValueError for options that steer more than guidance, and for more iterations than a picture has
    tokens."""
    with told_as_flags(FLAGS):
        require_teachable(sampling)
        grids = [config.grid_of(size) for size in picture_sizes(args, config)] or [config.grid]
        sampling.require_fitting(min(math.prod(config.unit_grid(grid)) for grid in grids))
