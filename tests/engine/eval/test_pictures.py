"""Which picture belongs to which image: the law is that every picture found is the one of its image, or none is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.eval.pictures import find_images, image_path
from engine.eval.targets import EvalSet, Target, load_eval_set
from tests.helpers.eval_world import tiny_profile, write_dataset


@pytest.fixture(scope="module")
def eval_set(tmp_path_factory) -> EvalSet:
    return load_eval_set(write_dataset(tmp_path_factory.mktemp("data") / "coco"), tiny_profile())


def renamed(eval_set: EvalSet, names: Mapping[int, str]) -> tuple[list[Target], Mapping[int, str]]:
    """As many targets with these ids and file names, and the names of the split."""
    targets = [
        replace(target, image_id=image_id, file_name=name)
        for target, (image_id, name) in zip(eval_set.targets, names.items(), strict=False)
    ]
    return targets, names


def write(folder: Path, names: Sequence[str]) -> Path:
    for position, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), position, dtype=np.uint8)).save(path)
    return folder


PLAIN = {3: f"{3:012d}.jpg", 42: f"{42:012d}.jpg"}
RENUMBERED = {1: f"{3:012d}.jpg", 2: f"{42:012d}.jpg"}  # ids are no file's number
SWAPPED = {3: f"{42:012d}.jpg", 42: f"{3:012d}.jpg"}  # ids are other files' numbers
SHIFTED = {42: f"{3:012d}.jpg", 57: f"{42:012d}.jpg"}  # one id is another file's number
VAL2014 = {3: f"COCO_val2014_{3:012d}.jpg", 42: f"COCO_val2014_{42:012d}.jpg"}
FOLDERS = {1: "a/1.jpg", 2: "b/1.jpg"}  # file names that differ by their folder alone
WORDS = {1: "dog_1.jpg", 2: "cat_1.jpg"}
DATASETS = {"plain": PLAIN, "renumbered": RENUMBERED, "swapped": SWAPPED, "shifted": SHIFTED, "val2014": VAL2014,
            "folders": FOLDERS, "words": WORDS}  # fmt: skip
WAYS = {
    "as the file": lambda image_id, name: name,
    "another suffix": lambda image_id, name: str(Path(name).with_suffix(".png")),
    "id": lambda image_id, name: f"{image_id}.png",
    "padded id": lambda image_id, name: f"{image_id:012d}.png",
    "padded id, the files' suffix": lambda image_id, name: f"{image_id:012d}.jpg",
}
REFUSED = {
    ("swapped", "another suffix"), ("swapped", "id"), ("swapped", "padded id"),
    ("shifted", "id"), ("shifted", "padded id"), ("shifted", "padded id, the files' suffix"),
}  # fmt: skip
FILE_NAMES_COUNT = {("swapped", "padded id, the files' suffix")}  # these pictures bear the files' exact names


@pytest.mark.parametrize(("dataset", "way"), list(product(DATASETS, WAYS)))
def test_every_way_to_name_pictures_is_understood_or_refused(eval_set, tmp_path, dataset, way):
    targets, names = renamed(eval_set, DATASETS[dataset])
    meant = {image_id: WAYS[way](image_id, name) for image_id, name in names.items()}
    folder = write(tmp_path, list(meant.values()))
    if (dataset, way) in REFUSED:
        with pytest.raises(ValueError, match="image (3|42) .* by its .*, but .* by its ") as error:
            find_images(folder, targets, names)
        assert "\n" not in str(error.value)
        return
    if (dataset, way) in FILE_NAMES_COUNT:
        meant = dict(names)
    assert find_images(folder, targets, names) == {image_id: folder / name for image_id, name in meant.items()}


def test_pictures_of_images_that_are_not_scored_are_no_others_pictures(eval_set, tmp_path):
    """Only the first image is scored; the folder holds the second one's picture, whose name is the first one's id."""
    targets, names = renamed(eval_set, {42: "new/7.jpg", 57: f"{42:012d}.jpg"})
    folder = write(tmp_path, [f"{42:012d}.png"])
    with pytest.raises(ValueError, match=r"is image 42 \(new/7.jpg\) by its id, but image 57 \(0*42.jpg\) by its name"):
        find_images(folder, targets[:1], names)


@pytest.mark.parametrize("extra", [f"{3:012d}.png", "3.png", f"{3:012d}.JPG", f"{3:012d}.webp"])
def test_two_pictures_of_one_image_are_refused(eval_set, tmp_path, extra):
    targets, names = renamed(eval_set, PLAIN)
    folder = write(tmp_path, [*PLAIN.values(), extra])
    with pytest.raises(ValueError, match=rf"2 files for image 3 \({3:012d}.jpg\): {3:012d}.jpg, {extra}"):
        find_images(folder, targets, names)


def test_one_file_is_not_two_images(eval_set, tmp_path):
    targets, names = renamed(eval_set, {1: "a.jpg", 2: "a.jpg"})
    with pytest.raises(ValueError, match="a.jpg belongs to image 1 and to image 2"):
        find_images(write(tmp_path, ["a.jpg"]), targets, names)


@pytest.mark.parametrize("name", ["3.txt", "0003.png", "x3.png", f"{3:012d}(1).png", "sub/3.png", f"sub/{3:012d}.jpg"])
def test_a_name_that_only_resembles_is_no_match(eval_set, tmp_path, name):
    targets, names = renamed(eval_set, PLAIN)
    folder = write(tmp_path, [f"{42:012d}.jpg"])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes((folder / f"{42:012d}.jpg").read_bytes())
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of 2 images, the first is 3 \({3:012d}.jpg; also .* 3.png"):
        find_images(folder, targets, names)


def test_generated_pictures_never_collide_and_stay_inside(eval_set, tmp_path):
    names = {1: "a/1.jpg", 2: "b/1.jpg", 3: "1.png", 4: "../1.jpg", 10**15: "/etc/1.jpg"}
    targets, names = renamed(eval_set, names)
    paths = {image_path(tmp_path, target) for target in targets}
    assert len(paths) == len(targets) and {path.parent for path in paths} == {tmp_path}
    write(tmp_path, [path.name for path in paths])
    found = find_images(tmp_path, targets, {target.image_id: f"photo-{target.image_id}.jpg" for target in targets})
    assert found == {target.image_id: image_path(tmp_path, target) for target in targets}


def test_a_subfolder_may_be_a_link(eval_set, tmp_path):
    """And what lies elsewhere is not looked at: the folder may be large."""
    targets, names = renamed(eval_set, FOLDERS)
    folder = write(tmp_path / "pictures", ["b/1.jpg", "c/1.jpg"])
    write(tmp_path / "elsewhere", ["1.jpg"])
    (folder / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert find_images(folder, targets, names) == {1: folder / "a/1.jpg", 2: folder / "b/1.jpg"}
