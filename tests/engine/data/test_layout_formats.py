"""Layout files of other projects: the same scenes from each, and errors that say how numbers were read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data.layout_convert import convert_layout
from engine.data.layout_formats import LAYOUT_FORMATS, FileFormat, read_entries
from engine.data.scenes import KnownLabels, Scene, read_layout_file
from tests.helpers.scene_files import CATEGORIES
from util.types import UNKNOWN

KNOWN = KnownLabels(CATEGORIES, 4)
WITH_PHRASES = KnownLabels(CATEGORIES, 4, has_phrases=True)
Objects = list[tuple[str, list[float]]]
SCENES: list[tuple[str, Objects]] = [  # in sixty-fourths, which all formats hold exactly
    ("a dog left of a person", [("dog", [0.125, 0.25, 0.5, 0.75]), ("person", [0.5, 0.0, 1.0, 1.0])]),
    ("a sports ball", [("sports ball", [0.25, 0.375, 0.625, 0.75])]),
]


def sides(box: list[float], scale: float = 1) -> list[float]:
    x0, y0, x1, y1 = (value * scale for value in box)
    return [x0, y0, x1 - x0, y1 - y0]


def lists(prompt_key: str, labels_key: str, boxes_key: str, **more: Any) -> Callable[[str, Objects], Any]:
    return lambda prompt, objects: (
        {prompt_key: prompt, labels_key: [name for name, _ in objects], boxes_key: [box for _, box in objects]} | more
    )


def of_pairs(objects: Objects, box: Callable[[list[float]], list[float]]) -> list[Any]:
    return [[name, box(own)] for name, own in objects]


def text_of(prompt: str, objects: Objects) -> str:
    lines = []
    for name, box in objects:
        left, top, width, height = sides(box, 64)
        lines.append(f"{name} {{height: {height:g}px; width: {width:g}px; top: {top:g}px; left: {left:g}px; }}")
    return "\n".join([f"Prompt: {prompt}", "Layout:", *lines, ""])


ENTRIES: dict[str, Callable[[str, Objects], Any]] = {
    "structmar": lambda prompt, objects: {
        "prompt": prompt, "objects": [{"label": name, "bbox": box} for name, box in objects]
    },
    "gligen": lists("prompt", "phrases", "locations", alpha_type=[1, 0, 0], save_folder_name="x"),
    "diffusers": lists("prompt", "gligen_phrases", "gligen_boxes", num_inference_steps=50),
    "creatilayout": lists("global_caption", "region_caption_list", "region_bboxes_list"),
    "instancediffusion": lambda prompt, objects: {
        "caption": prompt, "width": 512, "height": 256,
        "annos": [{"bbox": [v * s for v, s in zip(sides(box), (512, 256, 512, 256), strict=True)], "mask": [],
                   "category_name": "", "caption": name} for name, box in objects],
    },
    "layoutgpt": lambda prompt, objects: {
        "iter": 0, "prompt": prompt, "query_id": 7, "object_list": of_pairs(objects, list)
    },
    "nsr1k": lambda prompt, objects: {"prompt": prompt, "image_id": 7, "object_list": of_pairs(objects, sides)},
}  # fmt: skip
SPATIAL = {"prompt": SCENES[0][0], "image_id": 3, "relation": "left",
           "obj1": ["dog", sides(SCENES[0][1][0][1])], "obj2": ["person", sides(SCENES[0][1][1][1])]}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(content: object, name: str = "layout.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


def require_the_scenes(scenes: list[Scene], expected: list[tuple[str, Objects]]) -> None:
    found = [(scene.prompt, list(zip(scene.names, scene.layout.boxes_xyxy.tolist(), strict=True))) for scene in scenes]
    assert found == expected
    assert all((scene.layout.categories >= 0).all() and not scene.layout.phrases for scene in scenes)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("name", ENTRIES)
def test_each_format_gives_the_same_scenes(write: Any, name: str, said: bool) -> None:
    entries = [ENTRIES[name](*scene) for scene in SCENES]
    form = FileFormat(name) if said else None
    require_the_scenes(read_layout_file(write(entries), KNOWN, said=form), SCENES)
    require_the_scenes(read_layout_file(write("\n".join(map(json.dumps, entries))), KNOWN, said=form), SCENES)  # lines
    require_the_scenes(read_layout_file(write(entries[0]), KNOWN, said=form), SCENES[:1])


def test_pairs_text_and_sidecars_give_them_too(write: Any) -> None:
    require_the_scenes(read_layout_file(write(SPATIAL), KNOWN), SCENES[:1])
    text = write("\n".join(text_of(*scene) for scene in SCENES), "answer.txt")
    require_the_scenes(read_layout_file(text, KNOWN, said=FileFormat(None, (64, 64))), SCENES)
    (prompt, objects), lines = SCENES[0], [{"label": name, "bbox": box} for name, box in SCENES[0][1]]
    sidecar = write("\n".join(map(json.dumps, lines)), "photo.bbox")
    assert [scene.prompt for scene in read_layout_file(sidecar, KNOWN, prompt="mine")] == ["mine"]
    with pytest.raises(ValueError, match=r"photo\.bbox: 'prompt' is missing"):
        read_layout_file(sidecar, KNOWN)
    write(f"  {prompt} \nanother one\n", "photo.txt")
    require_the_scenes(read_layout_file(sidecar, KNOWN), [(prompt, objects)])
    require_the_scenes(read_layout_file(write(lines, "photo.bbox"), KNOWN), [(prompt, objects)])
    (blank,) = read_layout_file(write(" \n", "photo.bbox"), KNOWN)
    assert blank.prompt == prompt and len(blank.layout) == 0


def test_all_formats_are_tried_above() -> None:
    assert set(LAYOUT_FORMATS) == {*ENTRIES, "bbox", "layoutgpt_text"}


def test_the_two_meanings_of_object_list(write: Any) -> None:
    """The same numbers, told apart by the id beside them, by a flag, or not at all."""
    entry = {"prompt": "a dog", "object_list": [["dog", [0.25, 0.25, 0.5, 0.75]]]}

    def box(more: dict[str, int], form: str | None = None) -> list[float]:
        (scene,) = read_layout_file(write(entry | more), KNOWN, said=FileFormat(form))
        return list(scene.layout.boxes_xyxy[0].tolist())

    assert box({"query_id": 1}) == box({}, "layoutgpt") == [0.25, 0.25, 0.5, 0.75]
    assert box({"image_id": 1}) == box({}, "nsr1k") == box({"query_id": 1}, "nsr1k") == [0.25, 0.25, 0.75, 1.0]
    undecided = r"entry 0 may be LayoutGPT's \(boxes \[x0, y0, x1, y1\].*NSR-1K's \(boxes \[x, y, width, height\].*nsr1k"
    for more in ({}, {"query_id": 1, "image_id": 1}):
        with pytest.raises(ValueError, match=undecided):
            box(more)


def bad_box(name: str, box: list[float]) -> Any:
    return ENTRIES[name]("a dog", [("dog", box)])


WRONG: dict[str, tuple[Any, FileFormat | None, str]] = {
    "corners that are sides": (
        bad_box("layoutgpt", [0.5, 0.25, 0.25, 0.75]), None,
        r"entry 0, object 0 \('dog'\): 'object_list\[0\]' \[0\.5, .*\] is no box read as LayoutGPT's \[x0, y0, x1, y1\] in "
        r"\[0, 1\]: x0 = 0\.5 is not below x1 = 0\.25; as NSR-1K's \[x, y, width, height\] in \[0, 1\] it would be the box "
        r"\[0\.5, 0\.25, 0\.75, 1\]",
    ),
    "sides that are corners": (
        {"image_id": 1, "prompt": "a dog", "object_list": [["dog", [0.5, 0.25, 0.75, 1.0]]]}, None,
        r"NSR-1K's \[x, y, width, height\].*: x1 is 1\.25, not in \[0, 1\]; as LayoutGPT's .* would be the box \[0\.5, 0\.25",
    ),
    "neither": (bad_box("gligen", [0.5, 0.5, 0.25, 7]), None, r"GLIGEN's .*y1 is 7, not .*; nor is it one as \[x, y, width"),
    "GLIGEN's style box": (bad_box("gligen", [0.0, 1.0, 0.0, 1.0]), None, r"x0 = 0 is not below x1 = 0; nor is it one as"),
    "off the canvas": (bad_box("instancediffusion", [0.5, 0.5, 1.5, 1.0]), None,
                       r"canvas 512 wide and 256 high: x1 is 1\.5"),
    "ours with sides": ({"prompt": "a", "objects": [{"label": "dog", "bbox": [0.5, 0.5, 0.25, 0.25]}]}, None,
                        r"needs x0 < x1, got x0 = 0\.5, x1 = 0\.25 .*as \[x, y, width, height\] in \[0, 1\] it would be"),
    "infinite": (bad_box("diffusers", [0, 0, float("inf"), 1]), None, r"'gligen_boxes' must be four numbers \[x0.*inf"),
    "three numbers": (bad_box("creatilayout", [0, 0, 1]), None, r"'region_bboxes_list' must be four numbers .*\[0, 0, 1\]"),
    "one label too few": (ENTRIES["gligen"](*SCENES[0]) | {"phrases": ["dog"]}, None,
                          r"'phrases' has 1 entries and 'locations' 2"),
    "keys of two": (ENTRIES["gligen"](*SCENES[0]) | {"objects": []}, None,
                    r"may be StructMAR's .* or GLIGEN's .* it has 'objects' and 'phrases'\. Say which by --layout_format"),
    "two formats": ([ENTRIES["gligen"](*SCENES[0]), ENTRIES["diffusers"](*SCENES[0])], None,
                    r"entry 1 has the keys of diffusers's .*, entry 0 those of GLIGEN's .*: a file has one format"),
    "said to be another": (ENTRIES["creatilayout"](*SCENES[0]), FileFormat("gligen"),
                           r"'phrases' is missing.*; it was read as GLIGEN's .* and has keys of CreatiLayout's"),
    "a list of numbers": ([3], FileFormat("nsr1k"), r"entry 0: must be an object as NSR-1K has it, got 3"),
    "grounded by pictures": (ENTRIES["gligen"](*SCENES[0]) | {"text_mask": [1, 0]}, None, r"ground boxes by pictures"),
    "no size": ({"caption": "a", "annos": []}, None, r"'height' of the picture, in pixels, is needed for 'bbox', got None"),
    "nothing in the box": (ENTRIES["instancediffusion"]("a", [("", [0, 0, 1, 1])]), None,
                           r"annos\[0\]: neither 'category_name' nor 'caption'"),
    "unknown label": (ENTRIES["gligen"]("a", [("dogg", [0, 0, 1, 1])]), None, r"unknown label 'dogg'; did you mean 'dog'"),
    "text without canvas": (text_of(*SCENES[0]), None, r"--layout_canvas 64x64"),
    "text off the canvas": (text_of(*SCENES[0]), FileFormat(None, (32, 64)),
                            r"entry 0 \(line 3\), object 0 \('dog'\): .* LayoutGPT's .* 64 wide and 32 high: y1 is 1\.5"),
    "text of another kind": ("Prompt: a\ndog at 3, 4", FileFormat(None, (64, 64)), r"must be 'label \{height: .*got 'dog at"),
    "canvas of json": (bad_box("gligen", [0, 0, 1, 1]), FileFormat(None, (64, 64)), r"is JSON, .*--layout_canvas"),
    "no object": ([], None, "empty list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_file_object_and_readings(write: Any, case: str) -> None:
    content, said, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        read_layout_file(write(content), KNOWN, said=said)
    assert "layout file" in str(error.value) and "layout.json" in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of structmar, .*, got 'coco'"):
        FileFormat("coco")


def test_rounding_stays_on_the_edge(write: Any) -> None:
    """0.7 + 0.3 may be more than 1, and pixels are rounded."""
    (pair,) = read_layout_file(write(SPATIAL | {"obj2": ["dog", [0.1 + 0.2 + 0.4, 0, 0.3 + 1e-9, 1]]}), KNOWN)
    assert pair.layout.boxes_xyxy[1, 2] == 1
    pixels = {"caption": "a", "width": 640, "height": 480, "annos": [{"bbox": [-0.2, 0, 640.4, 480], "caption": "dog"}]}
    (scene,) = read_layout_file(write(pixels), KNOWN)
    assert scene.layout.boxes_xyxy.tolist() == [[0, 0, 1, 1]]


def test_labels_of_other_formats_are_categories_or_phrases(write: Any) -> None:
    """An article and capitals do not hide a category; what is none counts as a phrase, where the model has these."""
    entry = ENTRIES["gligen"]("x", [("A dog", [0, 0, 1, 1]), ("the sports ball", [0, 0, 1, 0.5])])
    (scene,) = read_layout_file(write(entry), KNOWN)
    assert scene.names == ["dog", "sports ball"]
    annos = {"caption": "x", "width": 8, "height": 8, "annos": [
        {"bbox": [0, 0, 8, 8], "category_name": "dog", "caption": "a brown dog"},
        {"bbox": [0, 0, 4, 4], "category_name": "", "caption": "a red umbrella"},
    ]}  # fmt: skip
    (scene,) = read_layout_file(write(annos), WITH_PHRASES)
    assert scene.layout.categories.tolist() == [1, UNKNOWN]
    assert scene.layout.phrases == ("a brown dog", "a red umbrella")
    with pytest.raises(ValueError, match="'phrase' 'a brown dog', but these weights were trained without phrases"):
        read_layout_file(write(annos), KNOWN)


def test_keys_that_say_something_else_are_named(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    entry = ENTRIES["gligen"](*SCENES[0]) | {"alpha_type": [0.3, 0, 0.7]}
    with caplog.at_level(logging.INFO):
        read_entries(write([entry, entry]))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "not read: 'save_folder_name'" in caplog.text and "--layout_schedule" in caplog.text


@pytest.mark.parametrize("name", ENTRIES)
def test_every_format_is_written_as_ours_and_as_gligens(write: Any, tmp_path: Path, name: str) -> None:
    source = write([ENTRIES[name](*scene) for scene in SCENES])
    for is_gligen in (False, True):
        done = convert_layout(source, tmp_path / "new.json", is_gligen, FileFormat(), None, leaves_out=False)
        assert done.written == len(SCENES)
        content = json.loads((tmp_path / "new.json").read_text())
        assert content == [ENTRIES["gligen" if is_gligen else "structmar"](*scene) for scene in SCENES] or is_gligen
        assert set(content[0]) == ({"prompt", "phrases", "locations", "alpha_type"} if is_gligen else {"prompt", "objects"})
        require_the_scenes(read_layout_file(tmp_path / "new.json", KNOWN), SCENES)


def test_what_gligen_cannot_say_is_an_error(write: Any, tmp_path: Path) -> None:
    ours = ENTRIES["structmar"](*SCENES[0])
    for changes, message in (
        ({"height": 64, "width": 64}, r"entry 0: 'height' 64 has no place in GLIGEN's format"),
        ({"objects": [ours["objects"][0] | {"scale": 2}]}, r"entry 0, object 0: 'scale' 2\.0 has no place"),
        ({"objects": [ours["objects"][0] | {"edit": True}]}, r"'edit' True has no place"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_layout(write(ours | changes), tmp_path / "new.json", True, FileFormat(), None, leaves_out=False)
    assert not (tmp_path / "new.json").exists()
    with_phrase = ours | {"objects": [ours["objects"][0] | {"phrase": "a brown dog"}, ours["objects"][1]]}
    convert_layout(write(with_phrase), tmp_path / "new.json", True, FileFormat(), None, leaves_out=False)
    assert json.loads((tmp_path / "new.json").read_text())[0]["phrases"] == ["a brown dog", "person"]


def test_wrong_entries_can_be_left_out(write: Any, tmp_path: Path) -> None:
    """A model's answers hold some boxes that are none."""
    entries = [bad_box("layoutgpt", [0.5, 0, 0.25, 1]), ENTRIES["layoutgpt"](*SCENES[1])]
    done = convert_layout(write(entries), tmp_path / "new.json", False, FileFormat(), None, leaves_out=True)
    assert done.written == 1 and "entry 0, object 0" in done.left_out[0] and "left out 1" in done.words
    require_the_scenes(read_layout_file(tmp_path / "new.json", KNOWN), SCENES[1:])
    with pytest.raises(ValueError, match="no entry of .* is left; the first one that is wrong: .*entry 0, object 0"):
        convert_layout(write(entries[:1]), tmp_path / "new.json", False, FileFormat(), None, leaves_out=True)


def test_scenes_of_phrases_alone_survive_a_round_trip(write: Any) -> None:
    """A label that is no category needs no phrase beside it to be one."""
    entry = ENTRIES["structmar"]("x", [("red kite", [0.0, 0.0, 1.0, 1.0])])
    (scene,) = read_layout_file(write(entry), WITH_PHRASES)
    assert scene.to_dict() == entry and scene.layout.phrases == ("red kite",)
    (again,) = read_layout_file(write(scene.to_dict()), WITH_PHRASES)
    assert torch.equal(again.layout.categories, scene.layout.categories) and again.layout.phrases == ("red kite",)
