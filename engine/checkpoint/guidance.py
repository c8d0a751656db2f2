"""Guidance that is trained into weights: which runs put it there, keep it, or would undo it."""

from __future__ import annotations

from engine.checkpoint.resume import Source, is_backbone
from models.sampling.config import SamplingConfig

Guidance = tuple[float, float]
"""The scales of text and of layout."""


def guidance_found(source: Source) -> Guidance | None:
    """What is in the weights that a run starts from or continues."""
    return None if source.identity is None else source.identity.guidance


def require_unguided_start(source: Source, stage: str) -> None:
    """For stages whose loss is of given images alone. Raises ValueError naming the file and its scales."""
    if (found := guidance_found(source)) is not None:
        raise ValueError(
            f"{source.path} has guidance trained into its weights ({_said(found)}), which stage '{stage}' would undo: "
            "start from the weights of before; stage 3 (main_rl.py) goes on from these"
        )


def guidance_to_train(source: Source, sampling: SamplingConfig) -> Guidance:
    """The scales that a run trains into the weights: those of its sampling options; a run that continues keeps its own.

    Raises ValueError naming the file and both scales if these differ, if there is nothing to train, or if the weights
    have guidance already or know no captions.
    """
    found, asked = guidance_found(source), (sampling.cfg_text, sampling.cfg_layout)
    if source.kind == "scratch" or is_backbone(source):
        raise ValueError(f"--resume {source.path or ''}: guidance is distilled from a stage-2 checkpoint")
    if source.kind == "continue" and found is not None:
        if sampling.is_guided and asked != found:
            raise ValueError(
                f"{source.path} has been trained towards guidance with {_said(found)}, this run has {_said(asked)} "
                "(--cfg_text, --cfg_layout): use the same scales, or start over in another --output_dir"
            )
        return found
    if found is not None:
        raise ValueError(
            f"{source.path} has guidance trained into its weights already ({_said(found)}): start from the weights of "
            "before"
        )
    if not sampling.is_guided:
        raise ValueError("--cfg_text 1 and --cfg_layout 1 are no guidance: there is nothing to distil")
    return asked


def _said(guidance: Guidance) -> str:
    return f"text {guidance[0]:g}, layout {guidance[1]:g}"
