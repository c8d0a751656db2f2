"""Sound files: a WAV file becomes mono float samples, at the rate that somebody asks for.

Read are PCM of 8, 16, 24 and 32 bits and float of 32 and 64, also in the extensible layout. Whatever else a file holds
is refused with what it holds and what is read. Left out: compressed sound, and every other container.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from util.read import read_bytes, require_regular_file, short_path

MAX_BYTES = 2**28  # of a file: it is read as a whole
MIN_RATE, MAX_RATE = 1000, 384_000  # Hz
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_KINDS = {_PCM: "PCM", 2: "ADPCM", _FLOAT: "float", 6: "A-law", 7: "mu-law", 0x55: "MP3"}
_READABLE = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
_READABLE_IN_WORDS = "8, 16, 24 or 32-bit PCM, 32 or 64-bit float"
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")  # of every extensible format that has a number
_LENGTH_UNKNOWN = 0x7FFFF000  # from here on: a program that wrote into a pipe could not tell the length


@dataclass(frozen=True)
class Sound:
    """samples: float32 [n], mono, full scale is 1. rate: samples a second."""

    samples: NDArray[np.float32]
    rate: int

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.dtype != np.float32 or not len(self.samples):
            found = f"{self.samples.dtype} {self.samples.shape}"
            raise ValueError(f"samples must be float32 [n] with n above 0, got {found}")
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise ValueError(f"rate must lie in {MIN_RATE} ... {MAX_RATE} Hz, got {self.rate}")

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class _Format:
    """The file's fmt chunk. kind: PCM or float, by number."""

    kind: int
    channels: int
    rate: int
    block: int
    bits: int


def read_wav(path: str | Path, what: str = "sound file") -> Sound:
    """The sound of a WAV file; several channels are mixed to their mean.

    Raises FileNotFoundError or ValueError that begin with `what` and the path and name what was found.
    """
    name = f"{what} {short_path(path)}"
    size = require_regular_file(path, what).st_size
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size} bytes, at most {MAX_BYTES} are read")
    layout, data = _chunks(read_bytes(path, what), name)
    if not data:
        raise ValueError(f"{name} holds 0 samples")
    if len(data) % layout.block:
        raise ValueError(f"{name} has {len(data)} bytes of samples, no multiple of the {layout.block} of one instant")
    channels = _samples(data, layout).reshape(-1, layout.channels)  # [n, channels]
    if not np.isfinite(channels).all():
        raise ValueError(f"{name} holds samples that are not finite")
    return Sound(channels.mean(axis=1).astype(np.float32), layout.rate)


def resampled(sound: Sound, rate: int) -> Sound:
    """The same sound at another rate, n becomes ceil(n * rate / sound.rate); a sound of that rate is given back."""
    if rate == sound.rate:
        return sound
    common = gcd(rate, sound.rate)
    samples = resample_poly(sound.samples, rate // common, sound.rate // common)  # [n']
    return Sound(np.asarray(samples, dtype=np.float32), rate)


def _chunks(content: bytes, name: str) -> tuple[_Format, bytes]:
    """The format and the bytes of the samples."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        found = f"{content[:4]!r} and {content[8:12]!r}" if content else "nothing"
        raise ValueError(f"{name} is no WAV file: b'RIFF' and b'WAVE' must stand at its begin, got {found}")
    layout, start = None, 12
    while start + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, start)
        body = content[start + 8 : start + 8 + size]
        if chunk == b"data" and size >= _LENGTH_UNKNOWN:
            size = len(body)
        if len(body) < size and chunk in (b"fmt ", b"data"):
            raise ValueError(f"{name} is cut off: its chunk '{chunk.decode()}' has {size} bytes, {len(body)} are there")
        if chunk == b"fmt ":
            layout = _format(body, name)
        elif chunk == b"data":
            if layout is None:
                raise ValueError(f"{name} has samples before it says their format")
            return layout, body
        start += 8 + size + size % 2
    raise ValueError(
        f"{name} has no {'samples' if layout else 'format'}: its chunk '{'data' if layout else 'fmt '}' is missing"
    )


def _format(body: bytes, name: str) -> _Format:
    if len(body) < 16:
        raise ValueError(f"{name} has a format of {len(body)} bytes, at least 16 are needed")
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", body)
    if kind == _EXTENSIBLE and len(body) >= 40 and body[26:40] == _GUID_TAIL:
        kind = struct.unpack_from("<H", body, 24)[0]
    if (kind, bits) not in _READABLE:
        found = f"{bits}-bit {_KINDS.get(kind, f'format 0x{kind:04x}')}"
        raise ValueError(f"{name} holds {found}, read are {_READABLE_IN_WORDS}")
    if not channels or block != channels * bits // 8:
        raise ValueError(f"{name} has {channels} channels of {bits} bits in {block} bytes, these do not fit")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"{name} has {rate} samples a second, read are {MIN_RATE} ... {MAX_RATE}")
    return _Format(kind, channels, rate, block, bits)


def _samples(data: bytes, layout: _Format) -> NDArray[np.float64]:
    """All channels in turn, full scale is 1: [n * channels]."""
    if layout.kind == _FLOAT:
        return np.frombuffer(data, f"<f{layout.bits // 8}").astype(np.float64)
    if layout.bits == 8:  # the only unsigned one
        return np.frombuffer(data, np.uint8) / 128 - 1
    if layout.bits == 24:  # as the upper bytes of 32
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2**31
    return np.frombuffer(data, f"<i{layout.bits // 8}") / 2 ** (layout.bits - 1)
