"""The training of scripts/mini/train_clip.py, which says what it does."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.frozen.text import ClipTextEncoder
from scripts.mini.tokenizer import build_tokenizer, save_tokenizer
from scripts.mini.training import (
    batch_indices,
    continue_training,
    learning_rate,
    load_images,
    save_state,
    state_file,
    take_step,
    to_float,
)
from util.rng import derive_seed, generator

MAX_TOKENS = 77


@dataclass(frozen=True)
class Captioned:
    """images: uint8 [n, 3, H, W]. captions: n lists of strings."""

    images: Tensor
    captions: list[list[str]]


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [B, T]. valid: bool [B, T], BOS, EOS and everything between."""

    ids: Tensor
    valid: Tensor


def load_captioned(root: Path, split: str, max_images: int | None) -> Captioned:
    """Reads captions_<split>.json and its images. Raises FileNotFoundError if the dataset is not there."""
    path = root / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no captions in {path}: make them with python -m scripts.mini.make_dataset")
    content = json.loads(path.read_text())
    files = {image["id"]: image["file_name"] for image in content["images"][:max_images]}
    captions: dict[int, list[str]] = {image_id: [] for image_id in files}
    for annotation in content["annotations"]:
        if annotation["image_id"] in captions:
            captions[annotation["image_id"]].append(annotation["caption"])
    return Captioned(load_images([root / split / name for name in files.values()]), list(captions.values()))


