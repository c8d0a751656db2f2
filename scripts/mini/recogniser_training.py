"""The training of scripts/mini/train_recogniser.py, which says what it does.

Shape letters: B batch, t frames of 20 ms, F mel features of a frame, n letters of a caption.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2CTCTokenizer,
)

from models.frozen.speech import PipelineTranscriber
from scripts.mini.spoken import HELD_OUT, Voice, draw_voice, require_espeak, speak, word_error_rate
from scripts.mini.training import batch_indices, continue_training, learning_rate, save_state, state_file, take_step
from util.rng import derive_seed, generator
from util.wav import resampled

RATE = 16000  # Hz
MELS = 80
PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
POOL = 8  # steps
RESULT_NAME = "word_errors.json"
HIDDEN_FRAMES, HIDDEN_MELS = 12, 12  # at most, of each of the stretches that a training sound loses


@dataclass(frozen=True)
class Said:
    """A caption read aloud. features: [t, F] float16. labels: [n] int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """features: [B, t, F]. valid: int64 [B, t]. labels: int64 [B, n], -100 where a caption has ended."""

    features: Tensor
    valid: Tensor
    labels: Tensor


def load_captions(root: Path, split: str) -> list[str]:
    """Every different caption of a split, in its order. Raises FileNotFoundError if the dataset is not there."""
    path = root / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no captions in {path}: make them with python -m scripts.mini.make_dataset")
    content = json.loads(path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(entry["caption"].lower() for entry in content["annotations"]))


def pick(captions: Sequence[str], number: int, seed: int, purpose: str) -> list[str]:
    """`number` of the captions, all different. Raises ValueError if there are fewer."""
    if number > len(captions):
        raise ValueError(
            f"{number} captions were asked for, the dataset has {len(captions)} different ones ({purpose})"
        )
    order = torch.randperm(len(captions), generator=generator(seed, "recogniser", purpose))  # [captions]
    return [captions[index] for index in order[:number].tolist()]


def build_tokenizer(captions: Iterable[str], folder: Path) -> Wav2Vec2CTCTokenizer:
    """One token for each character of the captions; written into `folder` on the way."""
    characters = sorted(set("".join(captions)) - {" "})
    tokens = [PAD, UNKNOWN, SPACE, *characters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token=PAD, unk_token=UNKNOWN, word_delimiter_token=SPACE,
        bos_token=None, eos_token=None,
    )  # fmt: skip


def build_model(vocab_size: int, width: int, depth: int, seed: int) -> Wav2Vec2BertForCTC:
    """From the seed alone; nothing in it is random afterwards, in training either."""
    config = Wav2Vec2BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * width,
        feature_projection_input_dim=2 * MELS,
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=15,
        conformer_conv_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "recogniser", "init"))  # layer initialisers know no other generator
        return Wav2Vec2BertForCTC(config)


def mel_features(extractor: SeamlessM4TFeatureExtractor, samples: np.ndarray) -> Tensor:
    """As the pipeline makes them of one sound: [t, F]."""
    made = extractor(samples, sampling_rate=RATE, return_tensors="pt")
    features: Tensor = made["input_features"][0][made["attention_mask"][0].bool()]  # [t, F]
    return features


def read_aloud(
    captions: Sequence[str], extractor: SeamlessM4TFeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer, seed: int
) -> list[Said]:
    """Each caption in a voice of its own. Raises ValueError if espeak-ng is missing or cannot."""
    said = []
    for index, caption in enumerate(captions):
        voice = draw_voice(np.random.default_rng((derive_seed(seed, "recogniser", "voice"), index)))
        sound = resampled(speak(caption, voice), RATE)
        labels = torch.tensor(tokenizer(caption)["input_ids"])  # [n]
        said.append(Said(mel_features(extractor, sound.samples).half(), labels))
        if (index + 1) % 500 == 0:
            print(f"read aloud {index + 1}/{len(captions)}", flush=True)
    return said


