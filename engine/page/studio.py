"""What the page draws with: a pipeline, a detector if there is one, and what the page begins with."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.data.scenes import Scene, text_scene
from engine.page.command import LAYOUT_NAME, SOURCE_NAME, command_line, sample_words
from engine.page.found import look
from engine.page.growth import Growth
from engine.page.limits import MAX_IMAGES, MAX_PAGE_SEED, MAX_PHRASE, MAX_TEXT
from engine.page.wish import Wish, read_wish
from engine.plan.propose import layout_generators
from engine.sample.editing import starts_of_edits
from engine.sample.generate import Hooks, grid_of_scenes, image_generator, require_drawable
from engine.sample.output import picture_text
from engine.sample.pipeline import StructMARPipeline
from models.config import MAX_SCALE
from models.frozen.detections import BoxDetector
from models.sampling.auto_layout import require_maps
from models.sampling.config import SamplingConfig
from util.images import Picture, encode_png

logger = logging.getLogger(__name__)

Tell = Callable[[Mapping[str, Any]], None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Studio:
    """own: the options that the page begins with. command: the words of `scripts.sample` with these weights. speeds:
    options and precision by the name of a preset. examples: scenes to begin with, all of which the model can draw."""

    pipeline: StructMARPipeline
    own: SamplingConfig
    command: tuple[str, ...]
    speeds: Mapping[str, Mapping[str, Any]]
    examples: Sequence[Scene] = ()
    precision: str = "fp32"
    batch_size: int = 1
    detector: BoxDetector | None = None

    def facts(self) -> Json:
        """What the page has to know before anything is drawn."""
        config, known = self.pipeline.model.config, self.pipeline.known_labels
        rows, columns = config.unit_grid()
        return {
            "weights": self.pipeline.source,
            "labels": [category.name for category in known.categories],
            "max_objects": known.max_objects,
            "has_phrases": known.has_phrases,
            "has_planner": self.pipeline.planner is not None,
            "has_guidance": self.pipeline.identity is None or self.pipeline.identity.guidance is None,
            "has_detector": self.detector is not None,
            "size": [config.img_size, config.img_size],
            "num_tokens": rows * columns,
            "grid": [rows, columns],
            "head": config.head,
            "options": self.own.to_dict(),
            "precision": self.precision,
            "speeds": {name: dict(preset) for name, preset in self.speeds.items()},
            "examples": [scene.to_dict() for scene in self.examples],
            "limits": {
                "images": MAX_IMAGES,
                "text": MAX_TEXT,
                "phrase": MAX_PHRASE,
                "seed": MAX_PAGE_SEED,
                "scale": MAX_SCALE,
            },
            "files": {"layout": LAYOUT_NAME, "source": SOURCE_NAME},
        }

    def read(self, body: Any) -> Wish:
        """A request for pictures. Raises ValueError for what is wrong with it, and for what the model cannot draw."""
        model = self.pipeline.model
        wish = read_wish(body, self.own, self.pipeline.known_labels, model.config)
        require_drawable(model.config, wish.config, [wish.scene])
        self.pipeline.require_guided_once(wish.config)
        if wish.config.mask_threshold is not None:
            require_maps(model, f"mask_threshold {wish.config.mask_threshold}")
        return wish

    def propose(self, prompt: str, seed: int) -> Json:
        """The scene that `scripts.sample --layout auto` draws of a caption with this seed. Raises ValueError without a
        planner, and for a caption without words."""
        if self.pipeline.planner is None:
            raise ValueError("nothing here proposes layouts: start the page with --planner_path")
        generators = layout_generators([image_generator(seed)])
        way = ([text_scene(prompt)], self.pipeline.known_labels, self.pipeline.caption_encoder, generators)
        return self.pipeline.planner.scenes(*way)[0].to_dict()

    def draw(self, wish: Wish, tell: Tell, is_gone: Callable[[], bool]) -> None:
        """Tells of every iteration and picture. Ends early once `is_gone` says that nobody wants them any more."""
        pipeline, begun = self.pipeline, time.monotonic()
        starts = None if wish.edit is None else starts_of_edits(pipeline.model, pipeline.codec, [wish.edit])
        grid = grid_of_scenes(pipeline.model.config, [wish.scene]) if starts is None else starts[0].grid
        num_passes = wish.config.num_passes if starts is None else min(wish.config.num_iter, starts[0].num_unknown)
        for first in range(0, wish.num_images, self.batch_size):
            places = range(first, min(first + self.batch_size, wish.num_images))
            own = None if starts is None else [*starts] * len(places)
            growth = Growth(pipeline, grid, own, partial(_tell_step, tell, places, num_passes))
            hooks = Hooks(growth, is_gone)
            way = ([wish.scene] * len(places), wish.config, [wish.seed + place for place in places], len(places))
            pictures = pipeline.draw(*way, wish.precision, starts=own, hooks=hooks)
            if is_gone():
                logger.info("stopped after %d of %d pictures", first, wish.num_images)
                return
            for place, picture in zip(places, pictures, strict=True):
                tell({"event": "picture", "image": place, **self._made(wish, place, picture)})
        words = sample_words(self.command, wish, pipeline.own_sampling, self.batch_size)
        seconds = round(time.monotonic() - begun, 2)
        tell({"event": "done", "seconds": seconds, "command": command_line(words), "scene": wish.scene.to_dict()})
        logger.info("drew %d pictures in %.1f s", wish.num_images, seconds)

    def _made(self, wish: Wish, place: int, picture: Picture) -> Json:
        """A picture with all that it takes to draw it again, and what is found in it."""
        entry = {**wish.scene.to_dict(), "seed": wish.seed + place}
        settings: Json = {"precision": wish.precision}
        if wish.edit is not None:
            source = as_base64(encode_png(wish.edit.picture))
            settings["edit"] = {"picture": source, "boxes": [list(box) for box in wish.edited]}
        text = picture_text(entry, wish.config, self.pipeline.describe(), settings)
        device = self.pipeline.model.fake_latent.device
        seen = {} if self.detector is None else look(self.detector, picture, wish.scene, device)
        return {"seed": entry["seed"], "png": as_base64(encode_png(picture, text)), **seen}


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _tell_step(tell: Tell, places: range, num_passes: int, count: int, pictures: Sequence[Picture] | None) -> None:
    shown_of = {} if pictures is None else dict(zip(places, map(encode_png, pictures), strict=True))
    for place in places:
        shown = as_base64(shown_of[place]) if place in shown_of else None
        tell({"event": "step", "image": place, "iteration": count, "iterations": num_passes, "picture": shown})