class ImageTower(nn.Module):
    """[B, 3, H, W] -> patch states [B, H/8 * W/8, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 64, 2), (64, width, 2), (width, width, 1), (width, width, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class Contrast(nn.Module):
    """Text encoder, image tower and the projections between them."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.text = CLIPTextModel(config)
        self.image = ImageTower(width)
        self.caption_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(width, width, bias=False)
        self.token_projection = nn.Linear(width, width, bias=False)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.word_head = nn.Linear(width, config.vocab_size)
        self.previous_head = nn.Linear(width, config.vocab_size)
        self.log_scales = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))

    def caption_embeddings(self, states: Tensor, tokens: Tokens) -> Tensor:
        """states: [B, T, D] -> unit vectors [B, D], read off EOS, the last valid token."""
        last = states[torch.arange(len(states)), tokens.valid.sum(1) - 1]
        return functional.normalize(self.caption_projection(last), dim=-1)

    def image_embeddings(self, patches: Tensor) -> Tensor:
        """patches: [B, P, D] -> unit vectors [B, D]."""
        return functional.normalize(self.image_projection(patches.mean(1)), dim=-1)

    def text_states(self, tokens: Tokens) -> Tensor:
        output = self.text(input_ids=tokens.ids, attention_mask=tokens.valid.long())
        states: Tensor = output.last_hidden_state
        return states

    def token_similarities(self, states: Tensor, tokens: Tokens, patches: Tensor) -> Tensor:
        """[captions, images]: the mean over a caption's words of its best patch."""
        words = tokens.valid.clone()
        words[:, 0] = False
        words[torch.arange(len(words)), tokens.valid.sum(1) - 1] = False
        flat_words = functional.normalize(self.token_projection(states[words]), dim=-1)
        flat_patches = functional.normalize(self.patch_projection(patches), dim=-1).flatten(0, 1)
        best = (flat_words @ flat_patches.T).unflatten(1, patches.shape[:2]).amax(-1)
        sums = best.new_zeros(len(words), len(patches)).index_add(0, words.nonzero()[:, 0], best)
        return sums / words.sum(1, keepdim=True)

    def forward(self, images: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        """-> the losses by name."""
        states, patches = self.text_states(tokens), self.image(images)
        scales = self.log_scales.exp().clamp(max=100)
        captions = scales[0] * self.caption_embeddings(states, tokens) @ self.image_embeddings(patches).T
        words = scales[1] * self.token_similarities(states, tokens, patches)
        follows = tokens.valid[:, 1:]
        return {
            "captions": info_nce(captions),
            "tokens": info_nce(words),
            "word": functional.cross_entropy(self.word_head(states[tokens.valid]), tokens.ids[tokens.valid]),
            "previous": functional.cross_entropy(
                self.previous_head(states[:, 1:][follows]), tokens.ids[:, :-1][follows]
            ),
        }


def info_nce(logits: Tensor) -> Tensor:
    """logits: [B, B], matches on the diagonal -> the mean of both directions' cross-entropies."""
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tokens:
    encoded = tokenizer(captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return Tokens(encoded["input_ids"], encoded["attention_mask"].bool())


def draw_captions(captions: list[list[str]], indices: list[int], rng: torch.Generator) -> list[str]:
    picks = torch.rand(len(indices), generator=rng).tolist()
    return [captions[index][int(pick * len(captions[index]))] for index, pick in zip(indices, picks, strict=True)]


def train(args: argparse.Namespace, data: Captioned, tokenizer: CLIPTokenizer, config: CLIPTextConfig) -> Contrast:
    """Continues from the state beside the output, if there is one."""
    torch.manual_seed(derive_seed(args.seed, "clip", "init"))  # layer initialisers know no other generator
    model = Contrast(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    settings = resumable_settings(args)
    start = continue_training(state_file(args.output), settings, model, optimizer)
    began = time.time()
    for step in range(start, args.steps):
        rng = generator(args.seed, "clip", "step", step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        indices = batch_indices(step, len(data.images), args.batch_size, args.seed, "clip")
        tokens = tokenize(tokenizer, draw_captions(data.captions, indices.tolist(), rng))
        losses = model(to_float(data.images[indices]), tokens)
        loss = losses["captions"] + losses["tokens"] + args.word_weight * (losses["word"] + losses["previous"])
        take_step(model, optimizer, loss)
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}: {losses}")
            numbers = " ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"step {done}/{args.steps} {numbers} {(time.time() - began) / (done - start):.3f} s/step", flush=True)
        if done % args.save_freq == 0 and done < args.steps:
            parts: dict[str, dict[str, Any]] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_file(args.output), settings, done, **parts)
    return model.eval()


def resumable_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with the one that was cut off."""
    free = {"data", "output", "save_freq", "log_freq", "overwrite", "debug"}
    return {key: value for key, value in vars(args).items() if key not in free}


@torch.no_grad()
def retrieval(model: Contrast, tokenizer: CLIPTokenizer, data: Captioned) -> str:
    """How often, among all held-out pairs, the right one comes first or within five. One caption an image."""
    tokens = tokenize(tokenizer, [captions[0] for captions in data.captions])
    states, patches = model.text_states(tokens), model.image(to_float(data.images))
    scores = {
        "captions": model.caption_embeddings(states, tokens) @ model.image_embeddings(patches).T,
        "tokens": model.token_similarities(states, tokens, patches),
    }
    lines = []
    for name, score in scores.items():
        rank = (score > score.diagonal()[:, None]).sum(1)
        lines.append(f"{name} to images R@1 {(rank < 1).float().mean():.3f} R@5 {(rank < 5).float().mean():.3f}")
    return f"held-out retrieval among {len(data.images)}: " + "; ".join(lines)


def probe(encoder: ClipTextEncoder, captions: list[str]) -> str:
    """How well a linear map reads, off a word's state, that word and the one before it (two thirds fit, a third test).

    Words with a context of their own ("green apple"): those that follow another word than an article, sign or BOS.
    """
    states, words, previous = [], [], []
    skipped = set(encoder.tokenizer.convert_tokens_to_ids(["a</w>", "an</w>", "the</w>", ",</w>", "and</w>"]))
    for caption, row in zip(captions, encoder.tokenize(captions), strict=True):
        (state,) = encoder.encode([caption])
        for place in range(2, len(row) - 1):
            if row[place] not in skipped and row[place - 1] not in skipped:
                states.append(state[place])
                words.append(row[place])
                previous.append(row[place - 1])
    features = torch.cat([torch.stack(states), torch.ones(len(states), 1)], dim=1)
    cut = len(states) * 2 // 3
    results = []
    for name, labels in (("own word", torch.tensor(words)), ("word before", torch.tensor(previous))):
        classes, index = labels.unique(return_inverse=True)
        target = functional.one_hot(index, len(classes)).float()
        gram = features[:cut].T @ features[:cut] + 0.01 * cut * torch.eye(features.shape[1]) / features.shape[1]
        weights = torch.linalg.solve(gram, features[:cut].T @ target[:cut])
        accuracy = ((features[cut:] @ weights).argmax(1) == index[cut:]).float().mean()
        results.append(f"{name} {accuracy:.3f} of {len(classes)} classes")
    return f"linear probe of token states: {', '.join(results)} ({len(states) - cut} tests)"


def save(model: CLIPTextModel, tokenizer: CLIPTokenizer, output: Path) -> None:
    """Writes beside `output` and renames, so that a directory of that name is always whole."""
    partial = output.with_name(output.name + ".tmp")
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial, MAX_TOKENS)
    output.mkdir(exist_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, output / path.name)
    partial.rmdir()


def text_config(tokenizer: CLIPTokenizer, width: int, depth: int, dropout: float = 0.0) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        attention_dropout=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if (args.output / "model.safetensors").is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    data = load_captioned(args.data, "train2017", args.max_images)
    held_out = load_captioned(args.data, "val2017", args.max_images)
    tokenizer = build_tokenizer(caption for captions in data.captions for caption in captions)
    config = text_config(tokenizer, args.width, args.depth)
    print(f"{len(tokenizer)} tokens, {len(data.images)} images", flush=True)
    model = train(args, data, tokenizer, config)
    save(model.text, tokenizer, args.output)
    state_file(args.output).unlink(missing_ok=True)
    print(retrieval(model, tokenizer, held_out))
    encoder = ClipTextEncoder.load(args.output)
    print(probe(encoder, [captions[0] for captions in held_out.captions]))
    states = torch.cat(encoder.encode([captions[0] for captions in held_out.captions[:100]]))
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**20
    print(f"states: std {states.std():.3f}, mean {states.mean():.3f}, largest {states.abs().max():.2f}")
    num_parameters = sum(parameter.numel() for parameter in model.text.parameters())
    print(f"{args.output}: {size:.2f} MiB, {num_parameters:,} parameters, id {encoder.id}")
