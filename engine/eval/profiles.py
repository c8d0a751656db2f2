"""Named evaluation protocols: which images, which geometry, which boxes, which thresholds.

"AP on COCO" is a different number under every protocol, so each score stands beside its profile's name and hash. A
profile is one YAML file, configs/eval_<name>.yaml, holding every field of `Profile`: nothing is filled in by default.
What a published protocol leaves open, and what was chosen instead, is listed under `unknown`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from util.config import load_yaml

if TYPE_CHECKING:
    from util.coco import BoxFilters

Geometry = Literal["center_crop", "squash", "original"]
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)
ImageSize = Literal["profile", "source", "any"]  # of the pictures of another model
IMAGE_SIZES: tuple[ImageSize, ...] = get_args(ImageSize)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PREFIX = "eval_"

_NOT_HASHED = ("description", "unknown", "detector")  # words that change no number
_FRACTIONS = ("min_area", "min_visibility", "min_score", "nms_iou", "match_score")
_LEAST = {
    "resolution": 1, "max_objects": 1, "min_boxes": 0, "max_boxes": 1, "max_persons": 0, "num_images": 1,
    "max_detections": 1,
}  # fmt: skip
_OPTIONAL = ("resolution", "max_boxes", "max_persons", "num_images", "nms_iou")


@dataclass(frozen=True)
class Profile:
    """One protocol. Raises ValueError naming the field and its value where one does not make sense.

    name: as in "structmar-256". description: a sentence or two, with the source. unknown: what the publication leaves
    open, and the choice made. split: COCO split by default.
    geometry, resolution: how a photo becomes a picture: ADM's centre crop or a squash to a square of `resolution` px;
    "original" keeps every pixel (resolution None).
    min_area, min_visibility, max_objects, keep_crowd: which boxes a model is given, as `util.coco.BoxFilters` says.
    min_boxes, max_boxes: images with fewer or more boxes after those filters (and before max_objects) are not used.
    max_persons: nor images with more boxes of the category "person", counted before any filter by size.
    num_images: the first by id, after all rules. None switches a rule off.
    detector: what the publication used, in words; information only.
    min_score, nms_iou, max_detections: of the detections that AP gets (nms_iou None: the detector's own).
    match_score: the least score of a detection that mIoU, success rate and precision count.
    area_edges_px: (e0, e1), small < e0^2 <= medium < e1^2 <= large, in pixels of the picture.
    """

    name: str
    description: str
    unknown: tuple[str, ...]
    split: str
    geometry: Geometry
    resolution: int | None
    min_area: float
    min_visibility: float
    max_objects: int
    min_boxes: int
    max_boxes: int | None
    max_persons: int | None
    keep_crowd: bool
    num_images: int | None
    detector: str
    min_score: float
    nms_iou: float | None
    max_detections: int
    match_score: float
    area_edges_px: tuple[float, float]

    def __post_init__(self) -> None:
        self._check_words()
        self._check_numbers()
        if (self.geometry == "original") != (self.resolution is None):
            raise ValueError(
                f"resolution must be null for the geometry 'original' and a number of pixels for the others, "
                f"got resolution={self.resolution!r} with geometry={self.geometry!r}"
            )
        if self.max_boxes is not None and self.max_boxes < self.min_boxes:
            raise ValueError(f"max_boxes must be at least min_boxes={self.min_boxes}, got {self.max_boxes}")

    @property
    def filters(self) -> BoxFilters:
        """The rules for single boxes."""
        from util.coco import BoxFilters  # slow to import, and command lines list the profiles

        return BoxFilters(self.min_area, self.min_visibility, self.max_objects, self.keep_crowd)

    @property
    def hash(self) -> str:
        """12 hex digits of sha256 over every field that can change a number."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_HASHED}
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def _check_words(self) -> None:
        for name in ("name", "description", "split", "detector"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be text, got {value!r}")
        is_list = isinstance(self.unknown, tuple | list)
        if not is_list or not all(isinstance(line, str) for line in self.unknown):
            raise ValueError(f"unknown must be a list of texts, got {self.unknown!r}")
        object.__setattr__(self, "unknown", tuple(self.unknown))
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {self.geometry!r}")
        if not isinstance(self.keep_crowd, bool):
            raise ValueError(f"keep_crowd must be true or false, got {self.keep_crowd!r}")

    def _check_numbers(self) -> None:
        for name in (*_FRACTIONS, *_LEAST):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if name in _FRACTIONS:
                if not _is_number(value) or not 0 <= value <= 1:
                    raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
                object.__setattr__(self, name, float(value))  # 0 and 0.0 are the same protocol: one hash
            elif isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[name]:
                raise ValueError(f"{name} must be a whole number of at least {_LEAST[name]}, got {value!r}")
        edges = self.area_edges_px
        is_pair = isinstance(edges, tuple | list) and len(edges) == 2 and all(map(_is_number, edges))
        if not is_pair or not 0 < edges[0] < edges[1]:
            raise ValueError(f"area_edges_px must be two growing numbers of pixels, got {edges!r}")
        object.__setattr__(self, "area_edges_px", (float(edges[0]), float(edges[1])))


def available_profiles() -> list[str]:
    """The names of the profiles that come with the code, sorted."""
    return sorted(path.stem.removeprefix(PREFIX).replace("_", "-") for path in CONFIGS.glob(f"{PREFIX}*.yaml"))


def load_profile(path_or_name: str | Path) -> Profile:
    """A profile by name ("structmar-256"), or from any YAML file (a path with a folder or ending in .yaml).

    Raises ValueError naming the file and the field for unknown and missing fields and for values that do not fit,
    and listing the names there are for an unknown one; FileNotFoundError for a missing file.
    """
    text = str(path_or_name)
    if isinstance(path_or_name, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        return _read(Path(path_or_name))
    if text not in available_profiles():
        close = difflib.get_close_matches(text, available_profiles(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown profile {text!r}{hint} Known: {', '.join(available_profiles())}, or a YAML file")
    path = CONFIGS / f"{PREFIX}{text.replace('-', '_')}.yaml"
    profile = _read(path)
    if profile.name != text:
        raise ValueError(f"profile {path}: name must be {text!r}, as the file's, got {profile.name!r}")
    return profile


def _read(path: Path) -> Profile:
    if not path.is_file():
        raise FileNotFoundError(f"profile not found: {path}. Known by name: {', '.join(available_profiles())}")
    values: dict[str, Any] = load_yaml(path)
    known = [field.name for field in fields(Profile)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            raise ValueError(f"profile {path}: unknown field {name}{hint}")
    missing = [name for name in known if name not in values]
    if missing:
        raise ValueError(f"profile {path}: missing {', '.join(missing)}; a profile states every field (null: no rule)")
    try:
        return Profile(**values)
    except ValueError as error:
        raise ValueError(f"profile {path}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
