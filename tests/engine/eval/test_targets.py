"""Evaluation sets: ground truth at output size by hand, the rules for images and boxes, pictures, clear errors."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.eval.profiles import load_profile
from engine.eval.targets import apply_geometry, load_eval_set, plan_geometry
from tests.helpers.coco_fixture import (
    BLUE,
    GREEN,
    RED,
    FixtureBox,
    FixtureImage,
    annotation_path,
    find_color,
    write_coco,
)
from util.boxes import crop_boxes, plan_squash
from util.images import crop_image, load_image

SPLIT = "val2017"
CENTER = replace(
    load_profile("coco-original"), name="test", geometry="center_crop", resolution=32, max_objects=8, min_boxes=1
)  # every box, wherever it lies
SQUASH = replace(CENTER, geometry="squash")
ORIGINAL = replace(CENTER, geometry="original", resolution=None)
TOMATO, LEAF, PLUM, LEMON = 1, 3, 44, 90

# 100 x 50: the centre crop at 50 px keeps x in [25, 75]
SCENES = (
    FixtureImage(
        3,
        100,
        50,
        [
            FixtureBox(LEAF, (30, 10, 12, 10)),  # 4.8 % of the crop
            FixtureBox(TOMATO, (40, 20, 30, 25)),  # 30 % of the crop
            FixtureBox(PLUM, (5, 5, 25, 20)),  # a fifth of it inside the crop: 5 x 20
            FixtureBox(LEMON, (80, 0, 15, 15)),  # outside the crop
            FixtureBox(TOMATO, (26, 0, 40, 8), iscrowd=1),
        ],
        captions=("  a  leaf and a tomato ", "another"),
    ),
    FixtureImage(7, 50, 50, [FixtureBox(PLUM, (10, 10, 20, 20))], captions=()),
    FixtureImage(8, 50, 50, [FixtureBox(LEAF, (0, 0, 2, 2))]),
    FixtureImage(9, 50, 50, []),
)


def load(root, profile, images=SCENES, **changes):
    arguments = {name: changes.pop(name) for name in ("skip_categories", "max_images") if name in changes}
    return load_eval_set(write_coco(root, SPLIT, images), replace(profile, **changes), SPLIT, **arguments)


def ids(eval_set):
    return [target.image_id for target in eval_set.targets]


def test_boxes_of_the_center_crop_by_hand(tmp_path):
    first = load(tmp_path, CENTER, resolution=50, min_area=0.02, min_visibility=0.25).targets[0]
    assert (first.image_id, first.file_name) == (3, "000000000003.jpg")
    assert (first.source_size, first.size) == ((100, 50), (50, 50))
    assert first.boxes_px == pytest.approx(
        np.array([[15, 20, 45, 45], [1, 0, 41, 8], [5, 10, 17, 20], [0, 5, 5, 25]], dtype=np.float64)
    )  # largest first: tomato, crowd of tomatoes, leaf, plum
    assert first.category_ids.tolist() == [TOMATO, TOMATO, LEAF, PLUM]
    assert first.crowd.tolist() == [False, True, False, False]
    assert first.conditioned.tolist() == [True, False, True, False]
    assert first.scene.prompt == "a leaf and a tomato"
    assert first.scene.names == ["tomato", "leaf"]
    assert first.scene.layout.categories.tolist() == [0, 1]  # positions in tomato, leaf, plum, lemon
    assert first.scene.layout.boxes_xyxy.numpy() == pytest.approx(first.boxes_px[first.conditioned] / 50)


def test_boxes_of_a_smaller_crop_of_an_odd_photo_by_hand(tmp_path):
    image = FixtureImage(2, 50, 77, [FixtureBox(PLUM, (6, 20, 30, 25))])  # ADM: 32 x 49 px, rows 8 to 40 are kept
    target = load(tmp_path, CENTER, [image]).targets[0]
    assert target.boxes_px[0] == pytest.approx([6 * 0.64, 20 * 49 / 77 - 8, 36 * 0.64, 45 * 49 / 77 - 8])


def test_boxes_of_the_squash_by_hand(tmp_path):
    first = load(tmp_path, SQUASH, resolution=20).targets[0]
    assert first.size == (20, 20)
    assert first.boxes_px[0] == pytest.approx([40 / 5, 20 / 2.5, 70 / 5, 45 / 2.5])
    assert sorted(first.category_ids) == [TOMATO, TOMATO, LEAF, PLUM, LEMON]  # nothing is cut off
    assert first.scene.names == ["tomato", "plum", "lemon", "leaf"]


def test_boxes_of_the_original_are_the_annotations(tmp_path):
    eval_set = load(tmp_path, ORIGINAL)
    assert eval_set.targets[0].size == (100, 50)
    by_id = {image.id: image for image in SCENES}
    for target in eval_set.targets:
        expected = {(box.category_id, *map(float, box.bbox)) for box in by_id[target.image_id].boxes}
        annotations = [
            each for each in eval_set.ground_truth("full")["annotations"] if each["image_id"] == target.image_id
        ]
        assert {(each["category_id"], *(round(value, 9) for value in each["bbox"])) for each in annotations} == expected


def test_squashing_moves_pixels_and_boxes_alike():
    for width, height in ((100, 50), (640, 97), (31, 200), (1333, 401)):  # the last two are halved on the way
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        box = np.array([width // 4, height // 5, width // 2, height // 2])
        pixels[box[1] : box[3], box[0] : box[2]] = RED
        crop = plan_squash(width, height, 64)
        picture = crop_image(Image.fromarray(pixels), crop)
        assert picture.shape == (64, 64, 3)
        assert find_color(picture, RED) == pytest.approx(crop_boxes(box.astype(np.float64), crop) * 64, abs=1)


@pytest.mark.parametrize("profile", [CENTER, SQUASH, ORIGINAL], ids=lambda each: each.geometry)
def test_objects_lie_where_their_boxes_say(tmp_path, profile):
    scene = FixtureImage(4, 120, 80, [FixtureBox(LEAF, (30, 10, 20, 30)), FixtureBox(PLUM, (60, 30, 25, 40))])
    eval_set = load(tmp_path, profile, [scene])
    target = eval_set.targets[0]
    picture = eval_set.picture(target)
    assert picture.shape == (target.size[1], target.size[0], 3) and picture.dtype == np.uint8
    for box, category_id in zip(target.boxes_px, target.category_ids, strict=True):
        assert find_color(picture, GREEN if category_id == LEAF else BLUE) == pytest.approx(box, abs=1)


def test_both_ground_truths_by_hand(tmp_path):
    eval_set = load(tmp_path, CENTER, resolution=50, min_area=0.02, min_visibility=0.25)
    full, conditioned = eval_set.ground_truth("full"), eval_set.ground_truth("conditioned")
    assert full["info"] == {"profile": "test", "hash": eval_set.profile.hash, "kind": "full", "split": SPLIT}
    assert full["images"][0] == {"id": 3, "file_name": "000000000003.jpg", "width": 50, "height": 50}
    assert full["categories"][0] == {"id": TOMATO, "name": "tomato"} and len(full["categories"]) == 4
    assert [each["id"] for each in full["annotations"]] == [1, 2, 3, 4, 5]
    assert [each["iscrowd"] for each in full["annotations"]] == [0, 1, 0, 0, 0]
    assert [each["iscrowd"] for each in conditioned["annotations"]] == [0, 1, 0, 1, 0]
    assert [each["ignore"] for each in conditioned["annotations"]] == [0, 1, 0, 1, 0]
    assert full["annotations"][2]["bbox"] == pytest.approx([5, 10, 12, 10])
    assert full["annotations"][2]["area"] == pytest.approx(120)
    assert json.loads(json.dumps(full)) == full
    with pytest.raises(ValueError, match="kind must be 'full' or 'conditioned', got 'all'"):
        eval_set.ground_truth("all")


def test_crowds_that_a_protocol_keeps_are_asked_for(tmp_path):
    eval_set = load(tmp_path, CENTER, resolution=50, keep_crowd=True)
    assert eval_set.targets[0].conditioned.all() and eval_set.removed["boxes: crowd"] == 0
    assert eval_set.ground_truth("conditioned")["annotations"][1]["iscrowd"] == 0
    assert eval_set.ground_truth("full")["annotations"][1]["iscrowd"] == 1


def test_rules_are_counted(tmp_path):
    eval_set = load(tmp_path, CENTER, resolution=50, min_area=0.02, min_visibility=0.25, max_objects=1)
    assert ids(eval_set) == [3, 7]
    assert {rule: count for rule, count in eval_set.removed.items() if count} == {
        "boxes: crowd": 1,
        "boxes: out_of_crop": 1,
        "boxes: min_visibility": 1,
        "boxes: max_objects": 1,
        "images: min_boxes": 2,  # 8 loses its only box to min_area, 9 has none
        "images used without captions": 1,
    }
    assert eval_set.targets[1].scene.prompt == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"min_boxes": 0}, [3, 7, 8, 9]),
        ({"min_boxes": 1}, [3, 7, 8]),
        ({"max_boxes": 3}, [7, 8]),
        ({"max_boxes": 4}, [3, 7, 8]),
        ({"max_boxes": 3, "max_objects": 1}, [7, 8]),  # the rule counts before max_objects cuts
        ({"max_boxes": 4, "keep_crowd": True}, [7, 8]),
        ({"min_boxes": 2, "max_boxes": 10, "min_area": 0.09}, [3]),  # tomato and plum
        ({"num_images": 2}, [3, 7]),
        ({"num_images": 2, "max_images": 1}, [3]),
        ({"num_images": 1, "min_boxes": 0, "max_boxes": 3}, [7]),  # the first of those that pass
        ({"skip_categories": frozenset({"plum"})}, [3, 8]),
        ({"skip_categories": frozenset({"plum"}), "max_boxes": 3}, [3, 8]),
    ],
)
def test_which_images_are_used(tmp_path, changes, expected):
    assert ids(load(tmp_path, SQUASH, **changes)) == expected


def test_persons_are_counted_before_the_size_filter(tmp_path):
    small, large = FixtureBox(TOMATO, (0, 0, 3, 3)), FixtureBox(LEAF, (10, 10, 30, 30))
    crowd = replace(small, iscrowd=1)
    scenes = [FixtureImage(1, 50, 50, [small] * 4 + [large]), FixtureImage(2, 50, 50, [small] * 3 + [crowd, large])]
    root = write_coco(tmp_path, SPLIT, scenes)
    path = annotation_path(root, "instances", SPLIT)
    path.write_text(path.read_text().replace('"tomato"', '"person"'))
    profile = replace(SQUASH, min_area=0.02, max_persons=3)
    eval_set = load_eval_set(root, profile, SPLIT)
    assert ids(eval_set) == [2] and eval_set.removed["images: max_persons"] == 1
    assert eval_set.targets[0].scene.names == ["leaf"]
    assert ids(load_eval_set(root, replace(profile, max_persons=4), SPLIT)) == [1, 2]


def test_a_rule_for_persons_without_persons_is_reported(tmp_path, caplog):
    load(tmp_path, SQUASH, max_persons=3)
    assert "has no category 'person': max_persons=3 removes nothing" in caplog.text


def test_skipped_categories_vanish(tmp_path):
    eval_set = load(tmp_path, SQUASH, skip_categories=frozenset({"tomato", "lemon"}))
    assert eval_set.removed["boxes: skipped category"] == 3
    assert eval_set.targets[0].scene.names == ["plum", "leaf"]
    assert eval_set.targets[0].scene.layout.categories.tolist() == [2, 1]  # still positions in the dataset's list
    assert {each["category_id"] for each in eval_set.ground_truth("full")["annotations"]} == {LEAF, PLUM}
    with pytest.raises(ValueError, match="has no categories pear, which were to be skipped"):
        load(tmp_path, SQUASH, skip_categories=frozenset({"pear", "plum"}))


def test_the_split_and_the_ids_hash(tmp_path):
    root = write_coco(write_coco(tmp_path, SPLIT, SCENES), "val2014", SCENES)
    own, other = load_eval_set(root, SQUASH), load_eval_set(root, SQUASH, "val2014")
    assert (own.split, other.split) == (SPLIT, "val2014")
    assert own.ids_hash == other.ids_hash == "9ca7a06aaafe"
    assert load_eval_set(root, SQUASH, max_images=2).ids_hash != own.ids_hash


def test_more_images_than_there_are_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    num_images = len(load(tmp_path, SQUASH).targets)
    assert "were asked for" not in caplog.text
    load(tmp_path, SQUASH, max_images=num_images + 1)
    assert f"{num_images + 1} images were asked for, there are {num_images}" in caplog.text


def test_perfect_detections_get_full_marks(tmp_path):
    for profile in (CENTER, SQUASH, ORIGINAL):
        eval_set = load(tmp_path, profile, min_visibility=0.25)
        assert [perfect_ap(eval_set, kind) for kind in ("full", "conditioned")] == pytest.approx([1, 1])


def perfect_ap(eval_set, kind):
    """AP of detections made from the boxes of the targets, all of them, by pycocotools."""
    detections = [
        {
            "image_id": target.image_id,
            "category_id": int(category_id),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": 0.9,
        }
        for target in eval_set.targets
        for box, category_id in zip(target.boxes_px.tolist(), target.category_ids, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = eval_set.ground_truth(kind)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def test_geometry_is_validated():
    assert plan_geometry(40, 30, "original", None) is None
    image = Image.new("RGB", (40, 30))
    assert apply_geometry(image, "original", None).shape == (30, 40, 3)
    assert apply_geometry(image, "squash", 16).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="geometry must be one of .*, got 'stretch'"):
        plan_geometry(40, 30, "stretch", 16)
    with pytest.raises(ValueError, match="geometry 'squash' does not go with resolution None"):
        plan_geometry(40, 30, "squash", None)


def test_photos_that_do_not_fit_are_named(tmp_path):
    eval_set = load(tmp_path, SQUASH)
    target = eval_set.targets[0]
    path = tmp_path / SPLIT / target.file_name
    Image.new("RGB", (50, 100)).save(path)
    with pytest.raises(ValueError, match=r"000000000003.jpg is 50x100, but instances_val2017.json says 100x50"):
        eval_set.picture(target)
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read image .*000000000003.jpg"):
        eval_set.picture(target)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"image not found: .*000000000003.jpg"):
        eval_set.picture(target)


def test_mistakes_in_the_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"instances_val2017.json: images: id 3 occurs more than once"):
        load(tmp_path, SQUASH, (*SCENES, SCENES[0]))
    with pytest.raises(ValueError, match=r"profile test leaves no image of .*instances_val2017.json: .*min_boxes 4"):
        load(tmp_path, SQUASH, min_boxes=7)
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        load(tmp_path, SQUASH, max_images=0)
    with pytest.raises(FileNotFoundError, match=r"instances_test2017.json"):
        load_eval_set(tmp_path, SQUASH, "test2017")


def adm_map(width, height, size):
    """ADM's centre crop with nothing borrowed: (scale x, scale y, offset x, offset y), photo to picture."""
    w, h = width, height
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
    scale = size / min(w, h)
    w, h = round(w * scale), round(h * scale)
    return w / width, h / height, (w - size) // 2, (h - size) // 2


