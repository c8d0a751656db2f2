"""Layouts for captions that have none: a trained planner beside a model that draws them.

planner = LayoutPlanner.load("planner.safetensors")
scenes = planner.scenes(["a dog on a bench"], caption_encoder, layout_generators(generators))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.data.scenes import KnownLabels, Scene, text_scene
from engine.plan.files import PlannerIdentity, load_planner
from models.frozen.base import TextEncoder
from models.planner import Planner
from util.rng import generator
from util.types import Layout

DEFAULT_TEMPERATURE = 0.7  # more of what captions say than at 1, layouts nearly as various
BATCH_SIZE = 64  # captions at a time


@dataclass(frozen=True)
class LayoutPlanner:
    """A planner and what it was made for. source: the file."""

    model: Planner
    identity: PlannerIdentity
    source: str

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> LayoutPlanner:
        """Raises FileNotFoundError or ValueError naming the file."""
        model, identity = load_planner(path, device)
        return LayoutPlanner(model, identity, str(path))

    def require_fitting(self, known: KnownLabels, text_encoder_id: str) -> None:
        """Raises ValueError naming the planner if it places what the model does not know, or reads other captions."""
        names = {category.name for category in known.categories}
        unknown = [category.name for category in self.identity.categories if category.name not in names]
        if unknown:
            raise ValueError(
                f"planner {self.source} places {unknown[0]!r}, which these weights do not know; {len(unknown)} of its "
                f"{len(self.identity.categories)} categories are unknown to them"
            )
        if self.identity.text_encoder_id != text_encoder_id:
            raise ValueError(
                f"planner {self.source} reads captions by the text encoder {self.identity.text_encoder_id[:12]}, "
                f"these weights by {text_encoder_id[:12]}"
            )

    def layouts(
        self,
        prompts: Sequence[str],
        encoder: TextEncoder,
        generators: Sequence[torch.Generator],
        temperature: float = DEFAULT_TEMPERATURE,
        max_objects: int | None = None,
    ) -> list[Layout]:
        """One layout per caption, drawn by its own generator alone; categories are the planner's own indices.

        Raises ValueError for a caption without words, which says nothing of what to place.
        """
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is empty: a layout is proposed for a caption")
        device = self.model.head.weight.device
        found: list[Layout] = []
        for first in range(0, len(prompts), BATCH_SIZE):
            rows = slice(first, first + BATCH_SIZE)
            text = encoder.context(list(prompts[rows])).to(device)
            found += self.model.propose(text, generators[rows], temperature, max_objects)
        return found

    def scenes(
        self,
        scenes: Sequence[Scene],
        known: KnownLabels,
        encoder: TextEncoder,
        generators: Sequence[torch.Generator],
        temperature: float = DEFAULT_TEMPERATURE,
        is_asked: Sequence[bool] | None = None,
    ) -> list[Scene]:
        """The scenes with proposed layouts in place of their own, in the model's categories.

        generators: one a scene, see `layout_generators`. is_asked: False leaves a scene as it is; None: all are asked
        for. Raises ValueError as `layouts` does.
        """
        rows = [row for row in range(len(scenes)) if is_asked is None or is_asked[row]]
        prompts = [scenes[row].prompt for row in rows]
        layouts = self.layouts(prompts, encoder, [generators[row] for row in rows], temperature, known.max_objects)
        planned = list(scenes)
        for row, layout in zip(rows, layouts, strict=True):
            planned[row] = self._scene(scenes[row], layout, known)
        return planned

    def _scene(self, scene: Scene, layout: Layout, known: KnownLabels) -> Scene:
        if len(layout) == 0:
            return replace(text_scene(scene.prompt), size=scene.size)
        names = [self.identity.categories[int(category)].name for category in layout.categories]
        own = torch.tensor([known.indices[name] for name in names])
        return Scene(scene.prompt, Layout(layout.boxes_xyxy, own), names, scene.size)


def layout_generators(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """What draws the layout of each image: keyed by the seed of the image's own generator, which it leaves as it is.
    Images that share a generator are told apart by their order."""
    seen: Counter[int] = Counter()
    made = []
    for each in generators:
        made.append(generator("layout", each.initial_seed() % 2**63, seen[id(each)]))
        seen[id(each)] += 1
    return made
