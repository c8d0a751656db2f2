"""The comparison of scripts/mini/text_equality.py, which says what it does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cli.build_mars_sample import open_pipeline
from engine.sample.generate import batches
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
    """The names of the language model's weights that are not what they were, or are gone. Of a MARS opened
    from a file, `base` is of the same folder: what differs was changed since, by experts or their file."""
    frozen = {name.replace(TEXT_PART, "."): value for name, value in after.items() if VISUAL_PART not in name}
    return [name for name, value in base.items() if name not in frozen or not torch.equal(value, frozen[name])]


@torch.no_grad()
def greedy(lm: Any, starts: Sequence[Sequence[int]], end_token: int, max_words: int) -> list[list[int]]:
    """The likeliest token after token, up to what ends a text; every step reads the whole texts, which begin with as
    many tokens."""
    rows, length = torch.tensor(starts, device=lm.device), len(starts[0])  # [B, t]
    while rows.shape[1] < length + max_words and not bool((rows[:, length:] == end_token).any(1).all()):
        logits = lm(input_ids=rows, use_cache=False).logits  # [B, t, V]
        rows = torch.cat([rows, logits[:, -1:].argmax(-1)], dim=1)  # [B, t + 1]
    written = [row[length:] for row in rows.tolist()]
    ends = [row.index(end_token) if end_token in row else len(row) for row in written]
    return [[*start, *row[:end]] for start, row, end in zip(starts, written, ends, strict=True)]


def answers_to(
    lm: Any, starts: Sequence[Sequence[int]], end_token: int, max_words: int, batch_size: int
) -> list[list[int]]:
    """Those of one length together."""
    found: dict[int, list[int]] = {}
    for length in sorted({len(start) for start in starts}):
        places = [place for place, start in enumerate(starts) if len(start) == length]
        for chosen in batches(len(places), batch_size):
            part = places[chosen]
            answers = greedy(lm, [starts[place] for place in part], end_token, max_words)
            found |= dict(zip(part, answers, strict=True))
    return [found[place] for place in range(len(starts))]


@torch.no_grad()
def compare(args: argparse.Namespace, base: CausalLm, pipeline: MarsPipeline, texts: Sequence[str]) -> dict[str, Any]:
    words, after = pipeline.parts.words, pipeline.parts.model.lm
    prompts = words.prompts(texts)
    found = {"texts": len(texts), "logits": 0, "logits_equal": 0, "largest_difference": 0.0}
    for ids in prompts:
        row = torch.tensor([ids], device=after.device)  # [1, t]
        one, other = (lm(input_ids=row, use_cache=False).logits for lm in (base.lm, after))  # [1, t, V] each
        found["logits"] += one.numel()
        found["logits_equal"] += int((one == other).sum())
        found["largest_difference"] = max(found["largest_difference"], float((one - other).abs().max()))
    starts = prompts if args.prompts else [ids[: 1 + NUM_FIRST] for ids in prompts]
    options = (starts, words.end_token, args.max_words, args.batch_size)
    before, behind = answers_to(base.lm, *options), answers_to(after, *options)
    found["answers_equal"] = sum(one == other for one, other in zip(before, behind, strict=True))
    shown = zip(texts, before, behind, strict=True)
    told = [{"text": text, "before": words.text(one), "after": words.text(other)} for text, one, other in shown]
    weights = dict(base.lm.state_dict())
    changed = changed_weights(weights, after.state_dict())
    return {
        **found,
        "weights": len(weights),
        "weights_equal": len(weights) - len(changed),
        "examples": told[:NUM_EXAMPLES],
    }


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
