"""The frozen recogniser: the words of a spoken caption, by a speech model in a local Hugging Face directory.

    sound [n] at the model's rate -> transformers' pipeline "automatic-speech-recognition" -> text

Whisper and every model with a CTC head (Wav2Vec2, HuBERT, WavLM ...) are read, whole: a tensor that is missing is an
error. Nothing is ever downloaded. The pipeline gets samples at the rate it works at, so that it needs neither ffmpeg
nor torchaudio. Left out: language models beside CTC, sound longer than the 30 s that Whisper hears at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    Pipeline,
    pipeline,
)

from util.read import read_json, short_repr
from util.wav import Sound

MIN_SECONDS, MAX_SECONDS = 0.1, 30.0  # shorter than a model's first window; longer than Whisper's only one
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
WHISPER = "WhisperForConditionalGeneration"
WHERE_TO_GET = (
    "Get one from https://huggingface.co/openai/whisper-tiny or https://huggingface.co/facebook/wav2vec2-base-960h"
)
UNUSED_WITHOUT_TRAINING = ("masked_spec_embed",)  # what hides stretches of sound: public checkpoints may lack it
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


class Transcriber(Protocol):
    """Speech to text. sampling_rate: of the sounds it takes, in Hz."""

    @property
    def sampling_rate(self) -> int: ...

    def transcribe(self, sound: Sound) -> str:
        """The words as the recogniser spells them, "" where it hears none. ValueError for a sound it cannot take."""


class PipelineTranscriber:
    """A `Transcriber`: transformers' pipeline around a frozen model, in float32."""

    def __init__(self, recogniser: Pipeline) -> None:
        self.recogniser = recogniser
        self.recogniser.model.eval().requires_grad_(False)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device | str = "cpu") -> PipelineTranscriber:
        """Loads a local Hugging Face directory, strictly.

        Raises FileNotFoundError (a missing directory or file) and ValueError (another kind of model, files that do not
        fit one another), each naming the directory.
        """
        directory = Path(directory)
        architecture = require_recogniser(directory)
        kind = AutoModelForSpeechSeq2Seq if architecture == WHISPER else AutoModelForCTC
        try:
            features = AutoFeatureExtractor.from_pretrained(directory, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            with torch.random.fork_rng(devices=[]):  # values of tensors that are missing, an error below
                model, report = kind.from_pretrained(
                    directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except _UNREADABLE as error:
            raise ValueError(f"the recogniser in {directory} cannot be read: {error}") from error
        require_whole(report, directory)
        if len(tokenizer) > model.config.vocab_size:
            sizes = f"{len(tokenizer)} tokens, config.json has {model.config.vocab_size}"
            raise ValueError(f"the tokenizer in {directory} has {sizes}")
        task = "automatic-speech-recognition"
        device = torch.device(device)
        return cls(pipeline(task, model=model, feature_extractor=features, tokenizer=tokenizer, device=device))

    @property
    def sampling_rate(self) -> int:
        return int(self.recogniser.feature_extractor.sampling_rate)

    @torch.no_grad()
    def transcribe(self, sound: Sound) -> str:
        """Raises ValueError for another rate than `sampling_rate`, and outside `MIN_SECONDS` ... `MAX_SECONDS`."""
        if sound.rate != self.sampling_rate:
            raise ValueError(f"the recogniser takes {self.sampling_rate} samples a second, got {sound.rate}")
        if not MIN_SECONDS <= sound.seconds <= MAX_SECONDS:
            raise ValueError(f"a spoken caption lasts {MIN_SECONDS} ... {MAX_SECONDS} s, got {sound.seconds:.2f} s")
        said = self.recogniser({"raw": sound.samples, "sampling_rate": sound.rate})
        return " ".join(str(said["text"]).split())


def require_recogniser(directory: Path) -> str:
    """-> the name of the model's class. Raises FileNotFoundError or ValueError naming the directory and what it lacks
    or holds instead; the weights are not read."""
    if not directory.is_dir():
        raise FileNotFoundError(f"recogniser directory not found: {directory}. {WHERE_TO_GET}")
    groups = (("config.json",), WEIGHT_FILES, FEATURE_FILES, TOKENIZER_FILES)
    for names in groups:
        if not any((directory / name).is_file() for name in names):
            raise FileNotFoundError(f"the recogniser directory {directory} has no {' or '.join(names)}")
    config = read_json(directory / "config.json", "recogniser's config")
    named = config["architectures"] if isinstance(config, dict) and "architectures" in config else None
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or not (architecture == WHISPER or architecture.endswith("ForCTC")):
        found = short_repr(architecture)
        raise ValueError(
            f"{directory} holds no recogniser: architectures must name {WHISPER} or ...ForCTC, got {found}"
        )
    return architecture


def require_whole(report: Mapping[str, Any], directory: Path) -> None:
    """Raises ValueError listing the tensors that the file lacks or has in another shape."""
    missing = [name for name in sorted(report["missing_keys"]) if not name.endswith(UNUSED_WITHOUT_TRAINING)]
    problems = [f"missing {name}" for name in missing]
    problems += [f"misshapen {each[0] if isinstance(each, tuple) else each}" for each in report["mismatched_keys"]]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"the weights in {directory} do not fit its config.json: {'; '.join(problems[:12])}{more}")
