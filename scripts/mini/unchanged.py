"""The comparison of scripts/mini/text_equality.py, which says what it does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cli.build_mars_sample import open_pipeline
from engine.sample.mars import MarsPipeline
from models.config import PRECISIONS
from models.frozen.causal_lm import CausalLm, open_causal_lm
from models.semvie import VISUAL_PART
from scripts.mini.kinds import load_scene_kinds
from util.output import write_text_atomic

FORMAT = "structmar-mini-text-1"
TEXT_PART = ".text."  # in the name of a frozen weight that has an expert beside it
NUM_FIRST = 3  # tokens of a caption that an answer begins with
NUM_EXAMPLES = 4


def read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts, or the first held-out captions in both languages."""
    if args.prompts:
        return list(args.prompts)
    scenes = load_scene_kinds(args.coco_root, args.split, args.num_scenes)
    return [captions[0] for scene in scenes for captions in scene.captions.values()]


def changed_weights(base: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the language model's weights that are not what they were, or are gone."""
    frozen = {name.replace(TEXT_PART, "."): value for name, value in after.items() if VISUAL_PART not in name}
    return [name for name, value in base.items() if name not in frozen or not torch.equal(value, frozen[name])]


@torch.no_grad()
def greedy(lm: Any, ids: Sequence[int], end_token: int, max_words: int) -> list[int]:
    """The likeliest token after token; every step reads the whole text."""
    row = list(ids)
    while len(row) < len(ids) + max_words and (row[-1] != end_token or len(row) == len(ids)):
        logits = lm(input_ids=torch.tensor([row], device=lm.device), use_cache=False).logits  # [1, t, V]
        row.append(int(logits[0, -1].argmax()))
    return row


@torch.no_grad()
def compare(args: argparse.Namespace, base: CausalLm, pipeline: MarsPipeline, texts: Sequence[str]) -> dict[str, Any]:
    words, after = pipeline.parts.words, pipeline.parts.model.lm
    found = {"texts": 0, "logits": 0, "logits_equal": 0, "largest_difference": 0.0, "answers_equal": 0}
    examples: list[dict[str, str]] = []
    for text, ids in zip(texts, words.prompts(texts), strict=True):
        row = torch.tensor([ids], device=after.device)  # [1, t]
        one, other = (lm(input_ids=row, use_cache=False).logits for lm in (base.lm, after))  # [1, t, V] each
        start = ids if args.prompts else ids[: 1 + NUM_FIRST]
        answers = [greedy(lm, start, words.end_token, args.max_words) for lm in (base.lm, after)]
        found["texts"] += 1
        found["logits"] += one.numel()
        found["logits_equal"] += int((one == other).sum())
        found["largest_difference"] = max(found["largest_difference"], float((one - other).abs().max()))
        found["answers_equal"] += answers[0] == answers[1]
        if len(examples) < NUM_EXAMPLES:
            examples.append({"text": text, "before": words.text(answers[0]), "after": words.text(answers[1])})
    weights = dict(base.lm.state_dict())
    changed = changed_weights(weights, after.state_dict())
    return {**found, "weights": len(weights), "weights_equal": len(weights) - len(changed), "examples": examples}


def format_results(results: Mapping[str, Any]) -> str:
    """Four lines of words."""
    lines = [
        f"weights: {results['weights_equal']} of {results['weights']} tensors equal",
        f"logits: {results['logits_equal']} of {results['logits']} equal in {results['texts']} texts, largest "
        f"difference {results['largest_difference']:g}",
        f"answers: {results['answers_equal']} of {results['texts']} equal",
    ]
    return "\n".join([*lines, *(f"{each['text']!r}: {each['after']!r}" for each in results["examples"])])


def run(args: argparse.Namespace) -> None:
    """Compares, writes and prints. Raises ValueError or FileNotFoundError."""
    texts = read_texts(args)
    pipeline = open_pipeline(args)
    dtype = getattr(torch, PRECISIONS[args.precision])
    base = open_causal_lm(args.lm_path, dtype, pipeline.parts.model.device)
    results = compare(args, base, pipeline, texts)
    if args.output is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        content = {"format": FORMAT, "settings": settings, **results}
        write_text_atomic(args.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(format_results(results))