@pytest.mark.parametrize("geometry", ["center_crop", "squash", "original"])
def test_real_annotations_recomputed_by_hand(shared, geometry):
    root = shared / "data" / "coco_mini"
    profile = replace(CENTER, geometry=geometry, resolution=None if geometry == "original" else 256, min_boxes=0)
    eval_set = load_eval_set(root, profile, SPLIT)
    raw = json.loads((root / "annotations" / f"instances_{SPLIT}.json").read_text())
    expected = []
    for entry in raw["annotations"]:
        image = next(each for each in raw["images"] if each["id"] == entry["image_id"])
        width, height = image["width"], image["height"]
        maps = {
            "center_crop": adm_map(width, height, 256),
            "squash": (256 / width, 256 / height, 0, 0),
            "original": (1, 1, 0, 0),
        }
        sx, sy, ox, oy = maps[geometry]
        right, bottom = (width, height) if geometry == "original" else (256, 256)
        x, y, w, h = entry["bbox"]
        x0, x1 = (min(max(edge * sx - ox, 0), right) for edge in (x, min(x + w, width)))
        y0, y1 = (min(max(edge * sy - oy, 0), bottom) for edge in (y, min(y + h, height)))
        if x1 - x0 > 1e-3 and y1 - y0 > 1e-3:
            expected.append([image["id"], entry["category_id"], entry["iscrowd"], x0, y0, x1 - x0, y1 - y0])
    found = [
        [each["image_id"], each["category_id"], each["iscrowd"], *each["bbox"]]
        for each in eval_set.ground_truth("full")["annotations"]
    ]
    assert len(found) == len(expected) > 400
    assert np.array(sorted(found)) == pytest.approx(np.array(sorted(expected)), abs=1e-6)
    assert [perfect_ap(eval_set, kind) for kind in ("full", "conditioned")] == pytest.approx([1, 1])


