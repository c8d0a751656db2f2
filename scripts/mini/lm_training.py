"""The training of scripts/mini/train_lm.py, which says what it does.

Shape letters: B captions of a batch, T tokens (padded), V tokens of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from models.frozen.lm import LmEncoder
from scripts.mini.clip_training import draw_captions, resumable_settings
from scripts.mini.training import batch_indices, continue_training, learning_rate, save_state, state_file, take_step
from util.rng import derive_seed, generator

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
CJK = "[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"  # characters of Chinese and its marks
LANGUAGES = {"English": "", "Chinese": ".zh"}
BEGINNINGS = {"English": "a red", "Chinese": "沙滩上有"}
IGNORED = -100
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
UNTRAINED = {
    "version": "1.0",
    "added_tokens": [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for index, token in enumerate((BOS, EOS))
    ],
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CJK}, "behavior": "Isolated", "invert": False}, BYTES
        ],
    },
    "decoder": BYTES,
    "model": {"type": "BPE", "vocab": {BOS: 0, EOS: 1}, "merges": []},
}  # fmt: skip
"""A tokenizer.json before any merge is learned."""


def load_captions(root: Path, split: str, language: str, max_images: int | None) -> list[list[str]]:
    """The captions of each image, in the order of the file. Raises FileNotFoundError naming the command that makes
    them."""
    path = root / "annotations" / f"captions_{split}{LANGUAGES[language]}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no captions in {path}: make them with python -m scripts.mini.make_dataset --chinese")
    content = json.loads(path.read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"][:max_images]}
    for annotation in content["annotations"]:
        if annotation["image_id"] in captions:
            captions[annotation["image_id"]].append(annotation["caption"])
    return list(captions.values())


def build_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE, learned from the captions; every Chinese character stands alone. BOS and EOS come first.

    There are fewer tokens than `vocab_size` where every word is one before that.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(UNTRAINED), encoding="utf-8")
        untrained = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=BOS, eos_token=EOS, pad_token=EOS)
    trained: PreTrainedTokenizerBase = untrained.train_new_from_iterator(captions, vocab_size, show_progress=False)
    assert (trained.bos_token_id, trained.eos_token_id) == (BOS_ID, EOS_ID), "special tokens come first"
    return trained


def lm_config(vocab_size: int, width: int, depth: int, positions: int = 512) -> Qwen2Config:
    if width % 8:
        raise ValueError(f"--width must be a multiple of 8, two for each of 4 heads, got {width}")
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )


def caption_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """The mean cross-entropy of the captions' tokens and of EOS behind them, in nats."""
    rows = [[BOS_ID, *row, EOS_ID] for row in tokenizer(list(captions), add_special_tokens=False)["input_ids"]]
    ids = torch.full((len(rows), max(map(len, rows))), EOS_ID)  # [B, T]
    targets = torch.full_like(ids, IGNORED)  # [B, T]
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        targets[index, : len(row)] = torch.tensor(row)
    logits = model(input_ids=ids[:, :-1]).logits  # [B, T - 1, V]; what pads there stands behind all that is scored
    return functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def train(
    args: argparse.Namespace, captions: dict[str, list[list[str]]], tokenizer: PreTrainedTokenizerBase
) -> Qwen2ForCausalLM:
    """Continues from the state beside the output, if there is one."""
    config = lm_config(len(tokenizer), args.width, args.depth, args.positions)
    torch.manual_seed(derive_seed(args.seed, "lm", "init"))  # layer initialisers know no other generator
    model = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    settings = resumable_settings(args)
    start = continue_training(state_file(args.output), settings, model, optimizer)
    began, first, second = time.time(), *captions.values()
    for step in range(start, args.steps):
        rng = generator(args.seed, "lm", "step", step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        indices = batch_indices(step, len(first), args.batch_size, args.seed, "lm").tolist()
        is_first = (torch.rand(len(indices), generator=rng) < 0.5).tolist()
        images = [(first if each else second)[index] for each, index in zip(is_first, indices, strict=True)]
        loss = caption_loss(model, tokenizer, draw_captions(images, list(range(len(images))), rng))
        take_step(model, optimizer, loss)
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            seconds = (time.time() - began) / (done - start)
            print(f"step {done}/{args.steps} loss {loss.item():.4f} {seconds:.3f} s/step", flush=True)
        if done % args.save_freq == 0 and done < args.steps:
            parts: dict[str, dict[str, Any]] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_file(args.output), settings, done, **parts)
    return model.eval()


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Writes beside `output` and renames, so that a directory of that name is always whole."""
    partial = output.with_name(output.name + ".tmp")
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    output.mkdir(exist_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, output / path.name)
    partial.rmdir()


@torch.no_grad()
def continued(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, beginning: str, most: int = 40) -> str:
    """The likeliest caption that begins so, token by token."""
    row = [BOS_ID, *tokenizer(beginning, add_special_tokens=False)["input_ids"]]
    while len(row) < most and row[-1] != EOS_ID:
        logits = model(input_ids=torch.tensor([row])).logits  # [1, t, V]
        row.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(row, skip_special_tokens=True))


@torch.no_grad()
def held_out_line(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, language: str, args: Any) -> str:
    """How well captions of scenes that were left out are predicted, and how one is continued."""
    captions = [each[0] for each in load_captions(args.data, "val2017", language, 256)]
    tokens = sum(map(len, tokenizer(captions, add_special_tokens=False)["input_ids"])) / len(captions)
    loss = float(caption_loss(model, tokenizer, captions))
    told = continued(model, tokenizer, BEGINNINGS[language])
    return f"{language}: {tokens:.1f} tokens a caption, held-out loss {loss:.3f} nats a token; {told!r}"


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if (args.output / "model.safetensors").is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    captions = {language: load_captions(args.data, "train2017", language, args.max_images) for language in LANGUAGES}
    every = [caption for images in captions.values() for each in images for caption in each]
    tokenizer = build_tokenizer(every, args.vocab_size)
    print(f"{len(tokenizer)} tokens, {len(every)} captions", flush=True)
    model = train(args, captions, tokenizer)
    save(model, tokenizer, args.output)
    state_file(args.output).unlink(missing_ok=True)
    for language in LANGUAGES:
        print(held_out_line(model, tokenizer, language, args))
    encoder = LmEncoder.load(args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**20
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {size:.2f} MiB, {num_parameters:,} parameters, id {encoder.id}")
