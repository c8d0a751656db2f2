"""What few-step distillation hands in: the sampler as a teacher of a second network of the head, all else frozen."""

from __future__ import annotations

import argparse
import math

import torch

from engine.checkpoint.resume import Source, is_backbone
from engine.cli.build import Parts, PreparedRun, Stage, build_train_state, read_parts
from engine.cli.build_train import FREE_FLAGS, build_images, has_previews, prepare_on_images, train_config
from engine.cli.sampling import FLAGS, sampling_config
from engine.cli.sizes import picture_sizes
from engine.data.inputs import StepInputs
from engine.train.cost import few_step_cost
from models.few_step import FewStepDistilled, FewStepNoise, FewStepSettings, draw_noise, require_fitting_teacher
from models.sampling.config import SamplingConfig
from models.sampling.few import few_sampling
from models.structmar import StructMARConfig
from util.config import told_as_flags
from util.distributed import DistInfo
from util.plain import from_plain


def build_few_step(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything --train_mode few_step trains with. Raises ValueError or FileNotFoundError, naming what does not
    fit."""
    stage = Stage(args.train_mode, build_images, has_previews(args), keeps_sampling=False,
                  free_flags=(*FREE_FLAGS, "few_evals"), few_evals=args.few_evals)  # fmt: skip
    parts = read_parts(args, dist, stage)
    teacher = teacher_of(parts.source, sampling_config(args))
    check_teacher(args, parts.config, teacher)
    settings = FewStepSettings(args.few_tokens, args.few_draws)
    state = build_train_state(args, parts, args.train_mode, lambda model: FewStepDistilled(model, teacher, settings))

    def draw(inputs: StepInputs, rng: torch.Generator) -> FewStepNoise:
        grid = state.model.grid_of(inputs.latents)
        way = (len(inputs), rng, args.mask_ratio_min, grid, args.mask_schedule)
        return draw_noise(state.model, teacher, settings, *way)

    return prepare_on_images(
        args, parts, state, has_dropout=False, draw_noise=draw, extra=lambda: {"teacher": teacher.to_dict()},
        notes=[
            f"the teacher draws in {teacher.num_sampling_steps} reverse steps, temperature {teacher.temperature:g}, "
            f"guidance text {teacher.cfg_text:g} and layout {teacher.cfg_layout:g} ({teacher.cfg_schedule}); pictures "
            f"and scores take {args.few_evals} evaluations",
            *describe_cost(args, parts, teacher, settings),
        ],
    )  # fmt: skip


def describe_cost(
    args: argparse.Namespace, parts: Parts, teacher: SamplingConfig, settings: FewStepSettings
) -> list[str]:
    """What the command implies, before anything is done."""
    cost = few_step_cost(
        parts.config,
        teacher,
        args.batch_size,
        settings.tokens * settings.draws,
        args.mask_schedule or parts.config.mask_schedule,
        args.mask_ratio_min,
        parts.frozen.text_encoder.max_tokens,
        parts.num_steps(train_config(args)),
        args.accum_iter,
    )
    return cost.describe()


def teacher_of(source: Source, asked: SamplingConfig) -> SamplingConfig:
    """The options by which the teacher draws: those asked for; a run that continues keeps its own.

    Raises ValueError naming the file for weights that the sampler has nothing to draw with, and for a run that
    continues with another teacher.
    """
    if source.kind == "scratch" or is_backbone(source):
        raise ValueError(f"--resume {source.path or ''}: a few-step head is distilled from a trained checkpoint")
    if source.kind != "continue":
        return asked
    kept = from_plain(SamplingConfig, source.state["teacher"], f"{source.path}: teacher")
    if asked not in (kept, few_sampling(kept, asked.head_evals or 1)):
        here, there = asked.to_dict(), kept.to_dict()
        said = ", ".join(f"{name} {here[name]} instead of {there[name]}" for name in here if here[name] != there[name])
        raise ValueError(f"{source.path} has another teacher: {said}; use the same, or another --output_dir")
    return kept


def check_teacher(args: argparse.Namespace, config: StructMARConfig, teacher: SamplingConfig) -> None:
    """Raises ValueError for options that do not fit single tokens, and for more iterations than a picture has."""
    with told_as_flags(FLAGS):
        require_fitting_teacher(teacher)
        grids = [config.grid_of(size) for size in picture_sizes(args, config)] or [config.grid]
        teacher.require_fitting(min(math.prod(config.unit_grid(grid)) for grid in grids))
