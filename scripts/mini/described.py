"""The measurement of scripts/mini/caption_accuracy.py, which says what it does."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cli.build_mars_sample import open_pipeline
from engine.eval.bootstrap import BOOTSTRAP_SEED, Interval, bootstrap_weights, interval
from engine.sample.generate import batches
from engine.sample.mars import MarsPipeline
from models.mars.losses import Pairs, caption_losses
from models.mars.model import Mars, TextBatch
from scripts.mini.kinds import SceneKinds, format_rows, kinds_of_caption, load_scene_kinds, result_row, tally
from util.images import Picture, load_image
from util.output import write_text_atomic

FORMAT = "structmar-mini-captions-1"
BEGINNINGS = {"English": "a picture of", "Chinese": "一张图片，"}
NUM_EXAMPLES = 8


def losses_of(pipeline: MarsPipeline, codes: Tensor, captions: Sequence[str], batch_size: int) -> np.ndarray:
    """Nats a token of each caption, and of what ends it, after an image. codes: [B, L] -> [B] float64."""
    words, model = pipeline.parts.words, pipeline.parts.model
    answers = words.answers(captions)
    found = []
    for rows in batches(len(captions), batch_size):
        own = codes[rows]
        answer = TextBatch.of(answers[rows], "right", model.device)
        prompt = TextBatch.of([words.opening] * len(own), "left", model.device)  # not read: nothing is drawn
        has_caption = torch.ones(len(own), dtype=torch.bool, device=model.device)
        opening = torch.tensor(words.opening, device=model.device)
        found.append(caption_losses(model, Pairs(own, prompt, opening, answer, has_caption)).double().cpu().numpy())
    return np.concatenate(found)


def mean(values: np.ndarray, weights: np.ndarray) -> Interval:
    """values: [scenes]; weights: [R, scenes]."""
    return interval(float(values.mean()), weights @ values / weights.sum(1))


def parameters_of(model: Mars) -> dict[str, int]:
    """How many train, and how many stay as they are."""
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return {"trained": trained, "frozen": sum(each.numel() for each in model.parameters()) - trained}


def next_one(items: Sequence[Any]) -> list[Any]:
    """The next scene's, for each scene."""
    return [*items[1:], *items[:1]]


def measure(args: argparse.Namespace, scenes: Sequence[SceneKinds], pipeline: MarsPipeline) -> dict[str, Any]:
    weights = bootstrap_weights(len(scenes), args.num_resamples, BOOTSTRAP_SEED)
    pictures: list[Picture] = [np.asarray(load_image(scene.path)) for scene in scenes]
    codes = torch.cat([pipeline.codes_of(pictures[rows]) for rows in batches(len(scenes), args.batch_size)]).flatten(1)
    rows, losses, examples, seconds = {}, {}, {}, 0.0
    for language, beginning in BEGINNINGS.items():
        began = time.perf_counter()
        told = pipeline.describe(pictures, beginning, args.max_words, args.batch_size)
        seconds += time.perf_counter() - began
        firsts = [scene.captions[language][0] for scene in scenes]
        for name, captions in (
            (f"{language}, the dataset's own", firsts),
            (f"{language}, MARS", told),
            (f"{language}, MARS, of the next picture", next_one(told)),
        ):
            pairs = zip(scenes, captions, strict=True)
            rows[name] = result_row([tally(scene.kinds, kinds_of_caption(each)) for scene, each in pairs], weights)
        own = losses_of(pipeline, codes, firsts, args.batch_size)
        other = losses_of(pipeline, codes.roll(-1, 0), firsts, args.batch_size)
        parts = {"own": own, "shuffled": other, "difference": other - own}
        losses[language] = {name: asdict(mean(values, weights)) for name, values in parts.items()}
        examples[language] = told[:NUM_EXAMPLES]
    return {
        "rows": rows,
        "losses": losses,
        "seconds_a_caption": seconds / (len(BEGINNINGS) * len(scenes)),
        "parameters": parameters_of(pipeline.parts.model),
        "weights": pipeline.describe_weights(),
        "examples": examples,
    }


def format_results(results: Mapping[str, Any], num_scenes: int) -> str:
    """Two Markdown tables, in percent and in nats."""
    lines = [*format_rows("caption", results["rows"]), "", f"{num_scenes} scenes", ""]
    lines += ["| nats a token | after its picture | after the next picture | difference [95 %] |", "|---|---|---|---|"]
    for language, row in results["losses"].items():
        low, high = row["difference"]["low"], row["difference"]["high"]
        difference = f"{row['difference']['value']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {language} | {row['own']['value']:.3f} | {row['shuffled']['value']:.3f} | {difference} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Describes, measures, writes and prints. Raises ValueError or FileNotFoundError."""
    scenes = load_scene_kinds(args.coco_root, args.split, args.num_scenes)
    results = measure(args, scenes, open_pipeline(args))
    if args.output is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        content = {"format": FORMAT, "settings": settings, "num_scenes": len(scenes), **results}
        write_text_atomic(args.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(format_results(results, len(scenes)))
