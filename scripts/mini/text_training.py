"""The training of scripts/mini/train_text.py, which says what it does."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engine.plan.data import held_out, without_held_out
from models.frozen.text import ClipTextEncoder
from scripts.mini.clip_training import (
    MAX_TOKENS,
    Tokens,
    draw_captions,
    resumable_settings,
    save,
    text_config,
    tokenize,
)
from scripts.mini.tokenizer import build_tokenizer
from scripts.mini.training import batch_indices, continue_training, learning_rate, save_state, state_file, take_step
from util.coco import CocoIndex
from util.rng import derive_seed, generator


@dataclass(frozen=True)
class Labelled:
    """captions: n lists of strings. classes: [n, num_classes] float, 1 where the image has a box of the class."""

    captions: list[list[str]]
    classes: Tensor

    @staticmethod
    def of(index: CocoIndex) -> Labelled:
        classes = torch.zeros(len(index), len(index.categories))
        for row, image in enumerate(index.images):
            classes[row, torch.from_numpy(image.categories)] = 1
        return Labelled([list(image.captions) for image in index.images], classes)


class Reader(nn.Module):
    """Text encoder and the heads that it learns by."""

    def __init__(self, config: CLIPTextConfig, num_classes: int) -> None:
        super().__init__()
        self.text = CLIPTextModel(config)
        self.class_head = nn.Linear(config.hidden_size, num_classes)
        nn.init.constant_(self.class_head.bias, -4.0)  # most classes are in few images

    def class_logits(self, states: Tensor, tokens: Tokens) -> Tensor:
        """Of each caption [B, classes]: that of the token which says the class most."""
        scores: Tensor = self.class_head(states)
        return scores.masked_fill(~tokens.valid[..., None], -math.inf).amax(1)

    def forward(self, tokens: Tokens, classes: Tensor) -> Tensor:
        """The loss, summed over classes. classes: [B, classes]."""
        logits = self.class_logits(self.states(tokens), tokens)
        return functional.binary_cross_entropy_with_logits(logits, classes, reduction="sum") / len(classes)

    def states(self, tokens: Tokens) -> Tensor:
        states: Tensor = self.text(input_ids=tokens.ids, attention_mask=tokens.valid.long()).last_hidden_state
        return states


def train(args: argparse.Namespace, data: Labelled, tokenizer: CLIPTokenizer, config: CLIPTextConfig) -> Reader:
    """Continues from the state beside the output, if there is one."""
    torch.manual_seed(derive_seed(args.seed, "text", "init"))  # layer initialisers know no other generator
    model = Reader(config, data.classes.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    settings = resumable_settings(args)
    start = continue_training(state_file(args.output), settings, model, optimizer)
    began = time.time()
    for step in range(start, args.steps):
        rng = generator(args.seed, "text", "step", step)
        torch.manual_seed(derive_seed(args.seed, "text", "dropout", step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        indices = batch_indices(step, len(data.captions), args.batch_size, args.seed, "text")
        tokens = tokenize(tokenizer, draw_captions(data.captions, indices.tolist(), rng))
        loss = model(tokens, data.classes[indices])
        take_step(model, optimizer, loss)
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            seconds = (time.time() - began) / (done - start)
            print(f"step {done}/{args.steps} loss {loss.item():.4f} {seconds:.3f} s/step", flush=True)
        if done % args.save_freq == 0 and done < args.steps:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_file(args.output), settings, done, **parts)
    return model.eval()


@torch.no_grad()
def average_precision(model: Reader, tokenizer: CLIPTokenizer, data: Labelled) -> float:
    """Of (image, class) pairs ranked by the class's logit of the image's first caption, all classes together."""
    parts = [
        torch.sigmoid(model.class_logits(model.states(tokens), tokens))
        for first in range(0, len(data.captions), 256)
        for tokens in [tokenize(tokenizer, [each[0] for each in data.captions[first : first + 256]])]
    ]
    hits = data.classes.flatten()[torch.cat(parts).flatten().argsort(descending=True)]
    precisions = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precisions * hits).sum() / hits.sum())


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if (args.output / "model.safetensors").is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    index = CocoIndex.load(args.data, args.split)
    data = Labelled.of(without_held_out(index, args.held_out_every))
    captions = [caption for each in data.captions for caption in each]
    tokenizer = build_tokenizer(captions, args.min_count)
    config = text_config(tokenizer, args.width, args.depth, args.dropout)
    print(f"{len(tokenizer)} tokens, {len(captions)} captions of {len(data.captions)} images", flush=True)
    model = train(args, data, tokenizer, config)
    save(model.text, tokenizer, args.output)
    state_file(args.output).unlink(missing_ok=True)
    if args.held_out_every:
        precision = average_precision(model, tokenizer, Labelled.of(held_out(index, args.held_out_every)))
        print(f"average precision of classes on the images left out: {precision:.3f}")
    encoder = ClipTextEncoder.load(args.output)
    print(f"{args.output}: width {encoder.dim}, at most {min(encoder.max_tokens, MAX_TOKENS)} tokens, id {encoder.id}")
