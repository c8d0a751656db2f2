"""Which picture belongs to which image: one rule for reading the folders of any model, one for writing our own.

A picture of another model is looked for by the exact file name that the dataset's json gives, with its subfolder; then
by that name with another suffix of SUFFIXES; then by the image's id, in decimal or padded with zeros to 12 digits as
COCO does, directly in the folder. Nothing else is a match, and wherever a picture could be meant for two images, or an
image has two pictures, the folder is refused: a wrong pairing would score a picture against foreign boxes.

Our own pictures are named by id, which no two images of a split share.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from engine.eval.profiles import ImageSize
from engine.eval.targets import EvalSet, Target, apply_geometry
from util.images import Picture, load_image
from util.picture_files import check_picture, picture_size
from util.read import short_path

PictureOf: TypeAlias = Callable[[Target], Picture]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"(?:COCO_\w+_)?0*(\d+)")  # a photograph's file name that is a number, as in COCO

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenPictures:
    """A folder's pictures, all of them found and checked. note: what results.json says of their sizes."""

    picture_of: PictureOf
    note: Mapping[str, Any]


def given_pictures(folder: str | Path, image_size: ImageSize, eval_set: EvalSet) -> GivenPictures:
    """The picture of every target in a folder of any model.

    image_size: "profile": pictures of the profile's size, scored as they are; "source": the photographs' own sizes,
    "any": whatever size, both taken to the profile's as it takes photographs there. Raises FileNotFoundError or
    ValueError, one line naming the folder or file and both values, before any picture is decoded.
    """
    profile = eval_set.profile
    if image_size == "any" and profile.resolution is None:
        raise ValueError(
            f"--image_size any: profile {profile.name} keeps every photograph's own size, so there is none to resize "
            "to; give pictures of the photographs' sizes and --image_size source"
        )
    paths = find_images(folder, eval_set.targets, eval_set.file_names)
    for target in eval_set.targets:
        size = {"profile": target.size, "source": target.source_size, "any": None}[image_size]
        said_by = f"profile {profile.name}" if image_size == "profile" else f"the json of image {target.image_id}"
        check_picture(paths[target.image_id], size, said_by)
    if image_size == "profile":
        return GivenPictures(folder_pictures(paths), {})
    note: dict[str, Any] = {"image_size": image_size}
    if image_size == "any":
        sizes = Counter("{}x{}".format(*picture_size(path)) for path in paths.values())
        note["sizes"] = dict(sorted(sizes.items(), key=lambda each: (-each[1], each[0])))
        note["resized"] = f"{profile.geometry} to {profile.resolution} px"

    def picture_of(target: Target) -> Picture:
        return apply_geometry(load_image(paths[target.image_id]), profile.geometry, profile.resolution)

    return GivenPictures(picture_of, note)


def folder_pictures(paths: Mapping[int, Path]) -> PictureOf:
    """Reads pictures as they are."""

    def picture_of(target: Target) -> Picture:
        return np.asarray(load_image(paths[target.image_id]))

    return picture_of


def image_path(folder: Path, target: Target) -> Path:
    """Where a generated image of this target lies."""
    return folder / f"{target.image_id:012d}.png"


@dataclass(frozen=True)
class _Listing:
    """The files of a folder and of the subfolders that matter. files: by path from the folder. by_stem: the pictures
    among them, by path without suffix."""

    folder: Path
    files: frozenset[str]
    by_stem: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, folder: Path, targets: Sequence[Target]) -> _Listing:
        parents = {PurePosixPath(target.file_name).parent for target in targets} | {PurePosixPath()}
        files = sorted(
            (parent / path.name).as_posix()
            for parent in parents
            if (folder / parent).is_dir()
            for path in (folder / parent).iterdir()
            if path.is_file()
        )
        by_stem: dict[str, list[str]] = {}
        for name in files:
            if PurePosixPath(name).suffix.lower() in SUFFIXES:
                by_stem.setdefault(_stem(name), []).append(name)
        return cls(folder, frozenset(files), {stem: tuple(names) for stem, names in by_stem.items()})

    def named(self, file_name: str) -> list[str]:
        """Pictures of this file name, or of the same one with another suffix; the exact one comes first."""
        exact = PurePosixPath(file_name).as_posix()
        others = [name for name in self.by_stem.get(_stem(exact), ()) if name != exact]
        return [exact, *others] if exact in self.files else others

    def of_id(self, image_id: int) -> list[str]:
        stems = dict.fromkeys([str(image_id), f"{image_id:012d}"])
        return [name for stem in stems for name in self.by_stem.get(stem, ())]


