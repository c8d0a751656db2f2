"""The COCO index: both namings, filters with their counts, and one clear error for each malformed file."""

import json
import logging

import numpy as np
import pytest

from tests.helpers.coco_fixture import FixtureBox, FixtureImage, annotation_path, write_coco
from util.boxes import plan_center_crop
from util.coco import BoxFilters, CocoIndex, fit_boxes

KEEP_ALL = BoxFilters(min_area=0, min_visibility=0, max_objects=100, keep_crowd=True)


def edit(root, kind, change):
    path = annotation_path(root, kind)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("split", ["train2014", "val2014", "train2017", "val2017", "my_split"])
def test_load(tmp_path, split):
    index = CocoIndex.load(write_coco(tmp_path, split), split)
    assert [image.id for image in index.images] == [1, 2, 5, 9, 12]
    assert [(each.id, each.name) for each in index.categories] == [
        (1, "tomato"),
        (3, "leaf"),
        (44, "plum"),
        (90, "lemon"),
    ]
    first = index.images[0]
    assert first.boxes_px.tolist() == [[20, 8, 42, 39], [55, 30, 79, 50]]
    assert first.categories.tolist() == [0, 1]
    assert first.caption_ids == (100, 101, 102) and first.captions[1] == "things on a table"
    assert index.images[3].boxes_px.shape == (0, 4)
    assert index.image_path(0).name == ("COCO_" + split + "_" if split.endswith("2014") else "") + "000000000001.jpg"
    index.require_images()


def test_pycocotools_is_silent(tmp_path, capsys):
    CocoIndex.load(write_coco(tmp_path), "train2017")
    assert capsys.readouterr().out == ""


FILTERED = (
    FixtureImage(
        1,
        100,
        50,  # the centre crop is x in [25, 75]
        [
            FixtureBox(1, (30, 5, 30, 30)),  # 0.36 of the crop
            FixtureBox(3, (0, 0, 20, 20)),  # outside
            FixtureBox(3, (5, 0, 25, 50)),  # 0.2 visible
            FixtureBox(44, (40, 40, 5, 5)),  # 0.01 of the crop
            FixtureBox(90, (0, 0, 100, 50), iscrowd=1),
            FixtureBox(90, (30, 30, 0, 9)),  # no width
            FixtureBox(90, (120, 10, 9, 9)),  # beyond the image
            FixtureBox(44, (30, 36, 10, 10)),  # 0.04 of the crop
            FixtureBox(3, (70, 0, 5, 50)),  # 0.1 of the crop
        ],
    ),
    FixtureImage(2, 50, 50, [FixtureBox(1, (0, 0, 2, 2))]),
    FixtureImage(3, 50, 50, [], captions=()),
    FixtureImage(4, 50, 50, [], captions=("  ", "one\n thing ")),
)
STRICT = BoxFilters(min_area=0.02, min_visibility=0.3, max_objects=2)


def test_filters_are_counted_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="util.coco"):
        index = CocoIndex.load(write_coco(tmp_path, images=FILTERED), "train2017", STRICT, img_size=50)
    expected = {
        "boxes: crowd": 1,
        "boxes: degenerate": 2,
        "boxes: out_of_crop": 1,
        "boxes: min_visibility": 1,
        "boxes: min_area": 2,
        "boxes: max_objects": 1,
        "images without captions": 1,
        "images kept although without boxes": 2,
        "empty captions": 1,
    }
    assert {reason: count for reason, count in index.removed.items() if count} == expected
    for reason, count in expected.items():
        assert f"{reason} {count}" in caplog.text
    assert [image.id for image in index.images] == [1, 2, 4]
    assert index.images[2].captions == ("one thing",)


