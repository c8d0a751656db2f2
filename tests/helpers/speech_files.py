"""WAV files in every encoding, and a random recogniser in a folder, made without the code that reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from tests.helpers.clip_files import BYTES

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def fmt(kind: int, bits: int, rate: int = 16000, channels: int = 1, extensible: bool = False) -> bytes:
    block = channels * bits // 8
    head = (channels, rate, rate * block, block, bits)
    if not extensible:
        return struct.pack("<HHIIHH", kind, *head)
    tail = struct.pack("<HHIH", 22, bits, 0, kind) + GUID_TAIL
    return struct.pack("<HHIIHH", 0xFFFE, *head) + tail


def riff(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(samples: NDArray[np.float64], kind: int, bits: int) -> bytes:
    """Samples in [-1, 1) as a data chunk holds them."""
    if kind == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    whole = np.round(samples * 2 ** (bits - 1)).astype(np.int64)
    if bits == 8:
        return (whole + 128).astype(np.uint8).tobytes()
    return b"".join(int(each).to_bytes(bits // 8, "little", signed=True) for each in whole)


def write_wav(
    path: Path,
    samples: NDArray[np.float64],
    rate: int = 16000,
    kind: int = 1,
    bits: int = 16,
    extensible: bool = False,
) -> Path:
    """samples: [n] or [n, channels] in [-1, 1)."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    data = encoded(samples.reshape(-1), kind, bits)
    path.write_bytes(riff(chunk(b"fmt ", fmt(kind, bits, rate, channels, extensible)), chunk(b"data", data)))
    return path


def tones(seconds: float, rate: int, frequencies: tuple[float, ...] = (220.0, 1310.0)) -> NDArray[np.float64]:
    """The same sound at any rate: [n], at most 0.8."""
    time = np.arange(round(seconds * rate)) / rate
    fade = np.sin(np.pi * time / seconds) ** 2
    return fade * 0.8 * np.mean([np.sin(2 * np.pi * each * time) for each in frequencies], axis=0)


def write_recogniser(folder: Path, always: str | None = None) -> Path:
    """A random Wav2Vec2 with a CTC head over letters, as a Hugging Face directory. always: the token that it hears at
    every instant; None: whatever its random weights say."""
    folder.mkdir(parents=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=False).save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 8, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wav2Vec2ForCTC(config)
        torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    if always is not None:
        model.lm_head.weight.data.zero_()
        model.lm_head.bias.data = torch.eye(len(tokens))[tokens.index(always)]
    model.save_pretrained(folder)
    return folder


def write_whisper(folder: Path) -> Path:
    """A random Whisper for English, which writes bytes, as a Hugging Face directory."""
    folder.mkdir(parents=True)
    end = len(BYTES)
    tokenizer = WhisperTokenizer(
        vocab={token: index for index, token in enumerate([*BYTES, "<|endoftext|>"])}, merges=[]
    )
    tokenizer.add_tokens([f"<|{name}|>" for name in SPECIAL], special_tokens=True)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(
            WhisperConfig(vocab_size=len(tokenizer), d_model=16, max_target_positions=32, **sizes, **ids)
        )
    model.generation_config = GenerationConfig(
        **ids, no_timestamps_token_id=len(tokenizer) - 1, is_multilingual=False, max_length=12
    )
    model.save_pretrained(folder)
    return folder
