"""How scripts/mini/moved_objects.py, which says what it measures, chooses objects, edits drawings and judges them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from engine.data.scenes import Scene
from engine.eval.bootstrap import BOOTSTRAP_SEED, bootstrap_weights
from engine.eval.judge import SUCCESS_IOU, Judge
from engine.eval.layout_metrics import pairwise_iou
from engine.eval.profiles import Profile, load_profile
from engine.eval.targets import EvalSet, load_eval_set
from engine.sample.changes import Changes, Move, with_goals
from engine.sample.editing import cell_of, starts_of_edits
from engine.sample.pipeline import StructMARPipeline
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from scripts.mini.captions import Named, count_phrases, join
from scripts.mini.colours import accuracy
from scripts.mini.edit_sheet import hidden_pixels
from util.distributed import init_distributed
from util.images import Picture
from util.output import write_text_atomic
from util.rng import generator

MOVES_FORMAT = "structmar-moves-1"
TRIES = 200  # of places for an object
MAX_OVERLAP = 0.1  # IoU of the new box with another object's
WAYS = ("moved", "removed", "repainted")
SCRATCH = "drawn from scratch, object moved"


@dataclass(frozen=True)
class Trial:
    """One drawing, the object of it that is edited, and where it goes. place: of the image in the evaluation."""

    place: int
    picture: Picture
    scene: Scene
    index: int
    goal: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """Of the object, as flags say it."""
        label = self.scene.names[self.index]
        return f"{label}:{self.scene.names[: self.index + 1].count(label)}"

    @property
    def others(self) -> list[int]:
        return [index for index in range(len(self.scene.names)) if index != self.index]

    def box(self, index: int) -> np.ndarray:
        """[4], xyxy in [0, 1]."""
        return np.asarray(self.scene.layout.boxes_xyxy[index].numpy(), dtype=np.float64)

    def edited(self, way: str) -> tuple[Changes, Scene]:
        """What is asked for, of the scene under its new caption."""
        if way == "moved":
            return Changes(move=[Move(self.name, self.goal)]), self.scene
        if way == "removed":
            left = [Named(self.scene.names[index], None, (0.0, 0.0), 0.0) for index in self.others]
            return Changes(remove=[self.name]), replace(self.scene, prompt=join(count_phrases(left)) if left else "")
        return Changes(), replace(self.scene, edited=(self.index,))


def choose(place: int, picture: Picture, scene: Scene, draws: torch.Generator) -> Trial | None:
    """A trial with an object and a place drawn at random; None where no object of the scene finds a free place."""
    boxes = scene.layout.boxes_xyxy.double().numpy()  # [n, 4]
    for index in torch.randperm(len(boxes), generator=draws).tolist():
        width, height = boxes[index, 2:] - boxes[index, :2]
        corners = torch.rand(TRIES, 2, generator=draws).numpy() * [1 - width, 1 - height]  # [TRIES, 2]
        goals = np.concatenate([corners, corners + np.array([width, height])], axis=1).clip(0, 1)  # [TRIES, 4]
        overlaps = pairwise_iou(goals, boxes)  # [TRIES, n]
        allowed = np.full(len(boxes), MAX_OVERLAP)
        allowed[index] = 0.0
        free = np.nonzero((overlaps <= allowed).all(axis=1))[0]
        if len(free):
            x0, y0, x1, y1 = (round(float(end), 4) for end in goals[free[0]])
            return Trial(place, picture, scene, index, (x0, y0, x1, y1))
    return None


@dataclass(frozen=True)
class Seen:
    """What a detector surely sees in a picture. boxes: [d, 4] xyxy in [0, 1]; names: of their classes."""

    boxes: np.ndarray
    names: Sequence[str]

    def iou(self, name: str, box: np.ndarray) -> np.ndarray:
        """[d], 0 for other classes."""
        is_same = np.array([own == name for own in self.names], dtype=np.float64)
        return pairwise_iou(self.boxes.reshape(-1, 4), box[None])[:, 0] * is_same

    def has(self, name: str, box: np.ndarray, rivals: Sequence[np.ndarray] = ()) -> bool:
        """Whether the class is in the box; what fits a rival's box better does not count."""
        own = self.iou(name, box)
        better = [self.iou(name, rival) > own for rival in rivals]
        return bool(((own >= SUCCESS_IOU) & ~np.any([*better, np.zeros_like(own, dtype=bool)], axis=0)).any())


