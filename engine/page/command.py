"""The command line that draws a picture of the page again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from engine.page.wish import Wish
from models.sampling.config import SamplingConfig

LAYOUT_NAME, SOURCE_NAME = "layout.json", "before.png"  # what the page calls the files that it hands out


def sample_words(start: Sequence[str], wish: Wish, own: SamplingConfig, batch_size: int) -> list[str]:
    """start: the program and its weights. own: the options that these weights name, which need not be said.

    A layout is expected in the file LAYOUT_NAME, the picture that is edited in SOURCE_NAME.
    """
    words = list(start)
    if len(wish.scene.layout) or wish.scene.size is not None:
        words += ["--layout", LAYOUT_NAME]
    else:
        words += ["--prompt", wish.scene.prompt]
    if wish.edit is not None:
        words += ["--image", SOURCE_NAME, "--edit_boxes", *(str(end) for box in wish.edited for end in box)]
    words += ["--seed", str(wish.seed), "--num_images", str(wish.num_images), "--batch_size", str(batch_size)]
    if wish.precision != "fp32":
        words += ["--precision", wish.precision]
    return words + option_words(wish.config, own)


def option_words(config: SamplingConfig, own: SamplingConfig) -> list[str]:
    """The flags of the options that are others than `own`."""
    words, plain = [], own.to_dict()
    for name, value in config.to_dict().items():
        if value == plain[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return words


def command_line(words: Sequence[str]) -> str:
    """For a shell."""
    return shlex.join(words)


def _word(value: object) -> str:
    return "none" if value is None else str(value)
