"""Layout files: what a good one gives, and the one line every kind of bad one gets."""

import json
from pathlib import Path

import pytest
import torch

from engine.data.scenes import KnownLabels, Scene, empty_layout, read_layout_file, scenes_from_dataset
from util.coco import CocoIndex
from util.types import Category, Layout
from tests.helpers.scene_files import CATEGORIES, write_coco

DOG = {"label": "dog", "bbox": [0.1, 0.2, 0.5, 0.6]}


@pytest.fixture
def write(tmp_path):
    def write_file(content: object) -> Path:
        path = tmp_path / "layout.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


def entry(**changes: object) -> dict[str, object]:
    return {"prompt": "a dog", "objects": [DOG]} | changes


def with_bbox(*box: object) -> dict[str, object]:
    return entry(objects=[DOG, {"label": "person", "bbox": list(box)}])


def test_single_entry_and_list(write):
    (scene,) = read_layout_file(write(entry()), KnownLabels(CATEGORIES, 4))
    assert scene.prompt == "a dog" and scene.names == ["dog"]
    assert scene.layout.categories.tolist() == [1]  # the position among the categories, not the dataset's id
    torch.testing.assert_close(scene.layout.boxes_xyxy, torch.tensor([[0.1, 0.2, 0.5, 0.6]]))
    many = read_layout_file(write([entry(), entry(prompt="two", objects=[])]), KnownLabels(CATEGORIES, 4))
    assert [len(scene.layout) for scene in many] == [1, 0] and many[1].prompt == "two"


def test_prompt_argument_overrides_and_fills(write):
    path = write([entry(), {"objects": [DOG]}])
    assert [scene.prompt for scene in read_layout_file(path, KnownLabels(CATEGORIES, 4), prompt="mine")] == ["mine", "mine"]


def test_whole_numbers_and_the_full_image_are_fine(write):
    (scene,) = read_layout_file(write(with_bbox(0, 0, 1, 1)), KnownLabels(CATEGORIES, 2))
    assert scene.layout.boxes_xyxy[1].tolist() == [0, 0, 1, 1]


def test_scene_round_trip_is_exact(write):
    boxes = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)) / 2
    layout = Layout(torch.cat([boxes, boxes + 1 / 3], dim=1), torch.tensor([2, 0, 1]))
    scene = Scene("a prompt with “quotes”", layout, ["sports ball", "person", "dog"])
    (read,) = read_layout_file(write([scene.to_dict()]), KnownLabels(CATEGORIES, 4))
    assert read.prompt == scene.prompt and read.names == scene.names
    assert torch.equal(read.layout.boxes_xyxy, layout.boxes_xyxy)
    assert torch.equal(read.layout.categories, layout.categories)


