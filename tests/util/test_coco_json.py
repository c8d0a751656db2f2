"""COCO's jsons at the door: spellings of one file that mean the same give the same, all others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.coco_fixture import annotation_path, write_coco
from util.coco import CocoSplit, read_split

Content = dict[str, Any]
NAN, INF = float("nan"), float("inf")


def changed(root: Path, change: Callable[[Content, Content], object]) -> CocoSplit:
    """The split after a change of both contents, instances and captions."""
    write_coco(root)
    paths = [annotation_path(root, kind) for kind in ("instances", "captions")]
    contents = [json.loads(path.read_text()) for path in paths]
    change(*contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    return read_split(root, "train2017", keep_crowd=True)


def plain(split: CocoSplit) -> list[object]:
    return [
        (split.categories, each.id, each.file_name, each.width, each.height, each.boxes_px.tolist(),
         each.categories.tolist(), each.caption_ids, each.captions, each.crowd.tolist())
        for each in split.images
    ]  # fmt: skip


def each_number(convert: Callable[[int], object], *, of_captions: bool) -> Callable[[Content, Content], None]:
    """All ids, sizes, coordinates and flags of a file, spelt otherwise."""

    def change(instances: Content, captions: Content) -> None:
        for entries in (captions if of_captions else instances).values():
            for entry in entries:
                for field in ("id", "image_id", "category_id", "width", "height", "iscrowd"):
                    if field in entry:
                        entry[field] = convert(entry[field])
                if "bbox" in entry:
                    entry["bbox"] = [convert(value) for value in entry["bbox"]]

    return change


def without(*fields: str) -> Callable[[Content, Content], None]:
    def change(instances: Content, captions: Content) -> None:
        for entry in [each for content in (instances, captions) for entries in content.values() for each in entries]:
            for field in fields:
                entry.pop(field, None)

    return change


def crowd_flags(convert: Callable[[int], object]) -> Callable[[Content, Content], None]:
    def change(instances: Content, captions: Content) -> None:
        for entry in instances["annotations"]:
            entry["iscrowd"] = convert(entry["iscrowd"])

    return change


def root_category(instances: Content, captions: Content) -> None:
    instances["categories"].insert(0, {"id": -5, "name": "leaf", "supercategory": "none"})


def root_category_behind(instances: Content, captions: Content) -> None:
    instances["categories"].append({"id": 999, "name": "leaf", "supercategory": "none"})


SAME: dict[str, Callable[[Content, Content], object]] = {
    "floats in instances": each_number(float, of_captions=False),
    "floats in captions": each_number(float, of_captions=True),
    "crowd as a truth value": crowd_flags(bool),
    "no optional fields": without("area", "segmentation", "iscrowd", "supercategory"),
    "unused root before": root_category,
    "unused root behind": root_category_behind,
    "captions without images": lambda i, c: c.pop("images"),
    "captions with empty categories": lambda i, c: c.update(categories=[]),
    "unknown fields": lambda i, c: i.update(info={"a": NAN}, licenses=None),
    "entries in another order": lambda i, c: [c["images"].reverse(), i["images"].reverse(), i["categories"].reverse()],
    "entries of unlisted images": lambda i, c: [
        i["annotations"].append({"id": 10**12, "image_id": 10**11, "category_id": 1, "bbox": [0, 0, 9, 9]}),
        c["annotations"].append({"id": 10**12, "image_id": 10**11, "caption": "not there"}),
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_that_mean_the_same_give_the_same(tmp_path, name):
    assert plain(changed(tmp_path / "a", SAME[name])) == plain(changed(tmp_path / "b", lambda i, c: None))


def put(kind: str, place: str, /, **values: object) -> Callable[[Content, Content], object]:
    """Fields of the first entry of a list; a value of ... removes one."""

    def change(instances: Content, captions: Content) -> None:
        entry = {"instances": instances, "captions": captions}[kind][place][0]
        for field, value in values.items():
            entry.pop(field) if value is ... else entry.update({field: value})

    return change


NUMBERS = ["7", "007", "photo-7", 7.5, True, None, [7], {"a": 7}, NAN, INF, -INF, 2**70, 10**400]
WHOLE_FIELDS = [
    ("instances", "images", "id"),
    ("instances", "images", "width"),
    ("instances", "images", "height"),
    ("instances", "annotations", "id"),
    ("instances", "annotations", "image_id"),
    ("instances", "annotations", "category_id"),
    ("instances", "categories", "id"),
    ("captions", "annotations", "id"),
    ("captions", "annotations", "image_id"),
]


@pytest.mark.parametrize(("kind", "name", "field"), WHOLE_FIELDS)
@pytest.mark.parametrize("value", [*NUMBERS, ...], ids=lambda value: repr(value)[:20])
def test_what_is_no_whole_number_is_refused(tmp_path, kind, name, field, value):
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put(kind, name, **{field: value}))
    assert_named(error.value, f"{kind}_train2017.json", f"{name}[0]", field)


@pytest.mark.parametrize("value", [*NUMBERS, "0", "1", 2, -1, 0.5, "no"], ids=lambda value: repr(value)[:20])
def test_crowd_is_0_or_1(tmp_path, value):
    if value is True:
        return
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put("instances", "annotations", iscrowd=value))
    assert_named(error.value, "instances_train2017.json", "annotations[0] (annotation 1000)", "iscrowd must be 0 or 1")


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [each for each in NUMBERS if each not in (7.5, 2**70)], ids=lambda v: repr(v)[:20])
def test_boxes_are_finite_numbers(tmp_path, place, value):
    box: list[object] = [1, 2, 3, 4]
    box[place] = value
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put("instances", "annotations", bbox=box))
    assert_named(
        error.value, "instances_train2017.json", "annotations[0] (annotation 1000)", "bbox must be four finite"
    )


@pytest.mark.parametrize("value", [None, [], [1, 2, 3], [1, 2, 3, 4, 5], "1 2 3 4", {"x": 1}, 5, ...])
def test_a_box_is_four_numbers(tmp_path, value):
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put("instances", "annotations", bbox=value))
    assert_named(error.value, "instances_train2017.json", "annotations[0]", "bbox")


@pytest.mark.parametrize("value", [
    "", ".", "/", "/etc/passwd.jpg", "../a.jpg", "a/../../b.jpg", "a\0b.jpg", "\ud800.jpg", 7, None, ["a.jpg"], ...,
    "../" * 10_000 + "a.jpg", "/\x1b[2J",
])  # fmt: skip
def test_file_names_stay_in_the_dataset(tmp_path, value):
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put("instances", "images", file_name=value))
    assert_named(error.value, "instances_train2017.json", "images[0] (image 1)", "file_name")


@pytest.mark.parametrize(("kind", "name", "field"), [
    ("captions", "annotations", "caption"),
    ("instances", "categories", "name"),
])  # fmt: skip
@pytest.mark.parametrize("value", [5, None, ["a"], "a \ud800 dog", ...], ids=repr)
def test_texts_are_texts(tmp_path, kind, name, field, value):
    with pytest.raises(ValueError) as error:
        changed(tmp_path, put(kind, name, **{field: value}))
    assert_named(error.value, f"{kind}_train2017.json", f"{name}[0]", field)


def both_used(instances: Content, captions: Content) -> None:
    instances["categories"].append({"id": 999, "name": "leaf"})
    instances["annotations"][0]["category_id"] = 999


def none_used(instances: Content, captions: Content) -> None:
    instances["categories"] += [{"id": 998, "name": "sky"}, {"id": 999, "name": "sky"}]


REFUSED: dict[str, tuple[Callable[[Content, Content], object], list[str]]] = {
    "no images": (lambda i, c: i.pop("images"), ["instances_train2017.json has no list 'images'"]),
    "images an object": (lambda i, c: i.update(images={}), ["has no list 'images'"]),
    "no captions": (lambda i, c: c.pop("annotations"), ["captions_train2017.json has no list 'annotations'"]),
    "an entry that is text": (lambda i, c: i["images"].insert(1, "a.jpg"), ["images[1]", "an object, got 'a.jpg'"]),
    "an entry that is null": (lambda i, c: c["annotations"].insert(0, None), ["annotations[0]", "None"]),
    "unknown category": (put("instances", "annotations", category_id=99),
                         ["annotations[0] (annotation 1000)", "category_id 99 is none of the 4 ids"]),
    "no width": (put("instances", "images", width=0), ["images[0] (image 1)", "the size is 0x64"]),
    "negative height": (put("instances", "images", height=-3), ["image 1", "the size is 97x-3"]),
    "blank category": (put("instances", "categories", name=" "), ["categories[0] (category 90)", "name"]),
    "image id twice": (lambda i, c: i["images"].append(i["images"][0]), ["images: id 1 occurs more than once"]),
    "image id twice, as a float": (lambda i, c: i["images"].append(i["images"][0] | {"id": 1.0}), ["images: id 1 occ"]),
    "box id twice": (lambda i, c: i["annotations"].append(i["annotations"][0]), ["annotations: id 1000 occurs more"]),
    "category id twice": (lambda i, c: i["categories"].append({"id": 3, "name": "x"}), ["categories: id 3 occurs"]),
    "caption id twice": (lambda i, c: c["annotations"].append(c["annotations"][0]),
                         ["captions_train2017.json", "annotations: id 100 occurs more"]),
    "a name with boxes twice": (both_used, ["the name 'leaf' belongs to the ids [3, 999]", "several have boxes"]),
    "a name without boxes twice": (none_used, ["the name 'sky' belongs to the ids [998, 999]", "none has boxes"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(tmp_path, case):
    change, wanted = REFUSED[case]
    with pytest.raises(ValueError) as error:
        changed(tmp_path, change)
    assert_named(error.value, *wanted)


def assert_named(error: ValueError, *wanted: str) -> None:
    said = str(error)
    assert all(each in said for each in wanted), said
    assert said.isprintable() and len(said) < 600


@pytest.mark.parametrize("content", ["[]", "null", "3", '"a"'])
def test_other_values_than_an_object(tmp_path, content):
    annotation_path(write_coco(tmp_path), "instances").write_text(content)
    with pytest.raises(ValueError, match=r"instances_train2017\.json must hold an object with .*got a "):
        read_split(tmp_path, "train2017")


def test_huge_coordinates_end_at_the_edge(tmp_path):
    split = changed(tmp_path, put("instances", "annotations", bbox=[-1e308, 5, 1.7e308, 1e308]))
    assert split.images[0].boxes_px.tolist()[0] == [0, 5, 97, 64]
