"""Real sizes on a CPU: CLIP ViT-B/32's text tower, and a command whose memory is measured."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import ROOT
from tests.helpers.clip_files import text_settings, write_tokenizer

MEMORY_LIMIT = 16e9
FULL_SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}


def write_clip(folder: Path) -> None:
    """CLIP ViT-B/32's text tower, with a tokenizer that knows three words."""
    folder.mkdir()
    settings = text_settings(write_tokenizer(folder))
    sizes = {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 512}
    CLIPTextModel(CLIPTextConfig(**settings | FULL_SIZES | sizes)).save_pretrained(folder)


@dataclass(frozen=True)
class Finished:
    """A process that ended.

    peak: bytes (no less than the tests' own process had, which it was forked from). seconds: from start to end.
    busy: seconds of processor time.
    """

    code: int
    log: str
    peak: int
    seconds: float
    busy: float

    @property
    def measured(self) -> str:
        """In words."""
        return f"peak memory {self.peak / 1e9:.2f} GB, {self.seconds:.0f} s, {self.busy:.0f} s of processor time"


def run_measured(command: list[str], log: Path) -> Finished:
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Finished(
        code=process.returncode,
        log=log.read_text(encoding="utf-8"),
        peak=usage.ru_maxrss * 1024,
        seconds=time.perf_counter() - start,
        busy=usage.ru_utime + usage.ru_stime,
    )
