"""A small CLIP tokenizer: byte-level BPE whose merges are learned from captions until every frequent word is one token.

It has CLIP's own rules (lower case, words apart from digits and signs, "</w>" at a word's end) and files, so any text
can be tokenised: unknown words fall into pieces, down to bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

BOS, EOS, END = "<|startoftext|>", "<|endoftext|>", "</w>"
Pair = tuple[str, str]


def byte_alphabet() -> list[str]:
    """One printable character per byte, the convention of byte-level BPE: printable bytes are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = (chr(256 + index) for index in range(256 - len(printable)))
    return [chr(byte) if byte in printable else next(shifted) for byte in range(256)]


def count_words(captions: Iterable[str], tokenizer: CLIPTokenizer) -> Counter[str]:
    """How often each word occurs, split and spelled (bytes as characters) as the tokenizer does it."""
    backend = tokenizer.backend_tokenizer
    words: Counter[str] = Counter()
    for caption, count in Counter(captions).items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption)):
            words[word] += count
    return words


def learn_merges(words: Counter[str], min_count: int) -> list[Pair]:
    """Byte-pair merges, most frequent first (ties by spelling), until each word seen `min_count` times is one token."""
    pieces = {word: [*word[:-1], word[-1] + END] for word, count in words.items() if count >= min_count}
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: apply_merge(parts, best) for word, parts in pieces.items()}


def apply_merge(parts: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_tokenizer(captions: Iterable[str], min_count: int = 20) -> CLIPTokenizer:
    """The tokenizer whose vocabulary is: bytes, bytes ending a word, merges, BOS, EOS."""
    alphabet = byte_alphabet()
    base = [*alphabet, *(character + END for character in alphabet)]
    untrained = CLIPTokenizer(vocab={token: index for index, token in enumerate([*base, BOS, EOS])}, merges=[])
    merges = learn_merges(count_words(captions, untrained), min_count)
    tokens = list(dict.fromkeys([*base, *(left + right for left, right in merges), BOS, EOS]))
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def save_tokenizer(tokenizer: CLIPTokenizer, directory: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and its config, and the same as vocab.json and merges.txt, the files of older CLIPs."""
    tokenizer.model_max_length = max_tokens
    tokenizer.save_pretrained(directory)
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