def alike_in_length(step: int, said: Sequence[Said], batch_size: int, seed: int) -> list[int]:
    """The captions of a step, a function of its arguments alone: every `POOL` steps share out as many batches by their
    length, so that little is padded. Few captions are one pool."""
    size = min(POOL, len(said) // batch_size) * batch_size
    pool = batch_indices(step // POOL, len(said), max(size, batch_size), seed, "recogniser").tolist()
    pool.sort(key=lambda index: (len(said[index].features), index))
    turn = step % POOL % max(1, size // batch_size)
    return pool[turn * batch_size : (turn + 1) * batch_size]


def batch_of(items: Sequence[Said], rng: torch.Generator) -> Batch:
    """Padded, and with two stretches of time and two of mel bands hidden (set to their mean, 0) in each sound."""
    lengths = [len(item.features) for item in items]
    features = torch.zeros(len(items), max(lengths), 2 * MELS)  # [B, t, F]
    valid = torch.zeros(len(items), max(lengths), dtype=torch.int64)  # [B, t]
    for row, item in enumerate(items):
        features[row, : lengths[row]] = item.features.float()  # [t, F]
        valid[row, : lengths[row]] = 1  # [t]
        mels = features[row].view(-1, 2, MELS)  # [t, 2, F / 2]
        for _ in range(2):
            start, size = _stretch(lengths[row], HIDDEN_FRAMES, rng)
            features[row, start : start + size] = 0  # [size, F]
            start, size = _stretch(MELS, HIDDEN_MELS, rng)
            mels[:, :, start : start + size] = 0  # [t, 2, size]
    width = max(len(item.labels) for item in items)
    rows = [functional.pad(item.labels, (0, width - len(item.labels)), value=-100) for item in items]  # B of [n]
    return Batch(features, valid, torch.stack(rows))  # [B, n]


def _stretch(length: int, most: int, rng: torch.Generator) -> tuple[int, int]:
    size = int(torch.randint(0, most + 1, (), generator=rng))
    return int(torch.randint(0, max(1, length - size + 1), (), generator=rng)), size


def train(args: argparse.Namespace, said: Sequence[Said], vocab_size: int) -> Wav2Vec2BertForCTC:
    """Continues from the state beside the output, if there is one."""
    model = build_model(vocab_size, args.width, args.depth, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    settings = resumable_settings(args)
    start = continue_training(state_file(args.output), settings, model, optimizer)
    began = time.time()
    model.train()
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        rng = generator(args.seed, "recogniser", "step", step)
        batch = batch_of([said[index] for index in alike_in_length(step, said, args.batch_size, args.seed)], rng)
        loss = model(batch.features, attention_mask=batch.valid, labels=batch.labels).loss
        take_step(model, optimizer, loss)
        done = step + 1
        if done % args.log_freq == 0 or done == args.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            print(f"step {done}/{args.steps} CTC {loss.item():.4f} {(time.time() - began) / (done - start):.3f} s/step",
                  flush=True)  # fmt: skip
        if done % args.save_freq == 0 and done < args.steps:
            parts: dict[str, dict[str, Any]] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_file(args.output), settings, done, **parts)
    return model.eval()


def resumable_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a continued run must share with the one that was cut off."""
    free = {"data", "output", "num_held_out", "save_freq", "log_freq", "overwrite", "debug"}
    return {key: value for key, value in vars(args).items() if key not in free}


def measure(transcriber: PipelineTranscriber, captions: Sequence[str], voice: Voice) -> dict[str, Any]:
    """The word error rate of captions in a voice, through files' way into the pipeline; and the voice."""
    heard = [hear_once(transcriber, caption, voice) for caption in captions]
    exact = sum(found == caption for found, caption in zip(heard, captions, strict=True))
    rate = word_error_rate(heard, captions)
    return {**asdict(voice), "word_error_rate": rate, "exact": exact, "captions": len(captions)}


def hear_once(transcriber: PipelineTranscriber, caption: str, voice: Voice) -> str:
    """What is heard, "" where nothing is."""
    return transcriber.transcribe(resampled(speak(caption, voice), transcriber.sampling_rate))


def save(
    model: Wav2Vec2BertForCTC, tokenizer: Wav2Vec2CTCTokenizer, extractor: SeamlessM4TFeatureExtractor, output: Path
) -> None:
    """Half precision, written beside `output` and renamed, so that a directory of that name is always whole."""
    partial = output.with_name(output.name + ".tmp")
    partial.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    extractor.save_pretrained(partial)
    output.mkdir(exist_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, output / path.name)
    partial.rmdir()


def run(args: argparse.Namespace) -> None:
    """Trains, writes and measures, unless it is there already. Raises ValueError or FileNotFoundError."""
    if (args.output / "model.safetensors").is_file() and not args.overwrite:
        print(f"{args.output} is there already (--overwrite trains it again)")
        return
    require_espeak()
    held_out = pick(load_captions(args.data, "val2017"), args.num_held_out, args.seed, "held out")
    unseen = set(load_captions(args.data, "val2017"))
    captions = [each for each in load_captions(args.data, "train2017") if each not in unseen]
    captions = pick(captions, args.num_spoken, args.seed, "training")
    tokenizer = build_tokenizer(captions, args.output.with_name(args.output.name + ".tmp"))
    extractor = SeamlessM4TFeatureExtractor(feature_size=MELS, num_mel_bins=MELS, sampling_rate=RATE)
    said = read_aloud(captions, extractor, tokenizer, args.seed)
    print(f"{len(said)} captions, {sum(len(item.features) for item in said) / 50:.0f} s of speech", flush=True)
    model = train(args, said, len(tokenizer))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    save(model, tokenizer, extractor, args.output)
    state_file(args.output).unlink(missing_ok=True)
    transcriber = PipelineTranscriber.load(args.output)
    results = {name: measure(transcriber, held_out, voice) for name, voice in HELD_OUT.items()}
    (args.output / RESULT_NAME).write_text(json.dumps(results, indent=2) + "\n")
    for name, result in results.items():
        print(
            f"{name}: word error rate {result['word_error_rate']:.3f}, {result['exact']} of {result['captions']} exact"
        )
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**20
    print(f"{args.output}: {size:.2f} MiB, {num_parameters:,} parameters")
