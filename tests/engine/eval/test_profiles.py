"""Evaluation profiles: what is shipped, strict reading, and a hash that follows every number and no word."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import yaml

from engine.eval.profiles import CONFIGS, Profile, available_profiles, load_profile

NAMES = {
    "structmar-256", "gligen2014", "coco2017-instdiff", "lama3097", "creati2565", "mini", "coco-original",
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Writes the structmar-256 profile with changes (a field set to `...` is left out) and returns its path."""

    def _write(**changes):
        values = yaml.safe_load((CONFIGS / "eval_structmar_256.yaml").read_text()) | changes
        path = tmp_path / "profile.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not ...}))
        return path

    return _write


def test_shipped_profiles_load_under_their_names():
    assert set(available_profiles()) >= NAMES
    profiles = [load_profile(name) for name in available_profiles()]
    assert [profile.name for profile in profiles] == available_profiles()
    assert len({profile.hash for profile in profiles}) == len(profiles)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("structmar-256", ("val2014", "center_crop", 256, 0.01, 0.2, 16, 1, None, None, False, None, 0.3)),
        ("gligen2014", ("val2014", "center_crop", 256, 0.01, 0.0, 30, 0, None, None, False, 30000, 0.3)),
        ("coco2017-instdiff", ("val2017", "squash", 512, 0.0, 0.0, 30, 0, None, None, True, None, 0.3)),
        ("lama3097", ("val2017", "squash", 256, 0.02, 0.0, 8, 3, 8, None, False, None, 0.25)),
        ("creati2565", ("val2017", "squash", 256, 0.02, 0.0, 10, 2, 10, 3, False, None, 0.3)),
        ("mini", ("val2017", "center_crop", 64, 0.002, 0.2, 8, 1, None, None, False, None, 0.3)),
        ("coco-original", ("val2017", "original", None, 0.0, 0.0, 100, 0, None, None, False, None, 0.3)),
    ],
)
def test_shipped_profiles_say_what_their_protocols_say(name, expected):
    profile = load_profile(name)
    fields = (
        "split", "geometry", "resolution", "min_area", "min_visibility", "max_objects", "min_boxes", "max_boxes",
        "max_persons", "keep_crowd", "num_images", "match_score",
    )  # fmt: skip
    assert tuple(getattr(profile, field) for field in fields) == expected
    assert (profile.min_score, profile.max_detections) == (0.001, 100)
    assert profile.area_edges_px == ((10.0, 20.0) if name == "mini" else (32.0, 96.0))


def test_published_protocols_say_what_they_leave_open():
    for name in ("gligen2014", "coco2017-instdiff", "lama3097", "creati2565"):
        assert any("hosen" in line for line in load_profile(name).unknown)


def test_a_file_is_the_profile_it_was_copied_from(write):
    assert load_profile(write()) == load_profile(str(write())) == load_profile("structmar-256")
    assert load_profile(write(name="my own")).name == "my own"


def test_the_hash_follows_numbers_not_words():
    profile = load_profile("structmar-256")
    words = replace(profile, description="other words", unknown=("nothing",), detector="another")
    assert words.hash == profile.hash and len(profile.hash) == 12
    assert replace(profile, min_visibility=0).hash == replace(profile, min_visibility=0.0).hash
    changes = {
        "name": "b", "split": "val2017", "geometry": "squash", "resolution": 512, "min_area": 0.02,
        "min_visibility": 0.5, "max_objects": 8, "min_boxes": 0, "max_boxes": 8, "max_persons": 3, "keep_crowd": True,
        "num_images": 5, "min_score": 0.05, "nms_iou": 0.5, "max_detections": 10, "match_score": 0.5,
        "area_edges_px": (8, 16),
    }  # fmt: skip
    assert set(changes) == set(asdict(profile)) - {"description", "unknown", "detector"}
    hashes = {replace(profile, **{field: value}).hash for field, value in changes.items()}
    assert len(hashes | {profile.hash}) == len(changes) + 1


def test_the_hash_of_one_profile_is_pinned():
    """Published numbers carry it: a change of how hashes are made would orphan them."""
    profile = Profile(
        "pinned", "words", (), "val2017", "squash", 256, 0.02, 0, 8, 3, 8, None, False, None, "any", 0.001, None, 100,
        0.3, (32, 96),
    )  # fmt: skip
    assert profile.hash == "a6568684aaa2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_object": 3}, "unknown field max_object, did you mean max_objects"),
        ({"split": ...}, "missing split"),
        ({"split": 2017}, "split must be text, got 2017"),
        ({"description": ""}, "description must be text"),
        ({"unknown": "one text"}, "unknown must be a list of texts, got 'one text'"),
        ({"geometry": "crop"}, "geometry must be one of center_crop, squash, original, got 'crop'"),
        ({"keep_crowd": 1}, "keep_crowd must be true or false, got 1"),
        ({"resolution": 256.0}, "resolution must be a whole number of at least 1, got 256.0"),
        ({"resolution": None}, "resolution must be null for the geometry 'original'"),
        ({"geometry": "original"}, "resolution must be null for the geometry 'original'"),
        ({"max_objects": 0}, "max_objects must be a whole number of at least 1, got 0"),
        ({"max_objects": None}, "max_objects must be a whole number of at least 1, got None"),
        ({"min_boxes": True}, "min_boxes must be a whole number of at least 0, got True"),
        ({"min_boxes": 4, "max_boxes": 3}, "max_boxes must be at least min_boxes=4, got 3"),
        ({"min_area": 2}, "min_area must be a number in [0, 1], got 2"),
        ({"min_area": "0.01"}, "min_area must be a number in [0, 1], got '0.01'"),
        ({"match_score": None}, "match_score must be a number in [0, 1], got None"),
        ({"min_score": float("nan")}, "min_score must be a number in [0, 1], got nan"),
        ({"area_edges_px": [96, 32]}, "area_edges_px must be two growing numbers of pixels, got [96, 32]"),
        ({"area_edges_px": 32}, "area_edges_px must be two growing numbers of pixels, got 32"),
    ],
)
def test_mistakes_name_file_field_and_value(write, changes, message):
    path = write(**changes)
    with pytest.raises(ValueError) as error:
        load_profile(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"unknown profile 'lama3079'; did you mean 'lama3097'\? Known: .*-256"):
        load_profile("lama3079")
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_profile(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="list.yaml must be a mapping"):
        load_profile(tmp_path / "list.yaml")


def test_a_shipped_file_must_carry_its_name(monkeypatch, tmp_path, write):
    monkeypatch.setattr("engine.eval.profiles.CONFIGS", tmp_path)
    write().rename(tmp_path / "eval_other.yaml")
    with pytest.raises(ValueError, match="name must be 'other', as the file's, got 'structmar-256'"):
        load_profile("other")