def test_fit_boxes_keeps_the_largest_visible_first(tmp_path):
    image = CocoIndex.load(write_coco(tmp_path, images=FILTERED), "train2017", STRICT).images[0]
    fitted = fit_boxes(image.boxes_px, plan_center_crop(100, 50, 50), STRICT)
    np.testing.assert_allclose(fitted.boxes_xyxy, [[0.1, 0.1, 0.7, 0.7], [0.9, 0, 1, 1]])
    assert image.categories[fitted.kept].tolist() == [0, 1]
    everything = fit_boxes(image.boxes_px, plan_center_crop(100, 50, 50), KEEP_ALL)
    assert everything.removed == {"out_of_crop": 1, "min_visibility": 0, "min_area": 0, "max_objects": 0}
    sizes = (everything.boxes_xyxy[:, 2:] - everything.boxes_xyxy[:, :2]).prod(axis=1)
    assert (np.diff(sizes) <= 0).all() and len(sizes) == 5


def test_crowds_and_empty_images_on_request(tmp_path):
    root = write_coco(tmp_path, images=FILTERED)
    assert 3 in CocoIndex.load(root, "train2017", KEEP_ALL).images[0].categories
    strict = BoxFilters(min_area=0.02, drop_empty=True)
    dropped = CocoIndex.load(root, "train2017", strict)
    assert [image.id for image in dropped.images] == [1]
    assert dropped.removed["images without boxes"] == 2


def test_annotations_of_unlisted_images_are_counted(tmp_path):
    root = write_coco(tmp_path)
    for kind in ("instances", "captions"):
        edit(root, kind, lambda content: content["annotations"][0].update(image_id=77))
    index = CocoIndex.load(root, "train2017")
    assert index.removed["boxes: unlisted image"] == 1
    assert index.removed["captions of unlisted images"] == 1


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json.*no json files"):
        CocoIndex.load(tmp_path / "nowhere", "train2017")
    root = write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json.*instances_train2017\.json"):
        CocoIndex.load(root, "val2017")
    annotation_path(root, "captions").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions_train2017\.json"):
        CocoIndex.load(root, "train2017")


def test_missing_images(tmp_path):
    root = write_coco(tmp_path)
    index = CocoIndex.load(root, "train2017")  # jsons are enough to read captions and boxes
    index.image_path(0).unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000001\.jpg"):
        index.require_images()
    (root / "train2017").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"image folder not found: .*train2017"):
        index.require_images()


def test_filters_that_leave_no_box_stop_and_are_named(tmp_path):
    images = [FixtureImage(1, 64, 64, [FixtureBox(1, (0, 0, 4, 4)), FixtureBox(3, (0, 0, 60, 60), iscrowd=1)])]
    root = write_coco(tmp_path, images=images)
    with pytest.raises(ValueError, match=r"none of the 2 boxes of .*instances_train2017\.json is left: boxes: crowd 1, "
                                         r"boxes: min_area 1, .*--min_area 0\.5.*--keep_crowd False"):  # fmt: skip
        CocoIndex.load(root, "train2017", BoxFilters(min_area=0.5))
    assert CocoIndex.load(root, "train2017", BoxFilters(min_area=0.5, keep_crowd=True)).removed["boxes: crowd"] == 0
    edit(root, "instances", lambda content: content["annotations"].clear())
    assert len(CocoIndex.load(root, "train2017", BoxFilters(min_area=0.5))) == 1  # captions alone are what it has


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_area": 1.5}, r"min_area .* got 1\.5"),
        ({"min_visibility": -0.1}, r"min_visibility .* got -0\.1"),
        ({"max_objects": 0}, "max_objects must be at least 1, got 0"),
    ],
)
def test_filters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoxFilters(**arguments)


@pytest.mark.parametrize(
    ("folder", "split", "num_images"),
    [("coco_mini", "train2017", 80), ("coco_mini", "val2017", 79), ("coco_fixture_ccby", "val2017", 32)],
)
def test_real_annotations(shared, folder, split, num_images):
    index = CocoIndex.load(shared / "data" / folder, split)
    assert len(index) == num_images and len(index.categories) == 80
    assert index.categories[-1].name == "toothbrush"
    assert all(len(image.captions) >= 5 for image in index.images)
    index.require_images()