@pytest.mark.parametrize("profile", [CENTER, SQUASH, ORIGINAL], ids=lambda each: each.geometry)
def test_real_photos_have_their_size(shared, profile):
    eval_set = load_eval_set(shared / "data" / "coco_mini", profile, SPLIT, max_images=3)
    for target in eval_set.targets:
        picture = eval_set.picture(target)
        assert picture.shape == (target.size[1], target.size[0], 3)
        if profile.geometry == "original":
            path = shared / "data" / "coco_mini" / SPLIT / target.file_name
            assert (picture == np.asarray(load_image(path))).all()


def test_counts_on_val2017_that_the_profiles_state(shared):
    root = shared / "data" / "coco_val2017_layouts"
    for name, count in (("lama3097", 2022), ("creati2565", 2663)):
        profile = load_profile(name)
        assert f"{count:,}" in " ".join(profile.unknown)
        assert len(load_eval_set(root, profile).targets) == count


def test_boxes_alone_need_no_captions(tmp_path):
    """Without a captions file everything but the prompts is the same; who generates is told that it is missing."""
    with_captions = load(tmp_path / "coco", CENTER)
    annotation_path(tmp_path / "coco", "captions", SPLIT).unlink()
    bare = load_eval_set(tmp_path / "coco", CENTER, SPLIT, captions_required=False)
    assert bare.ground_truth("full") == with_captions.ground_truth("full")
    assert bare.ids_hash == with_captions.ids_hash
    assert {target.scene.prompt for target in bare.targets} == {""}
    with pytest.raises(FileNotFoundError, match="captions_val2017.json"):
        load_eval_set(tmp_path / "coco", CENTER, SPLIT)
