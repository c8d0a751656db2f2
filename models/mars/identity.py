"""What a set of MARS weights was made for: one record, written into every file of them and compared before use.

The language model and the image tokenizer are frozen and not inside: they are named by their ids, each a sha256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from models.mars.model import MarsConfig
from models.mars.stages import REFINE, STAGES, UPSCALE
from util.plain import from_plain

FLAGS = {"base_id": "--lm_path", "base_type": "--lm_path", "codec_id": "--vae_path", "max_tokens": "--max_text_tokens",
         "config": "--vae_path, --img_size and --copied_norms"}  # fmt: skip
"""Where a run says what is compared."""


@dataclass(frozen=True)
class MarsIdentity:
    """base_id, base_type: of the language model's folder and the model_type of its config.json. codec_id: of the image
    tokenizer. max_tokens: of a caption, BOS included. stage: one of `STAGES`.

    Raises ValueError for another stage, for a low grid in any but stage III, and for fewer than two tokens.
    """

    base_id: str
    base_type: str
    config: MarsConfig
    codec_id: str
    max_tokens: int
    stage: str

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be {' or '.join(STAGES)}, got {self.stage!r}")
        if (self.stage == UPSCALE) != (self.config.low_grid is not None):
            raise ValueError(f"stage {self.stage!r} does not go with low_grid {self.config.low_grid}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as files hold them."""
        low = self.config.low_grid
        grids = {"grid": list(self.config.grid), "low_grid": None if low is None else list(low)}
        return asdict(self) | {"config": asdict(self.config) | grids}

    @property
    def before(self) -> MarsIdentity:
        """Of the weights that stage III starts from: those whose images it makes larger. Of other stages, itself."""
        low = self.config.low_grid
        if low is None:
            return self
        return replace(self, config=replace(self.config, grid=low, low_grid=None), stage=REFINE)

    @staticmethod
    def of(entries: Any, where: str) -> MarsIdentity:
        """The inverse of `as_dict`. Raises ValueError that begins with `where` and names what is missing or wrong."""
        kinds = {"base_id": str, "base_type": str, "config": dict, "codec_id": str, "max_tokens": int, "stage": str}
        for name, kind in kinds.items():
            if not isinstance(entries, Mapping) or type(entries.get(name)) is not kind:
                raise ValueError(f"{where}: {name} must be a {kind.__name__}")
        for name in ("num_codes", "grid", "copied_norms"):
            if name not in entries["config"]:
                raise ValueError(f"{where}: config lacks {name}")
        config = from_plain(MarsConfig, entries["config"], f"{where}: config")
        unknown = sorted(set(entries) - set(kinds))
        if unknown:
            raise ValueError(f"{where}: unknown fields {unknown}")
        try:
            return MarsIdentity(**{**entries, "config": config})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def require_same_mars(
    found: MarsIdentity, wanted: MarsIdentity, source: str | Path, skipped: tuple[str, ...] = ("stage",)
) -> None:
    """Raises ValueError naming the file, the first field that differs and both values. skipped: fields that may."""
    here = asdict(wanted)
    for name, value in asdict(found).items():
        if name not in skipped and value != here[name]:
            where = f" (see {FLAGS[name]})" if name in FLAGS else ""
            raise ValueError(f"{source} was made with {name} {value}, here it is {here[name]}{where}")