BAD_FILES = {
    "not json": ('{"prompt": ', r"is not valid JSON: .*line 1"),
    "empty list": ([], "empty list"),
    "entry is a string": (["a dog"], r"entry 0: must be an object .* got 'a dog'"),
    "no prompt": ([entry(), {"objects": []}], r"entry 1: 'prompt' is missing; .*--prompt"),
    "prompt is a number": (entry(prompt=3), r"entry 0: 'prompt' must be a string, got 3"),
    "no objects": ({"prompt": "a dog"}, r"entry 0: 'objects' is missing"),
    "objects is a dictionary": (entry(objects=DOG), r"entry 0: 'objects' must be a list, got \{"),
    "misspelt key": (entry(object=[DOG]), r"entry 0: unknown key 'object'; did you mean 'objects'\?"),
    "object is a list": (entry(objects=[DOG, [0, 0, 1, 1]]), r"entry 0, object 1: must be an object .* got \[0, 0"),
    "no label": (entry(objects=[{"bbox": [0, 0, 1, 1]}]), r"entry 0, object 0: 'label' is missing"),
    "no bbox": (entry(objects=[{"label": "dog"}]), r"entry 0, object 0: 'bbox' is missing, got \{'label': 'dog'\}"),
    "misspelt bbox": (entry(objects=[DOG | {"box": 1}]), r"object 0: unknown key 'box'; did you mean 'bbox'\?"),
    "label is a number": (entry(objects=[{"label": 18, "bbox": [0, 0, 1, 1]}]), r"'label' must be a string, got 18"),
    "unknown label": (
        entry(objects=[DOG | {"label": "sport ball"}]),
        r"object 0: unknown label 'sport ball'; did you mean 'sports ball'\?",
    ),
    "wrong case": (entry(objects=[DOG | {"label": "DOG"}]), r"unknown label 'DOG'; did you mean 'dog'\?"),
    "nothing close": (entry(objects=[DOG | {"label": "xylophone"}]), "known: person, dog, sports ball"),
    "three numbers": (with_bbox(0, 0, 1), r"object 1 \('person'\): 'bbox' must be four numbers .* got \[0, 0, 1\]"),
    "bbox is a string": (
        entry(objects=[DOG | {"bbox": "0 0 1 1"}]),
        r"'bbox' must be four numbers .* got '0 0 1 1'",
    ),
    "text in bbox": (with_bbox(0, 0, "1", 1), r"'bbox' x1 must be a number, got '1' in \[0, 0, '1', 1\]"),
    "true in bbox": (with_bbox(0, 0, True, 1), r"'bbox' x1 must be a number, got True"),
    "null in bbox": (with_bbox(0, 0, None, 1), r"'bbox' x1 must be a number, got None"),
    "pixels": (with_bbox(12, 0, 200, 100), r"'bbox' x0 = 12 is not in \[0, 1\] .*fractions of the image"),
    "negative": (with_bbox(0, -0.1, 1, 1), r"'bbox' y0 = -0\.1 is not in \[0, 1\]"),
    "nan": (with_bbox(0, 0, float("nan"), 1), r"'bbox' x1 = nan is not in \[0, 1\]"),
    "infinity": (with_bbox(0, 0, 1, float("inf")), r"'bbox' y1 = inf is not in \[0, 1\]"),
    "huge": (with_bbox(0, 0, 10**400, 1), r"'bbox' x1 = 1000000.* is not in \[0, 1\]"),
    "left-right swapped": (with_bbox(0.7, 0.1, 0.2, 0.9), r"needs x0 < x1, got x0 = 0\.7, x1 = 0\.2"),
    "upside down": (with_bbox(0.1, 0.9, 0.2, 0.3), r"needs y0 < y1, got y0 = 0\.9, y1 = 0\.3"),
    "no width": (with_bbox(0.5, 0.1, 0.5, 0.9), r"needs x0 < x1, got x0 = 0\.5, x1 = 0\.5"),
    "no width in float32": (with_bbox(0.5, 0.1, 0.5 + 1e-12, 0.9), r"needs x0 < x1"),
    "blank prompt": (entry(prompt=" \n\t"), r"entry 0: 'prompt' is blank, got ' \\n\\t'"),
    "lone surrogate": ('{"prompt": "a \\ud800 dog", "objects": []}', r"entry 0: 'prompt' is no text: .*lone surrogate"),
    "key twice": ('{"prompt": "a", "prompt": "b", "objects": []}', r"layout\.json: key 'prompt' is there twice"),
    "deep prompt": ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", r"'prompt' must be a string, got \[\[\["),
    "label of a megabyte": (entry(objects=[DOG | {"label": "x" * 2**20}]), r"unknown label 'xxx"),
    "label with terminal escapes": (entry(objects=[DOG | {"label": "\x1b[2J\x07"}]), r"unknown label '\\x1b\[2J\\x07'"),
    "key with terminal escapes": (entry(**{"\x1b[2J" * 1000: 1}), r"unknown key '\\x1b\[2J"),
    "too many": (entry(objects=[DOG] * 5), r"entry 0: 5 objects, but the checkpoint places at most 4"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_layout_files(write, case):
    content, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=message) as error:
        read_layout_file(write(content), KnownLabels(CATEGORIES, 4))
    assert "layout.json" in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_layout_file(tmp_path / "none.json", KnownLabels(CATEGORIES, 4))
    (tmp_path / "image.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.json is not UTF-8 text"):
        read_layout_file(tmp_path / "image.json", KnownLabels(CATEGORIES, 4))




def test_scenes_from_dataset(tmp_path):
    write_coco(tmp_path)
    index = CocoIndex.load(tmp_path, "val2017")
    scenes = scenes_from_dataset(index, 64, 2)
    assert [scene.prompt for scene in scenes] == ["caption 0 of 1", "caption 0 of 3"]
    assert [scene.names for scene in scenes] == [["dog"], ["sports ball", "person"]]  # largest first
    torch.testing.assert_close(scenes[0].layout.boxes_xyxy, torch.tensor([[0.0, 0.0, 0.5, 1.0]]))  # centre crop
    with pytest.raises(ValueError, match="3 scenes were asked for, but val2017 has 2 images with boxes"):
        scenes_from_dataset(index, 64, 3)


def test_scene_needs_a_name_per_box():
    with pytest.raises(ValueError, match="2 names for 0 boxes"):
        Scene("a", empty_layout(), ["a", "b"])


def test_example_files_parse():
    """The files under configs/layouts name COCO classes and keep the rules."""
    folder = Path(__file__).parents[3] / "configs" / "layouts"
    paths = sorted(folder.glob("*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        labels = sorted({item["label"] for scene in content for item in scene["objects"]})
        scenes = read_layout_file(path, KnownLabels([Category(i, label) for i, label in enumerate(labels)], 8, True))
        assert len(scenes) == len(content)
