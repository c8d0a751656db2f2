"""A planner on the disk: its weights in half precision, and what they were made for.

A `.safetensors` file with the metadata {"format": "structmar-planner-1", "planner": JSON}, whose JSON holds
    config: the sizes (`models.planner.PlannerConfig`). categories: [{"id", "name"}, ...]. text_encoder: its id.
    step: after which the weights were taken.
The text encoder is frozen and not inside: it is named by its id (sha256), and another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.planner import Planner, PlannerConfig
from util.checkpoint import load_plain, safetensors_metadata, save_safetensors_atomic
from util.plain import from_plain
from util.read import short_path
from util.types import Category, require_distinct
from util.weights import tensor_problem

FORMAT = "structmar-planner-1"
PLANNER_NAME = "planner.safetensors"


@dataclass(frozen=True)
class PlannerIdentity:
    """What a planner's weights were made for. categories: in the order of its tokens."""

    config: PlannerConfig
    categories: tuple[Category, ...]
    text_encoder_id: str

    def __post_init__(self) -> None:
        if len(self.categories) != self.config.num_categories:
            raise ValueError(f"{len(self.categories)} categories, but num_categories {self.config.num_categories}")
        require_distinct(self.categories, "a planner")

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "categories": [asdict(category) for category in self.categories],
            "text_encoder": self.text_encoder_id,
        }

    @staticmethod
    def from_dict(entries: Any, where: str) -> PlannerIdentity:
        """Raises ValueError that begins with `where` and names what is missing or of another kind."""
        kinds = {"config": dict, "categories": list, "text_encoder": str}
        for name, kind in kinds.items():
            if not isinstance(entries, Mapping) or not isinstance(entries.get(name), kind):
                raise ValueError(f"{where}: its planner's {name} must be a {kind.__name__}")
        categories = tuple(from_plain(Category, each, f"{where}: category") for each in entries["categories"])
        config = from_plain(PlannerConfig, entries["config"], f"{where}: config")
        try:
            return PlannerIdentity(config, categories, entries["text_encoder"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def save_planner(path: str | Path, identity: PlannerIdentity, weights: Mapping[str, Tensor], step: int) -> None:
    """Writes the file atomically; the weights lose all but half precision."""
    halves = {name: tensor.to("cpu", torch.float16) for name, tensor in weights.items()}
    record = json.dumps(identity.to_dict() | {"step": step})
    save_safetensors_atomic(halves, path, {"format": FORMAT, "planner": record})


def load_planner(path: str | Path, device: torch.device | str = "cpu") -> tuple[Planner, PlannerIdentity]:
    """The planner in float32, in evaluation mode, and what it was made for.

    Raises FileNotFoundError or ValueError naming the file, and what in it is missing or does not fit.
    """
    where = f"planner {short_path(path)}"
    if Path(path).is_dir():
        path = Path(path) / PLANNER_NAME
    if Path(path).is_file() and Path(path).suffix != ".safetensors":
        raise ValueError(f"{where} is no planner: scripts.train_planner writes {PLANNER_NAME}")
    metadata = safetensors_metadata(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where} has the format {metadata.get('format')!r}, a planner {FORMAT!r}")
    try:
        record = json.loads(metadata.get("planner", ""))
    except ValueError as error:
        raise ValueError(f"{where}: its metadata are no JSON ({error})") from error
    identity = PlannerIdentity.from_dict(record, where)
    with torch.random.fork_rng(devices=[]):  # initial values, all replaced below, draw from the global generator
        model = Planner(identity.config)
    load_tensors(model, load_plain(path), where)
    return model.to(device).eval(), identity


def load_tensors(model: Planner, weights: Mapping[str, Any], where: str) -> None:
    """Fills the model. Raises ValueError that begins with `where` and names tensors that are missing, left over, of
    another shape, or not finite."""
    expected = model.state_dict()
    odd = sorted(expected.keys() ^ weights.keys())
    if odd:
        kind = "lacks" if odd[0] in expected else "has the unknown"
        raise ValueError(f"{where} {kind} {odd[0]}; {len(odd)} tensors differ")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            shapes = f"{tuple(tensor.shape)}, its config implies {tuple(expected[name].shape)}"
            raise ValueError(f"{where}: {name} has the shape {shapes}")
        if (problem := tensor_problem(name, tensor)) is not None:
            raise ValueError(f"{where}: {problem}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)


def require_same_planner(found: PlannerIdentity, expected: PlannerIdentity, where: str) -> None:
    """Raises ValueError that begins with `where` and names the first difference, with both values."""
    mine, other = asdict(found.config), asdict(expected.config)
    pairs: list[tuple[str, Any, Any]] = [(name, mine[name], other[name]) for name in mine if name != "dropout"]
    pairs.append(("categories", _names(found.categories), _names(expected.categories)))
    pairs.append(("text encoder", found.text_encoder_id, expected.text_encoder_id))
    for name, value, wanted in pairs:
        if value != wanted:
            raise ValueError(f"{where} was made with {name} {value}, this run has {wanted}")


def _names(categories: Sequence[Category]) -> str:
    return ", ".join(f"{category.id} {category.name}" for category in categories)