def find_images(folder: str | Path, targets: Sequence[Target], file_names: Mapping[int, str]) -> dict[int, Path]:
    """The picture of every target in a folder of any model, by image id; see the head of this file.

    file_names: of every image of the split by id, not of the targets alone. Raises FileNotFoundError for a missing
    folder or pictures, ValueError for two pictures of one image and a picture that two images could claim.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {short_path(folder)} is not a folder")
    listing = _Listing.of(folder, targets)
    by_name = {target.image_id: listing.named(target.file_name) for target in targets}
    by_id = {target.image_id: listing.of_id(target.image_id) for target in targets}
    _require_clear_names(listing, targets, by_name, by_id)
    owners = _Owners.of(file_names)
    found: dict[int, str] = {}
    for target in targets:
        pictures = by_name[target.image_id] or by_id[target.image_id]
        spare = [each for each in by_id[target.image_id] if each not in pictures and _stem(each) not in owners.by_stem]
        _require_one(folder, target, [*pictures, *spare])
        if not pictures:
            continue
        if not by_name[target.image_id]:
            owners.require_no_other(folder, target, pictures[0])
        found[target.image_id] = pictures[0]
    _require_all(folder, targets, found)
    _require_different(folder, found)
    num_others = sum(map(len, listing.by_stem.values())) - len(found)
    if num_others > 0:
        logger.info("%s holds %d other images, which this evaluation does not ask for", folder, num_others)
    return {image_id: folder / name for image_id, name in found.items()}


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


@dataclass(frozen=True)
class _Owners:
    """The images of a split by their file names without suffix, and by the numbers that these are."""

    file_names: Mapping[int, str]
    by_stem: Mapping[str, int]
    by_number: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, file_names: Mapping[int, str]) -> _Owners:
        by_number: dict[int, tuple[int, ...]] = {}
        for image_id, name in file_names.items():
            number = _NUMBERED.fullmatch(PurePosixPath(name).stem)
            if number is not None:
                by_number[int(number[1])] = (*by_number.get(int(number[1]), ()), image_id)
        return cls(file_names, {_stem(name): image_id for image_id, name in file_names.items()}, by_number)

    def require_no_other(self, folder: Path, target: Target, picture: str) -> None:
        """A picture found by its id must not be called as another image's file is: the dataset was renumbered then."""
        named_so = self.by_number.get(target.image_id, ())
        if named_so and target.image_id not in named_so:
            other = named_so[0]
            raise ValueError(
                f"{short_path(folder)}: {picture} is image {target.image_id} ({target.file_name}) by its id, but image "
                f"{other} ({self.file_names[other]}) by its name; name the pictures exactly as the dataset's files"
            )


def _require_one(folder: Path, target: Target, pictures: Sequence[str]) -> None:
    if len(pictures) > 1:
        raise ValueError(
            f"{short_path(folder)} has {len(pictures)} files for image {target.image_id} ({target.file_name}): "
            f"{pictures[0]}, {pictures[1]}; remove the one that is not meant"
        )


def _require_clear_names(
    listing: _Listing,
    targets: Sequence[Target],
    by_name: Mapping[int, Sequence[str]],
    by_id: Mapping[int, Sequence[str]],
) -> None:
    """Where all images have a picture by name and one by id, both may be meant, unless exact file names decide."""
    if not all(by_name[target.image_id] and by_id[target.image_id] for target in targets):
        return
    for target in targets:
        name, id_name = by_name[target.image_id][0], by_id[target.image_id][0]
        if name == id_name:
            continue
        if name != PurePosixPath(target.file_name).as_posix():
            raise ValueError(
                f"{short_path(listing.folder)}: image {target.image_id} is {name} by its file name "
                f"{target.file_name}, but {id_name} by its id; name the pictures exactly as the dataset's files"
            )
        logger.warning(
            "%s: ids and names disagree (image %d is %s): names count", listing.folder, target.image_id, name
        )
        return


def _require_all(folder: Path, targets: Sequence[Target], found: Mapping[int, str]) -> None:
    missing = [target for target in targets if target.image_id not in found]
    if missing:
        first = missing[0]
        raise FileNotFoundError(
            f"{short_path(folder)} lacks {len(missing)} of {len(targets)} images, the first is {first.image_id} "
            f"({first.file_name}; also looked for: {first.image_id}.png, {first.image_id:012d}.png, each with any of "
            f"{', '.join(SUFFIXES)})"
        )


def _require_different(folder: Path, found: Mapping[int, str]) -> None:
    owner: dict[str, int] = {}
    for image_id, name in found.items():
        if name in owner:
            raise ValueError(f"{short_path(folder)}: {name} belongs to image {owner[name]} and to image {image_id}")
        owner[name] = image_id
