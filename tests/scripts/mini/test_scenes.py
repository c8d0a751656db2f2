"""The mini world: boxes are what was drawn, captions say what is there, the dataset is COCO and repeats itself."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from engine.eval.ap import average_precision
from models.frozen.faster_rcnn import load_detector
from scripts.mini import detector_ap
from scripts.mini.captions import NUM_CAPTIONS, Named, count_phrases, write_captions
from scripts.mini.dataset import DatasetSettings, make_dataset, scene_generator
from scripts.mini.drawing import CLASS_BY_ID, CLASSES, COLOURS
from scripts.mini.scenes import (
    MASK_COVERAGE,
    MIN_VISIBLE,
    Scene,
    ScenePlan,
    draw_scene,
    plan_scene,
    render_scene,
    render_single,
)

COCO_NAMES = {
    10: "traffic light", 13: "stop sign", 28: "umbrella", 37: "sports ball", 38: "kite", 52: "banana",
    53: "apple", 55: "orange", 60: "donut", 72: "tv", 85: "clock", 86: "vase",
}  # fmt: skip


def scenes(count: int, size: int = 64) -> list[Scene]:
    return [render_scene(np.random.default_rng((5, index)), size) for index in range(count)]


def test_classes_are_cocos() -> None:
    assert {entry.id: entry.name for entry in CLASSES} == COCO_NAMES
    assert [entry.id for entry in CLASSES] == sorted(COCO_NAMES)
    assert all(colour in COLOURS for entry in CLASSES for colour in entry.colours)


def test_boxes_are_the_exact_extent_of_the_visible_pixels() -> None:
    for scene in scenes(30):
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            x, y, width, height = item.bbox
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
            assert item.area == len(rows)
            assert item.mask.shape == scene.image.shape[:2]


def test_masks_are_where_the_picture_differs_without_the_object() -> None:
    """The last object is in front: with and without it, the pixels of its mask differ; far from its shadow none do."""
    for index in range(12):
        plan = plan_scene(np.random.default_rng((6, index)), (2, 4))
        image, objects = draw_scene(plan, 64)
        without, _ = draw_scene(ScenePlan(plan.objects[:-1], plan.background, plan.background_seed), 64)
        differs = (image != without).any(axis=-1)
        front = objects[-1]
        assert front.visible_fraction == 1.0
        assert differs[front.mask].mean() > 0.97
        x, y, width, height = (int(value) for value in front.bbox)
        reach = int(0.35 * max(width, height)) + 2
        differs[max(y - reach, 0) : y + height + reach, max(x - reach, 0) : x + width + reach] = False
        assert not differs.any()


def test_masks_do_not_overlap_and_objects_stay_visible() -> None:
    assert MASK_COVERAGE >= 0.4  # below one half, two masks may share a pixel on their common edge, but no more
    for scene in scenes(40):
        covered = np.sum([item.mask for item in scene.objects], axis=0)
        assert (covered > 1).mean() < 0.01
        for item in scene.objects:
            assert MIN_VISIBLE <= item.visible_fraction <= 1.0
            assert max(item.bbox[2:]) >= 7


def test_hidden_parts_are_outside_the_mask() -> None:
    found = [item.visible_fraction for scene in scenes(60) for item in scene.objects]
    assert any(value < 0.95 for value in found)


def test_scenes_repeat_from_their_seed_and_differ_between_seeds() -> None:
    first, again = (render_scene(np.random.default_rng(11)) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert first.captions == again.captions
    assert [item.bbox for item in first.objects] == [item.bbox for item in again.objects]
    assert not np.array_equal(first.image, render_scene(np.random.default_rng(12)).image)


def test_larger_sizes_show_the_same_scene() -> None:
    for index in range(5):
        small, large = (render_scene(np.random.default_rng((7, index)), size) for size in (64, 256))
        assert [item.category_id for item in small.objects] == [item.category_id for item in large.objects]
        for a, b in zip(small.objects, large.objects, strict=True):
            assert np.abs(np.array(a.bbox) * 4 - np.array(b.bbox)).max() <= 8
        shrunk = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(int) - small.image.astype(int)).mean() < 6


def test_number_of_objects_is_within_the_range() -> None:
    counts = {len(render_scene(np.random.default_rng((6, i)), 32, (2, 4)).objects) for i in range(25)}
    assert counts == {2, 3, 4}
    with pytest.raises(ValueError, match=r"within 1 and 8, got \(0, 3\)"):
        render_scene(np.random.default_rng(0), 32, (0, 3))


@pytest.mark.parametrize("category_id", sorted(COCO_NAMES))
def test_single_objects_are_large_and_near_the_middle(category_id: int) -> None:
    scene = render_single(np.random.default_rng(category_id), category_id)
    (item,) = scene.objects
    x, y, width, height = item.bbox
    assert item.category_id == category_id
    assert max(width, height) >= 22
    assert abs(x + width / 2 - 32) < 16
    assert abs(y + height / 2 - 32) < 16
    assert item.visible_fraction == 1.0


def test_single_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="category id 1 is not drawn here"):
        render_single(np.random.default_rng(0), 1)


def test_colours_are_named_where_they_vary_and_are_what_was_painted() -> None:
    """The mean colour of an object is nearer to its own name's than to a clearly other one's."""
    opposite = {
        "red": "green",
        "green": "red",
        "blue": "yellow",
        "yellow": "blue",
        "purple": "yellow",
        "orange": "blue",
    }
    for index in range(60):
        scene = render_single(np.random.default_rng((9, index)), (28, 38, 86)[index % 3])
        (item,) = scene.objects
        assert item.colour is not None
        if item.colour in opposite:
            mean = scene.image[item.mask].mean(axis=0) / 255
            own, other = (np.abs(mean - COLOURS[name]).sum() for name in (item.colour, opposite[item.colour]))
            assert own < other, item
    assert all(item.colour is None for s in scenes(10) for item in s.objects if item.category_id in (10, 13, 52, 55))


def test_captions_name_every_object_with_its_colour() -> None:
    for scene in scenes(40):
        assert len(scene.captions) == NUM_CAPTIONS
        for caption in scene.captions:
            for item in scene.objects:
                assert item.name in caption
                assert item.colour is None or re.search(rf"{item.colour} {item.name}", caption)


def test_captions_count_and_relate() -> None:
    left, right = Named("clock", None, (0.2, 0.5), 0.3), Named("kite", "red", (0.8, 0.5), 0.6)
    assert count_phrases([left, right, left]) == ["two clocks", "a red kite"]
    assert count_phrases([Named("orange", None, (0, 0), 0.3)]) == ["an orange"]
    said = set()
    for seed in range(20):
        captions = write_captions([left, right], "on the grass", np.random.default_rng(seed))
        assert not any(re.search(r"\b(left|right)\b", caption) for caption in captions[:3])
        assert not any(re.search(r"\b(above|below|under)\b", caption) for caption in captions)  # as high as each other
        said.add(re.sub("to the (left|right) of", r"\1 of", captions[-1]))
    assert said == {"a clock left of a red kite on the grass", "a red kite right of a clock on the grass"}


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (32, 128)])
def test_oblong_scenes_use_all_of_their_picture(size: tuple[int, int]) -> None:
    """Objects are as large as in the square of the shorter side, and lie along the whole longer one."""
    oblong = [render_scene(np.random.default_rng((8, index)), size) for index in range(12)]
    centres, longest = [], []
    for scene in oblong:
        assert scene.image.shape == (*size, 3)
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            x, y, width, height = item.bbox
            assert item.mask.shape == size
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
            centres.append(((x + width / 2) / size[1], (y + height / 2) / size[0]))
            longest.append(max(width, height))
    along = [centre[int(size[0] > size[1])] for centre in centres]
    assert min(along) < 0.25
    assert max(along) > 0.75
    assert max(longest) <= min(size)


def test_sizes_take_turns_and_squares_are_what_they_were(tmp_path: Path) -> None:
    sizes = ("32x32", "48x32", "32x48")
    assert make_dataset(tmp_path, DatasetSettings(num_train=4, num_val=1, size=32, seed=3, sizes=sizes))
    record = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
    assert [(each["height"], each["width"]) for each in record["images"]] == [(32, 32), (48, 32), (32, 48), (32, 32)]
    for each in record["images"]:
        image = cv2.imread(str(tmp_path / "train2017" / each["file_name"]))
        assert image.shape == (each["height"], each["width"], 3)
    assert record["info"]["sizes"] == list(sizes)
    with pytest.raises(ValueError, match="describes another dataset"):
        small_dataset(tmp_path)
    assert "sizes" not in DatasetSettings().to_dict()  # settings of before the option are still known
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        DatasetSettings(sizes=("32",))


def small_dataset(folder: Path, seed: int = 3) -> bool:
    return make_dataset(folder, DatasetSettings(num_train=6, num_val=3, size=32, seed=seed), num_workers=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini_coco")
    assert small_dataset(folder)
    return folder


def test_dataset_loads_in_pycocotools_and_agrees_with_the_scenes(dataset: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(dataset / "annotations" / "instances_train2017.json"))
        captions = COCO(str(dataset / "annotations" / "captions_train2017.json"))
    assert sorted(coco.imgs) == [1, 2, 3, 4, 5, 6]
    assert {entry["id"]: entry["name"] for entry in coco.cats.values()} == COCO_NAMES
    assert all(entry["supercategory"] == CLASS_BY_ID[entry["id"]].supercategory for entry in coco.cats.values())
    for image_id, record in coco.imgs.items():
        scene = render_scene(scene_generator(3, "train2017", image_id - 1), 32)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [tuple(entry["bbox"]) for entry in annotations] == [item.bbox for item in scene.objects]
        for entry, item in zip(annotations, scene.objects, strict=True):
            mask = coco.annToMask(entry)
            assert np.array_equal(mask.astype(bool), item.mask)
            assert entry["area"] == mask.sum()
            assert entry["iscrowd"] == 0
        texts = [entry["caption"] for entry in captions.loadAnns(captions.getAnnIds(imgIds=[image_id]))]
        assert tuple(texts) == scene.captions
        image = cv2.imread(str(dataset / "train2017" / record["file_name"]))[..., ::-1]
        assert record["file_name"] == f"{image_id:012d}.jpg"
        assert image.shape == (record["height"], record["width"], 3)
        assert np.abs(image.astype(int) - scene.image.astype(int)).mean() < 4


def test_splits_are_different_scenes(dataset: Path) -> None:
    train, val = ((dataset / split / f"{1:012d}.jpg").read_bytes() for split in ("train2017", "val2017"))
    assert train != val


def test_dataset_repeats_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    assert small_dataset(tmp_path)
    files = sorted(path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file())
    assert len(files) == 6 + 3 + 4 + 1
    assert all((dataset / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_finished_dataset_is_left_alone(dataset: Path) -> None:
    image = dataset / "train2017" / f"{1:012d}.jpg"
    before = image.stat().st_mtime_ns
    assert not small_dataset(dataset)
    assert image.stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)'seed': 3.*'seed': 4"):
        small_dataset(dataset, seed=4)


def test_interrupted_dataset_is_written_anew(tmp_path: Path) -> None:
    assert small_dataset(tmp_path)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    assert small_dataset(tmp_path)
    assert json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text())["images"]


def instances(folder: Path, split: str = "train2017") -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_phrases_say_size_colour_and_class(dataset: Path) -> None:
    for entry in instances(dataset)["annotations"]:
        length = max(entry["bbox"][2:]) / 32
        size = ["small"] * (length < 0.28) + ["large"] * (length > 0.5)
        colour = [entry["colour"]] if "colour" in entry else []
        assert entry["phrase"] == " ".join([*size, *colour, COCO_NAMES[entry["category_id"]]])


def test_a_dataset_of_before_phrases_gets_them(dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "older")
    settings = json.loads((folder / "settings.json").read_text()) | {"format_version": 1}
    (folder / "settings.json").write_text(json.dumps(settings))
    for split in ("train2017", "val2017"):
        content = instances(folder, split)
        for entry in content["annotations"]:
            del entry["phrase"]
        content["info"]["format_version"] = 1
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    pictures = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert not small_dataset(folder)
    assert all(instances(folder, split) == instances(dataset, split) for split in ("train2017", "val2017"))
    assert (folder / "settings.json").read_bytes() == (dataset / "settings.json").read_bytes()
    assert all(path.stat().st_mtime_ns == time for path, time in pictures.items())


def test_captions_without_colour_words_describe_the_same_scenes(dataset: Path, tmp_path: Path) -> None:
    silent = DatasetSettings(num_train=6, num_val=3, size=32, seed=3, colour_words=False)
    assert make_dataset(tmp_path, silent) and silent.to_dict()["colour_words"] is False
    assert "colour_words" not in DatasetSettings().to_dict()
    assert instances(tmp_path)["annotations"] == instances(dataset)["annotations"]
    for path in dataset.rglob("*.jpg"):
        assert (tmp_path / path.relative_to(dataset)).read_bytes() == path.read_bytes()
    words = (tmp_path / "annotations" / "captions_train2017.json").read_text().split()
    assert not {"red", "green", "blue", "yellow", "purple", "white"} & set(words)
    with pytest.raises(ValueError, match="'colour_words': False"):
        small_dataset(tmp_path)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_train must be at least 1, got 0"):
        DatasetSettings(num_train=0)


def test_perfect_detections_score_one() -> None:
    found = scenes(12)
    truth = detector_ap.ground_truth(found)
    detections = [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.9}
        for each in truth["annotations"]
    ]
    assert len(detections) == sum(len(scene.objects) for scene in found)
    assert average_precision(truth, detections, list(range(1, 13))).values["AP"] == pytest.approx(1.0)


def test_a_detector_of_photographs_recognises_the_drawings(shared: Path) -> None:
    detector = load_detector(shared / "models" / "yolox_nano.onnx")
    for category_id in (13, 52, 85):  # stop sign, banana, clock: the surest
        drawn = [render_single(np.random.default_rng((4, index)), category_id, 256) for index in range(3)]
        found = detector_ap.detect(detector, drawn)
        for image_id, scene in enumerate(drawn, start=1):
            best = max((each for each in found if each["image_id"] == image_id), key=lambda each: each["score"])
            assert best["category_id"] == category_id
            (x, y, width, height), (x_true, y_true, width_true, height_true) = best["bbox"], scene.objects[0].bbox
            assert abs(x + width / 2 - x_true - width_true / 2) < 16
            assert abs(y + height / 2 - y_true - height_true / 2) < 16
