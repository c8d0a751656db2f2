"""Pictures with sidecars are what jsons of the same pictures are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.coco_fixture import DEFAULT_IMAGES, write_coco
from tests.helpers.sidecar_files import write_categories, write_sidecars
from util.coco import BoxFilters, CocoImage, CocoIndex, read_split
from util.types import UNKNOWN

BY_ID = {image.id: image for image in DEFAULT_IMAGES}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sidecars alone."""
    write_categories(tmp_path)
    write_sidecars(tmp_path)
    return tmp_path


def by_name(images: tuple[CocoImage, ...]) -> dict[str, CocoImage]:
    return {Path(image.file_name).stem.rsplit("_", 1)[-1].lstrip("0"): image for image in images}


def require_same(found: CocoImage, expected: CocoImage) -> None:
    np.testing.assert_allclose(found.boxes_px, expected.boxes_px, rtol=0, atol=1e-9)
    assert found.categories.tolist() == expected.categories.tolist() and not found.crowd.any()
    assert (found.width, found.height) == (expected.width, expected.height)
    assert found.captions == expected.captions and found.phrases == ()


def test_sidecars_are_what_jsons_are(root: Path, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    found, expected = read_split(root, "mine"), read_split(tmp_path / "coco", "train2017")
    assert found.categories == expected.categories
    own, others = by_name(found.images), by_name(expected.images)
    assert own.keys() == others.keys()
    for name, image in own.items():
        require_same(image, others[name])
    assert [image.id for image in found.images] == sorted(image.id for image in found.images)
    index = CocoIndex.load(root, "mine")
    index.require_images()
    assert all(index.image_path(position).is_file() for position in range(len(index)))


def test_splits_can_be_joined(tmp_path: Path) -> None:
    """Categories come from the jsons; ids stay apart, and are the same as alone."""
    write_coco(tmp_path, images=DEFAULT_IMAGES[:3])
    write_sidecars(tmp_path, images=DEFAULT_IMAGES[2:])
    joined, jsons = CocoIndex.load(tmp_path, "train2017+mine"), CocoIndex.load(tmp_path, "train2017")
    assert joined.categories == jsons.categories and len(joined) == 6
    assert [image.id for image in joined.images[:3]] == [1, 2, 5]
    for position, image in enumerate(joined.images):
        assert image.folder == ("train2017" if position < 3 else "mine")
        with Image.open(joined.image_path(position)) as picture:
            assert picture.size == (image.width, image.height)
    write_categories(tmp_path)
    write_sidecars(tmp_path, "yours", DEFAULT_IMAGES[2:])
    assert len({image.id for image in read_split(tmp_path, "mine+yours").images}) == 6
    alone = CocoIndex.load(tmp_path, "mine")
    assert joined.captions() == jsons.captions() | alone.captions()
    assert [image.id for image in alone.images] == [image.id for image in joined.images[3:]]


def test_ids_stay_when_pictures_come_and_go(root: Path) -> None:
    before = {image.file_name: (image.id, image.caption_ids) for image in read_split(root, "mine").images}
    write_sidecars(root, "mine/below", DEFAULT_IMAGES[:2])
    (root / "mine" / "9.png").unlink()
    (root / "mine" / "9.bbox").unlink()
    after = {image.file_name: (image.id, image.caption_ids) for image in read_split(root, "mine").images}
    assert {name for name in after if name.startswith("below")} == {"below/1.png", "below/2.png"}
    assert {name: ids for name, ids in after.items() if name in before} == {
        name: ids for name, ids in before.items() if name != "9.png"
    }
    assert all(2**61 <= image_id < 2**62 for image_id, _ in after.values())


def test_either_sidecar_may_be_missing(root: Path) -> None:
    (root / "mine" / "1.bbox").unlink()
    (root / "mine" / "2.txt").unlink()
    (root / "mine" / "readme.txt").write_text("no picture's")
    images = by_name(read_split(root, "mine").images)
    assert len(images["1"].boxes_px) == 0 and images["1"].captions == BY_ID[1].captions
    assert len(images["2"].boxes_px) == 1 and images["2"].captions == ()
    assert len(CocoIndex.load(root, "mine")) == len(images) - 1


def test_labels_that_are_no_categories(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error, a phrase, or left out and counted, as the reader wants."""
    lines = [
        {"label": "A  Tomato", "bbox": [0, 0, 0.5, 0.5], "phrase": "ripe  tomato"},
        {"label": "red  umbrella", "bbox": [0.5, 0, 1, 1], "mask": "mask.png"},
        {"label": "plum", "bbox": [0, 0.5, 0.5, 1]},
    ]
    (root / "mine" / "1.bbox").write_text(json.dumps(lines))
    with pytest.raises(ValueError, match=r"1\.bbox, object 1: label 'red umbrella' is none of the 4 .*--phrases"):
        CocoIndex.load(root, "mine")
    with caplog.at_level("INFO"):
        image = by_name(CocoIndex.load(root, "mine", BoxFilters(unknown="phrase")).images)["1"]
    assert "mine: not read: 'mask'" in caplog.text
    tomato, plum = 0, 2
    assert image.categories.tolist() == [tomato, UNKNOWN, plum]
    assert image.phrases == ("ripe tomato", "red umbrella", "")
    split = read_split(root, "mine", unknown="leave_out")
    assert by_name(split.images)["1"].categories.tolist() == [tomato, plum]
    assert split.removed["boxes: label of no category"] == 1


def spoil(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a misspelt category": (spoil("1.bbox", '{"label": "tomatoe", "bbox": [0, 0, 1, 1]}'),
                            r"1\.bbox, object 0: label 'tomatoe' is none of .*did you mean 'tomato'\?"),
    "corner and sides": (
        spoil("1.bbox", '{"label": "plum", "bbox": [0.5, 0.25, 0.25, 0.25]}'),
        r"1\.bbox, object 0 \('plum'\): 'bbox' .* read as a \.bbox file's \[x0, y0, x1, y1\] in \[0, 1\]: "
        r"x0 = 0\.5 is not below x1 = 0\.25; as \[x, y, width, height\] in \[0, 1\] it would be",
    ),
    "pixels": (spoil("1.bbox", '{"label": "plum", "bbox": [3, 4, 20, 30]}'), r"x0 is 3, not in \[0, 1\]"),
    "YOLO's lines": (spoil("1.bbox", "0 0.3 0.5 0.4 0.6\n"), r"sidecar .*1\.bbox is not valid JSON"),
    "a line that is cut off": (spoil("1.bbox", '{"label": "plum"}\n{"label": "pl\n'), r"1\.bbox is not valid JSON"),
    "no box": (spoil("1.bbox", '{"label": "plum"}'), r"object 0: must be an object with the keys 'label' and 'bbox'"),
    "a number as label": (spoil("1.bbox", '{"label": 3, "bbox": [0, 0, 1, 1]}'), r"'label' must be a string, got 3"),
    "a blank label": (spoil("1.bbox", '{"label": " ", "bbox": [0, 0, 1, 1]}'), r"object 0: 'label' is blank, got ' '"),
    "a key twice": (spoil("1.bbox", '{"label": "plum", "label": "leaf"}\n{"label": "plum", "bbox": [0, 0, 1, 1]}'),
                    r"1\.bbox, line 1: key 'label' is there twice"),
    "captions that are no text": (lambda folder: (folder / "1.txt").write_bytes(b"\xff\xfea"),
                                  r"caption file .*1\.txt is not UTF-8"),
    "no picture": (spoil("none.bbox", ""), r"sidecar .*none\.bbox has no picture beside it \(\.jpg"),
    "two pictures": (spoil("1.jpg", ""), r"'1\.jpg' and '1\.png' would share their sidecars"),
    "a broken picture": (spoil("1.png", "no"), r"1\.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_file_and_the_object(root: Path, case: str) -> None:
    breaks, message = WRONG[case]
    breaks(root / "mine")
    with pytest.raises(ValueError, match=message) as error:
        read_split(root, "mine")
    assert str(error.value).isprintable()


def test_categories_are_stated_somewhere(tmp_path: Path) -> None:
    write_sidecars(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mine has sidecars, and .*categories\.json is to say which labels"):
        read_split(tmp_path, "mine")
    with pytest.raises(FileNotFoundError, match=r"instances_none\.json.* nor does .*none hold \.bbox files"):
        read_split(tmp_path, "none")


def test_joined_splits_fit_together(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, "val2017")
    with pytest.raises(ValueError, match="image 1 is in train2017 and in val2017"):
        read_split(tmp_path, "train2017+val2017")
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"lemon"', '"melon"'))
    with pytest.raises(
        ValueError, match=r"instances_val2017\.json has other categories than .*instances_train2017\.json"
    ):
        read_split(tmp_path, "train2017+val2017")
    for name in ("train2017+", "train2017+train2017"):
        with pytest.raises(ValueError, match=r"joins different names by '\+', got"):
            read_split(tmp_path, name)
