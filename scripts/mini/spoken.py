"""Captions read aloud by espeak-ng in many voice settings, and how wrong a recogniser's words are."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.wav import Sound, read_wav

PROGRAM = "espeak-ng"
LANGUAGES = ("en-us", "en-gb", "en-gb-x-rp", "en-us-nyc")
TIMBRES = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+f1", "+f2", "+f3", "+f5")
SPEEDS, PITCHES = (130, 190), (25, 75)
_SECONDS = 60  # for one caption, which takes a tenth of one


@dataclass(frozen=True)
class Voice:
    """name: espeak-ng's language and, after a plus, its timbre. speed: words a minute. pitch: 0 to 99."""

    name: str
    speed: int = 160
    pitch: int = 50


HELD_OUT = {
    "timbre m7": Voice("en-us+m7"),
    "timbre f4": Voice("en-us+f4", speed=150, pitch=45),
    "Scottish accent": Voice("en-gb-scotland+m3"),
}
"""None of these timbres and this accent is in any voice of `draw_voice`."""


def draw_voice(rng: np.random.Generator) -> Voice:
    """A voice setting to train on."""
    name = str(rng.choice(LANGUAGES)) + str(rng.choice(TIMBRES))
    return Voice(name, int(rng.integers(SPEEDS[0], SPEEDS[1] + 1)), int(rng.integers(PITCHES[0], PITCHES[1] + 1)))


def require_espeak() -> None:
    """Raises ValueError, one line with the command that installs it, where espeak-ng is missing."""
    if shutil.which(PROGRAM) is None:
        raise ValueError(
            f"the voice is the program {PROGRAM}, which is not there; install it: apt-get install {PROGRAM}"
        )


def speak(text: str, voice: Voice) -> Sound:
    """The text read aloud, at espeak-ng's own rate. Raises ValueError with what espeak-ng says if it cannot."""
    require_espeak()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        options = ["-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "-w", str(path)]
        finished = subprocess.run(
            [PROGRAM, *options, "--", text], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if finished.returncode or not path.is_file():
            raise ValueError(f"{PROGRAM} cannot say {text!r} with {voice}: {finished.stderr.strip()}")
        return read_wav(path, "spoken caption")


def words_of(text: str) -> list[str]:
    """Its words, without the marks between them."""
    return "".join(mark if mark.isalnum() else " " for mark in text.lower()).split()


def word_errors(heard: Sequence[str], said: Sequence[str]) -> int:
    """The fewest words to add, drop and exchange that make one of the other."""
    row = list(range(len(said) + 1))
    for number, word in enumerate(heard, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(said, 1):
            best = min(row[place] + 1, row[place - 1] + 1, before + (word != other))
            before, row[place] = row[place], best
    return row[-1]


def word_error_rate(heard: Sequence[str], said: Sequence[str]) -> float:
    """Word errors over all texts, divided by the words that were said. ValueError if no word was said."""
    total = sum(len(words_of(text)) for text in said)
    if not total:
        raise ValueError(f"a rate needs words that were said, got none in {len(said)} texts")
    pairs = zip(heard, said, strict=True)
    return sum(word_errors(words_of(found), words_of(true)) for found, true in pairs) / total