def look(judge: Judge, pictures: Sequence[Picture], min_score: float, batch_size: int = 50) -> list[Seen]:
    """pictures: uint8 [H, W, 3] of one size."""
    names = {category.id: category.name for category in judge.detector.categories}
    seen = []
    for first in range(0, len(pictures), batch_size):
        part = pictures[first : first + batch_size]
        images = [torch.from_numpy(each.copy()).permute(2, 0, 1).float() / 255 for each in part]  # [3, H, W]
        for picture, found in zip(part, judge.detector(images), strict=True):
            height, width = picture.shape[:2]
            sure = (found.scores >= min_score).cpu().numpy()
            boxes = found.boxes_px.cpu().numpy().astype(np.float64)[sure] / [width, height, width, height]
            seen.append(Seen(boxes, [names[each] for each in found.category_ids.cpu().numpy()[sure].tolist()]))
    return seen


@dataclass
class Counts:
    """Answers to one question. right: yes or no, places: of which image."""

    right: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, place: int, is_right: bool) -> None:
        self.right.append(is_right)
        self.places.append(place)

    def result(self, weights: np.ndarray) -> dict[str, float]:
        """The share of yes with its interval. weights: [R, images], of the bootstrap."""
        if not self.right:
            return {"count": 0}
        share = accuracy(np.array(self.right), np.array(self.places, dtype=np.int64), weights)
        return {"count": len(self.right), **asdict(share)}


QUESTIONS = ("found", "left", "kept_near", "kept_far")


def answers(trials: Sequence[Trial], hidden: Sequence[np.ndarray], before: Sequence[Seen], after: Sequence[Seen],
            way: str) -> dict[str, Counts]:  # fmt: skip
    """What became of objects and neighbours. hidden: bool [H, W] of each picture, what was drawn anew."""
    counts = {name: Counts() for name in QUESTIONS}
    for trial, pixels, old, new in zip(trials, hidden, before, after, strict=True):
        label, own = trial.scene.names[trial.index], trial.box(trial.index)
        rivals = [trial.box(index) for index in trial.others if trial.scene.names[index] == label]
        goal = np.array(trial.goal) if way == "moved" else own
        if way != "removed":
            counts["found"].add(trial.place, new.has(label, goal))
        if way != "repainted":
            counts["left"].add(trial.place, new.has(label, own, rivals + ([goal] if way == "moved" else [])))
        for index in trial.others:
            name, box = trial.scene.names[index], trial.box(index)
            if old.has(name, box):
                kind = "kept_near" if covers(pixels, box) else "kept_far"
                counts[kind].add(trial.place, new.has(name, box))
    return counts


def covers(hidden: np.ndarray, box: np.ndarray) -> bool:
    """Whether any pixel of a box, xyxy in [0, 1], is hidden: bool [H, W]."""
    height, width = hidden.shape
    x0, y0, x1, y1 = box
    inside = hidden[int(y0 * height) : int(np.ceil(y1 * height)), int(x0 * width) : int(np.ceil(x1 * width))]
    return bool(inside.any())


def edit(
    pipeline: StructMARPipeline, trials: Sequence[Trial], way: str, seed: int, batch_size: int, precision: str
) -> tuple[list[Picture], list[np.ndarray]]:
    """The edited pictures, and which pixels of each belong to cells that were drawn anew."""
    pairs = []
    for trial in trials:
        changes, scene = trial.edited(way)
        pairs.append(changes.of(pipeline.model.config, scene, trial.picture, f"image {trial.place}"))
    scenes, edits = [scene for scene, _ in pairs], [own for _, own in pairs]
    starts = starts_of_edits(pipeline.model, pipeline.codec, edits)
    seeds = [seed + trial.place for trial in trials]
    drawn = pipeline.draw(scenes, pipeline.own_sampling, seeds, batch_size, precision, starts=starts)
    cell = cell_of(pipeline.model.config)
    return drawn, [hidden_pixels(own, cell) for own in edits]


def from_scratch(
    pipeline: StructMARPipeline, trials: Sequence[Trial], seed: int, batch_size: int, precision: str
) -> list[Picture]:
    """What the model draws of the same layouts, objects moved, without the drawings: what can be hoped for."""
    scenes = [with_goals(trial.scene, {trial.index: trial.goal}) for trial in trials]
    seeds = [seed + trial.place for trial in trials]
    return pipeline.draw(scenes, pipeline.own_sampling, seeds, batch_size, precision)


