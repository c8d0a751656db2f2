"""What a set of weights was made for, and how an exported file says so.

An exported file is a `.safetensors` whose metadata strings hold everything that sampling needs beside the tensors:
    format: "structmar-1". config: the model's sizes (json). categories: [{"id", "name"}, ...] (json).
    vae: {"id", "latent_scale"} (json). text_encoder: {"id"} (json). stage. step. weights: "ema" or "raw".
    reward_detector: sha256 of the detector it was rewarded by, where there was one.
The VAE and the text encoder are frozen and not inside: they are named by their ids (sha256), and others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.structmar import StructMARConfig
from util.types import Category

FORMAT = "structmar-1"
METADATA_KEYS = ("format", "config", "categories", "vae", "text_encoder", "stage", "step", "weights")


@dataclass(frozen=True)
class WeightsInfo:
    """What a set of weights was made for. weights: "ema" or "raw". step: optimizer steps of that stage.

    reward_detector_id: sha256 of the detector whose verdict it was trained on, None if on none.
    """

    config: StructMARConfig
    categories: tuple[Category, ...]
    vae_id: str
    latent_scale: float
    text_encoder_id: str
    stage: str
    step: int
    weights: str
    reward_detector_id: str | None = None

    def __post_init__(self) -> None:
        if len(self.categories) != self.config.num_categories:
            raise ValueError(f"{len(self.categories)} categories, but the model has {self.config.num_categories}")

    def to_metadata(self) -> dict[str, str]:
        """As the strings that a safetensors header holds."""
        return {
            "format": FORMAT,
            "config": json.dumps(self.config.to_dict()),
            "categories": json.dumps([{"id": category.id, "name": category.name} for category in self.categories]),
            "vae": json.dumps({"id": self.vae_id, "latent_scale": self.latent_scale}),
            "text_encoder": json.dumps({"id": self.text_encoder_id}),
            "stage": self.stage,
            "step": str(self.step),
            "weights": self.weights,
            **({} if self.reward_detector_id is None else {"reward_detector": self.reward_detector_id}),
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], source: str | Path) -> WeightsInfo:
        """The inverse of `to_metadata`. Raises ValueError naming `source` and what is missing or malformed."""
        missing = [key for key in METADATA_KEYS if key not in metadata]
        if missing:
            raise ValueError(f"{source} lacks the metadata {missing}: export it with python -m scripts.export_weights")
        if metadata["format"] != FORMAT:
            raise ValueError(f"{source} has format '{metadata['format']}', this version reads '{FORMAT}'")
        try:
            vae, categories = json.loads(metadata["vae"]), json.loads(metadata["categories"])
            return WeightsInfo(
                config=StructMARConfig.from_dict(json.loads(metadata["config"])),
                categories=tuple(Category(int(entry["id"]), str(entry["name"])) for entry in categories),
                vae_id=str(vae["id"]),
                latent_scale=float(vae["latent_scale"]),
                text_encoder_id=str(json.loads(metadata["text_encoder"])["id"]),
                stage=metadata["stage"],
                step=int(metadata["step"]),
                weights=metadata["weights"],
                reward_detector_id=metadata.get("reward_detector"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} has malformed metadata: {type(error).__name__}: {error}") from error
