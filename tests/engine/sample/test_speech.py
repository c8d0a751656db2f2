"""engine/sample/speech.py: a WAV file's words, its errors, and what a latency report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.sample.speech import PARTS, Latency, transcribe
from tests.helpers.speech_files import tones, write_wav
from util.wav import Sound


class Listener:
    """Writes down what it is given and hears `text` in it."""

    sampling_rate = 16000

    def __init__(self, text: str) -> None:
        self.text = text
        self.sounds: list[Sound] = []

    def transcribe(self, sound: Sound) -> str:
        self.sounds.append(sound)
        if sound.seconds > 1:
            raise ValueError("too long")
        return self.text


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_the_recogniser_gets_its_own_rate(tmp_path: Path, rate: int) -> None:
    listener = Listener("a red dog")
    path = write_wav(tmp_path / "a.wav", np.stack([tones(0.5, rate)] * 2, axis=1), rate)
    assert transcribe(path, listener) == "a red dog"
    (sound,) = listener.sounds
    assert sound.rate == 16000 and abs(len(sound.samples) - 8000) <= 1
    assert np.abs(sound.samples[:7999] - tones(0.5, 16000)[:7999]).max() < 0.01


@pytest.mark.parametrize("text", ["", "  "])
def test_no_words_are_an_error(tmp_path: Path, text: str) -> None:
    path = write_wav(tmp_path / "a.wav", tones(0.5, 16000))
    with pytest.raises(ValueError, match=rf"no words were heard in the 0\.50 s of speech file {path}"):
        transcribe(path, Listener(text))


def test_what_the_recogniser_refuses_is_told_with_the_file(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tones(1.5, 16000))
    with pytest.raises(ValueError, match=f"speech file {path}: too long"):
        transcribe(path, Listener("a"))


def run_of(*seconds: float) -> dict[str, float]:
    return dict(zip(PARTS, seconds, strict=True))


def test_medians_are_of_each_part_and_of_the_whole() -> None:
    runs = (run_of(1, 0, 0, 5, 0), run_of(2, 0, 0, 1, 0), run_of(9, 0, 0, 2, 0))
    latency = Latency(runs, speech=4.0, images=1, iterations=8, device="cpu")
    assert latency.parts == run_of(2, 0, 0, 2, 0)
    assert (latency.total, latency.real_time_factor) == (6, 1.5)
    head, *lines = latency.table().splitlines()
    assert head == "from speech to 1 image on cpu, seconds, median of 3 warm runs:"
    assert [line.split()[0] for line in lines] == [*PARTS, "total"]
    assert lines[3].endswith("8 iterations") and lines[-1].endswith("real-time factor 1.50")


@pytest.mark.parametrize("runs", [(), ({"audio": 1.0},)])
def test_a_report_without_all_parts_is_refused(runs: tuple[dict[str, float], ...]) -> None:
    with pytest.raises(ValueError, match="every run has the parts"):
        Latency(runs, 1.0, 1, 8, "cpu")