def result_row(
    trials: Sequence[Trial],
    hidden: Sequence[np.ndarray],
    before: Sequence[Seen],
    after: Sequence[Seen],
    way: str,
    weights: np.ndarray,
) -> dict[str, Any]:
    """One row of the results; arguments as in `answers` and `Counts.result`."""
    counts = answers(trials, hidden, before, after, way)
    share = float(np.mean([pixels.mean() for pixels in hidden]))
    return {"drawn_share": share} | {name: each.result(weights) for name, each in counts.items()}


def fits(pipeline: StructMARPipeline, trial: Trial) -> bool:
    """Whether every edit leaves something of the drawing."""
    for way in WAYS:
        changes, scene = trial.edited(way)
        try:
            changes.of(pipeline.model.config, scene, trial.picture, "image")
        except ValueError:
            return False
    return True


def choose_all(eval_set: EvalSet, seed: int) -> list[Trial]:
    """A trial for each image of the evaluation that has one."""
    draws = generator("moved objects", seed)
    chosen = [
        choose(place, eval_set.picture(target), target.scene, draws) for place, target in enumerate(eval_set.targets)
    ]
    return [trial for trial in chosen if trial is not None]


def evaluate(
    pipeline: StructMARPipeline, judge: Judge, eval_set: EvalSet, profile: Profile, args: argparse.Namespace
) -> dict[str, Any]:
    """Every way of editing on the same objects."""
    places = choose_all(eval_set, args.seed)
    trials = [trial for trial in places if fits(pipeline, trial)]
    weights = bootstrap_weights(len(eval_set.targets), args.num_resamples, BOOTSTRAP_SEED)
    before = look(judge, [trial.picture for trial in trials], profile.match_score)
    rows = {}
    for way in WAYS:
        pictures, hidden = edit(pipeline, trials, way, args.seed, args.batch_size, args.precision)
        after = look(judge, pictures, profile.match_score)
        rows[way] = result_row(trials, hidden, before, after, way, weights)
    drawn = from_scratch(pipeline, trials, args.seed, args.batch_size, args.precision)
    everything = [np.ones(picture.shape[:2], dtype=bool) for picture in drawn]
    rows[SCRATCH] = result_row(trials, everything, before, look(judge, drawn, profile.match_score), "moved", weights)
    return {
        "format": MOVES_FORMAT,
        "weights": pipeline.describe(),
        "num_images": len(eval_set.targets),
        "num_without_place": len(eval_set.targets) - len(places),
        "num_too_large": len(places) - len(trials),
        "num_objects": len(trials),
        "seed": args.seed,
        "rows": rows,
    }


HEADS = (
    "| | drawn anew | object in its box | object left in the old box | neighbours kept, near | far |",
    "|---" * 6 + "|",
)


def format_table(results: Mapping[str, Any]) -> str:
    """A Markdown table: the share of the picture that is drawn anew, then the answers in percent."""
    lines = [*HEADS]
    for way, row in results["rows"].items():
        cells = [_cell(row[name]) for name in QUESTIONS]
        lines.append(f"| {way} | {100 * row['drawn_share']:.0f} % | {' | '.join(cells)} |")
    said = (
        f"{results['num_objects']} objects of {results['num_images']} drawings; {results['num_without_place']} have no "
    )
    said += f"free place for any object, in {results['num_too_large']} an edit would leave nothing"
    return "\n".join([*lines, "", f"{said}."])


def _cell(share: Mapping[str, float]) -> str:
    if not share["count"]:
        return ""
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}] of {share['count']}"


def run(args: argparse.Namespace) -> None:
    """Measures, writes and prints. Raises ValueError or FileNotFoundError."""
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = init_distributed(args.device).device
    profile = load_profile("mini")
    settings = DetectorSettings(profile.min_score, profile.nms_iou, profile.max_detections)
    eval_set = load_eval_set(args.coco_root, profile, split=args.split, max_images=args.max_images)
    judge = Judge.of(load_detector(args.detector, device, settings), eval_set.categories)
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device,
        max_text_tokens=args.max_text_tokens,
    )  # fmt: skip
    results = evaluate(pipeline, judge, eval_set, profile, args)
    if args.output is not None:
        write_text_atomic(args.output, json.dumps(results, indent=2) + "\n")
    print(format_table(results))
