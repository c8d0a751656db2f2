"""util/wav.py: one sound in many encodings, rates and layouts is one sound; everything else is refused by name."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.speech_files import chunk, fmt, riff, tones, write_wav
from util.wav import Sound, read_wav, resampled

ENCODINGS = [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)]
STEP = {8: 2**-7, 16: 2**-15, 24: 2**-23, 32: 2**-23, 64: 2**-23}  # of 32 bits and more, float32's own


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("kind", "bits"), ENCODINGS)
def test_a_sound_is_the_same_in_every_encoding(tmp_path: Path, kind: int, bits: int, extensible: bool) -> None:
    samples = tones(0.2, 16000)
    samples[:2] = -1, 1 - 2**-7  # both ends
    sound = read_wav(write_wav(tmp_path / "a.wav", samples, kind=kind, bits=bits, extensible=extensible))
    assert sound.samples.dtype == np.float32 and sound.rate == 16000 and sound.seconds == 0.2
    assert np.abs(sound.samples - samples).max() <= STEP[bits] / 2
    assert sound.samples[0] == -1


def test_what_pythons_own_module_writes_is_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<3h", 0, 16384, -32768))
    sound = read_wav(tmp_path / "a.wav")
    assert (sound.samples.tolist(), sound.rate) == ([0, 0.5, -1], 8000)


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_channels_are_mixed_to_their_mean(tmp_path: Path, bits: int) -> None:
    left, right = tones(0.1, 8000), tones(0.1, 8000, (500.0,))
    sound = read_wav(write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1), rate=8000, bits=bits))
    assert np.abs(sound.samples - (left + right) / 2).max() <= STEP[bits] / 2


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
def test_every_rate_becomes_the_same_sound(rate: int) -> None:
    wanted = tones(0.5, 16000)
    found = resampled(Sound(tones(0.5, rate).astype(np.float32), rate), 16000)
    assert found.rate == 16000 and found.samples.dtype == np.float32
    assert abs(len(found.samples) - len(wanted)) <= 1
    assert np.abs(found.samples[: len(wanted)] - wanted[: len(found.samples)]).max() < 0.01


def test_a_sound_of_the_rate_is_not_touched() -> None:
    sound = Sound(tones(0.1, 16000).astype(np.float32), 16000)
    assert resampled(sound, 16000) is sound


def test_chunks_beside_the_sound_are_skipped_and_pipes_are_read(tmp_path: Path) -> None:
    data = struct.pack("<2h", 100, -100)
    odd = chunk(b"LIST", b"odd")
    (tmp_path / "a.wav").write_bytes(riff(odd, chunk(b"fmt ", fmt(1, 16)), odd, chunk(b"data", data), odd))
    endless = b"data" + struct.pack("<I", 0x7FFFF000) + data
    (tmp_path / "b.wav").write_bytes(riff(chunk(b"fmt ", fmt(1, 16)), endless))
    for name in "ab":
        assert read_wav(tmp_path / f"{name}.wav").samples.tolist() == [100 / 2**15, -100 / 2**15]


FORMAT, TWO = chunk(b"fmt ", fmt(1, 16)), chunk(b"data", b"\0\0\0\0")
MISTAKES = {
    "empty file": (b"", "no WAV file: b'RIFF' and b'WAVE' must stand at its begin, got nothing"),
    "another file": (b"ID3\4" + b"mp3 " * 9, r"no WAV file: .* got b'ID3\\x04' and b'mp3 '"),
    "no samples": (riff(FORMAT, chunk(b"data", b"")), "holds 0 samples"),
    "no format": (riff(chunk(b"LIST", b"")), "has no format: its chunk 'fmt ' is missing"),
    "no data": (riff(FORMAT), "has no samples: its chunk 'data' is missing"),
    "samples first": (riff(TWO, FORMAT), "has samples before it says their format"),
    "short format": (riff(chunk(b"fmt ", b"\1\0")), "a format of 2 bytes, at least 16 are needed"),
    "cut off": (riff(FORMAT, TWO)[:-2], "is cut off: its chunk 'data' has 4 bytes, 2 are there"),
    "half a sample": (riff(FORMAT, chunk(b"data", b"\0\0\0")), "3 bytes of samples, no multiple of the 2"),
    "12 bits": (riff(chunk(b"fmt ", fmt(1, 12)), TWO), "holds 12-bit PCM, read are 8, 16, 24 or 32-bit PCM, 32 or 64"),
    "half floats": (riff(chunk(b"fmt ", fmt(3, 16)), TWO), "holds 16-bit float, read are"),
    "mu-law": (riff(chunk(b"fmt ", fmt(7, 8)), TWO), "holds 8-bit mu-law, read are"),
    "unknown": (riff(chunk(b"fmt ", fmt(0x1234, 16)), TWO), "holds 16-bit format 0x1234, read are"),
    "channels": (riff(chunk(b"fmt ", fmt(1, 16, channels=0)), TWO), "has 0 channels of 16 bits in 0 bytes"),
    "rate": (riff(chunk(b"fmt ", fmt(1, 16, rate=0)), TWO), r"has 0 samples a second, read are 1000 \.\.\. 384000"),
    "not finite": (
        riff(chunk(b"fmt ", fmt(3, 32)), chunk(b"data", struct.pack("<f", float("nan")))),
        "holds samples that are not finite",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_name_the_file_and_what_is_in_it(tmp_path: Path, case: str) -> None:
    content, message = MISTAKES[case]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_wav(path, "speech file")
    assert str(caught.value).startswith(f"speech file {path} ")


def test_a_missing_file_and_a_huge_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"speech file .*none\.wav does not exist"):
        read_wav(tmp_path / "none.wav", "speech file")
    monkeypatch.setattr("util.wav.MAX_BYTES", 40)
    with pytest.raises(ValueError, match="has 48 bytes, at most 40 are read"):
        read_wav(write_wav(tmp_path / "a.wav", np.zeros(2)))
