"""From a spoken caption to pictures: its words, and how long each part of the way takes.

audio (read, resample) -> asr -> text (encode the caption) -> passes (the sampler) -> decode -> pictures
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.data.scenes import Scene
from engine.sample.generate import image_generator, scene_conditions
from engine.sample.pipeline import StructMARPipeline
from models.frozen.speech import Transcriber
from models.sampling.config import SamplingConfig
from util.read import short_path
from util.wav import Sound, read_wav, resampled

PARTS = ("audio", "asr", "text", "passes", "decode")


def read_speech(path: str | Path, transcriber: Transcriber) -> Sound:
    """A WAV file as the transcriber takes it. Raises FileNotFoundError or ValueError naming the file."""
    return resampled(read_wav(path, "speech file"), transcriber.sampling_rate)


def words_of(sound: Sound, transcriber: Transcriber, path: str | Path) -> str:
    """Raises ValueError naming the file if it is too short or long, or no word is heard in it."""
    try:
        text = transcriber.transcribe(sound)
    except ValueError as error:
        raise ValueError(f"speech file {short_path(path)}: {error}") from error
    if not text.strip():
        raise ValueError(f"no words were heard in the {sound.seconds:.2f} s of speech file {short_path(path)}")
    return text


def transcribe(path: str | Path, transcriber: Transcriber) -> str:
    """The caption that a WAV file says, for `pipe(prompt)`. Raises FileNotFoundError or ValueError naming the file."""
    return words_of(read_speech(path, transcriber), transcriber, path)


@dataclass(frozen=True)
class Latency:
    """Seconds of each part, run by run. speech: seconds of sound. images: pictures that each run makes."""

    runs: tuple[dict[str, float], ...]
    speech: float
    images: int
    iterations: int
    device: str

    def __post_init__(self) -> None:
        if not self.runs or any(tuple(run) != PARTS for run in self.runs):
            raise ValueError(f"every run has the parts {PARTS}, got {[tuple(run) for run in self.runs]}")

    @property
    def parts(self) -> dict[str, float]:
        """The median seconds of each part."""
        return {part: statistics.median(run[part] for run in self.runs) for part in PARTS}

    @property
    def total(self) -> float:
        """The median of the runs' sums, which need not be the sum of the parts' medians."""
        return statistics.median(sum(run.values()) for run in self.runs)

    @property
    def real_time_factor(self) -> float:
        """Seconds a run takes for each second of speech."""
        return self.total / self.speech

    def table(self) -> str:
        """What a user reads: one line a part."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        runs = "one warm run" if len(self.runs) == 1 else f"median of {len(self.runs)} warm runs"
        notes = {"audio": f"{self.speech:.2f} s of speech", "passes": f"{self.iterations} iterations"}
        lines = [f"from speech to {images} on {self.device}, seconds, {runs}:"]
        for name, seconds in {**self.parts, "total": self.total}.items():
            note = f"real-time factor {self.real_time_factor:.2f}" if name == "total" else notes.get(name, "")
            lines.append(f"  {name:<7}{seconds:9.4f}  {note}".rstrip())
        return "\n".join(lines)


@torch.no_grad()
def measure_latency(
    pipe: StructMARPipeline,
    transcriber: Transcriber,
    path: str | Path,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    config: SamplingConfig,
    precision: str,
    repeats: int,
) -> Latency:
    """Goes the whole way `repeats` times for one batch of scenes, whose prompts are the transcript.

    The caller has gone it once before for as many scenes: what only the first run pays is not counted.
    """
    device = pipe.codec.device
    runs = []
    for _ in range(repeats):
        clock = _Clock(device)
        sound = read_speech(path, transcriber)
        clock.lap("audio")
        words_of(sound, transcriber, path)
        clock.lap("asr")
        conditions = scene_conditions(pipe.model, pipe.caption_encoder, scenes, config)
        clock.lap("text")
        latents = pipe.sample(conditions, config, [image_generator(seed) for seed in seeds], precision).latents
        clock.lap("passes")
        pipe.pictures(latents)
        clock.lap("decode")
        runs.append(clock.laps)
    return Latency(tuple(runs), sound.seconds, len(scenes), config.num_iter, str(device))


class _Clock:
    """Seconds from lap to lap, each waiting for what the device still has to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        self._start = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name], self._start = now - self._start, now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
