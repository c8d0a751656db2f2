"""Weights of image tokenizers under their publishers' names: read from files, renamed to a module's, nothing guessed.

A key map is a function from the names of our module to those of the file. It goes both ways: `published_state` writes
what `module_state` reads. Attention projections are 1x1 convolutions in published files and linear layers in diffusers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from util.checkpoint import load_plain
from util.weights import tensor_problem

logger = logging.getLogger(__name__)

NORM_NUM_GROUPS = 32  # of GroupNorm, where a file does not say it
IGNORED_PREFIXES = ("loss.",)  # the perceptual loss and the discriminator that are saved with many autoencoders
WHERE_TO_GET = (
    "kl16.ckpt is linked from the README of https://github.com/LTH14/mar, "
    "vq_ds16_c2i.pt from https://github.com/FoundationVision/LlamaGen"
)
LAYER_RENAMES = (  # inside blocks, Latent Diffusion and LlamaGen use the same names
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)

KeyMap = Callable[[str], str]
"""The name of a module's tensor -> its name in the file."""


def read_tokenizer_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """-> (the file's tensors without `IGNORED_PREFIXES`, the plain entries beside them).

    The tensors may be the file itself or lie under "model" or "state_dict", nested or not.
    Raises FileNotFoundError (naming the file and where to get it) and ValueError (not a checkpoint, no tensors).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"VAE checkpoint not found: {path}. {WHERE_TO_GET}")
    payload: dict[str, object] = load_plain(path)
    entries: dict[str, object] = {}
    while nested := next((payload[key] for key in ("model", "state_dict") if isinstance(payload.get(key), dict)), None):
        entries |= {key: value for key, value in payload.items() if value is not nested}
        payload = nested  # type: ignore[assignment]
    tensors = {key: value for key, value in payload.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict: expected tensors under 'model', found {sorted(payload)[:8]}")
    kept = {key: value for key, value in tensors.items() if not key.startswith(IGNORED_PREFIXES)}
    if len(kept) < len(tensors):
        logger.info("%s: ignored %d tensors named %s*", path, len(tensors) - len(kept), "*, ".join(IGNORED_PREFIXES))
    return kept, entries


def published_state(state: Mapping[str, Tensor], name_of: KeyMap | None) -> dict[str, Tensor]:
    """A module's tensors in the file's names and shapes, its own for None. They share memory with the module's."""
    if name_of is None:
        return dict(state)
    return {
        name_of(name): tensor[:, :, None, None] if _is_projection(name) else tensor for name, tensor in state.items()
    }


def module_state(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], name_of: KeyMap | None, what: object
) -> dict[str, Tensor]:
    """The inverse of `published_state`, in float32. expected: the module's own tensors, on the meta device or not.

    Raises ValueError listing tensors missing, left over, of another shape than `what` implies, or not finite.
    """
    wanted = published_state(expected, name_of)
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    problems = [f"missing {key}" for key in wanted if key not in published]
    problems += [f"left over {key}" for key in published if key not in wanted]
    problems += [
        f"{key} has shape {tuple(published[key].shape)}, expected {shape}"
        for key, shape in shapes.items()
        if key in published and tuple(published[key].shape) != shape
    ]
    problems += [found for key in wanted if key in published and (found := tensor_problem(key, published[key]))]
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit {what}: {shortened(problems)}")
    pairs = zip(expected.items(), wanted, strict=True)
    return {name: published[key].reshape(tensor.shape).float() for (name, tensor), key in pairs}


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after all (pattern, replacement) pairs, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def count_indices(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest index that `pattern`'s group matches; 0 if nothing matches."""
    matches = (re.fullmatch(pattern, key) for key in keys)
    return 1 + max((int(found[1]) for found in matches if found), default=-1)


def plain_int(entries: Mapping[str, object], key: str, default: int) -> int:
    """A file's plain entry. Raises ValueError if it is no integer."""
    value = entries.get(key, default)
    if type(value) is not int:
        raise ValueError(f"entry {key!r} must be an integer, got {value!r}")
    return value


def require_groups(norm_num_groups: int, widths: Sequence[int]) -> None:
    """Raises ValueError for a number of GroupNorm groups that does not divide every width."""
    if norm_num_groups < 1 or any(width % norm_num_groups for width in widths):
        raise ValueError(f"norm_num_groups={norm_num_groups} does not divide every width of {widths}")


def require_pixels(pixels: Tensor, stride: int) -> None:
    """Raises ValueError unless they are [B, 3, H, W] in whole cells of `stride` pixels."""
    if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % stride or pixels.shape[3] % stride:
        raise ValueError(f"pixels must be [B, 3, H, W] with H, W multiples of {stride}, got {tuple(pixels.shape)}")


def require_generators(count: int, num_images: int) -> None:
    """Raises ValueError unless there is one for each image."""
    if count != num_images:
        raise ValueError(f"{num_images} images need as many generators, got {count}")


def shortened(problems: Sequence[str], limit: int = 12) -> str:
    """The first problems in one line, and how many more there are."""
    return "; ".join(problems[:limit]) + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")


def _is_projection(name: str) -> bool:
    return re.search(r"\.(to_[qkv]|to_out\.0)\.weight$", name) is not None
