"""From a request to pictures: the sampler's, growing, one user's beside another's, and again from their files."""

from __future__ import annotations

import json
import logging
import shlex
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scripts.sample
from engine.page.server import PageServer
from tests.helpers.page_world import QUICK, SCENE, Caller, pictures_of, pixels_of, served, tiny_studio
from tests.helpers.planners import write_planner
from tests.helpers.tiny import CONFIG, World, write_checkpoint

HOLE = [[0.5, 0.5, 1.0, 1.0]]


@pytest.fixture(scope="module")
def drawn(page: PageServer) -> list[dict[str, Any]]:
    """Two pictures of one scene."""
    return Caller(page).draw({"scene": SCENE, "seed": 5, "num_images": 2})


def edit_of(drawn: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"scene": SCENE, "seed": 9, "edit": {"picture": pictures_of(drawn)[0]["png"], "boxes": HOLE}, **more}


def test_the_facts_say_what_the_weights_place_and_begin_with(caller: Caller) -> None:
    status, content = caller.get("/facts")
    facts = json.loads(content)
    assert status == 200 and facts["labels"] == ["person", "dog", "sports ball"] and facts["max_objects"] == 4
    assert facts["options"] == QUICK.to_dict() and facts["size"] == [32, 32] and not facts["has_detector"]
    assert [scene["prompt"] for scene in facts["examples"]] == ["a dog and a ball", "a red dog"]


def test_pictures_are_those_of_the_pipeline(page: PageServer, drawn: list[dict[str, Any]]) -> None:
    studio = page.studio
    wish = studio.read({"scene": SCENE, "seed": 5})
    for seed, event in zip((5, 6), pictures_of(drawn), strict=True):
        (picture,) = studio.pipeline.draw([wish.scene], QUICK, [seed])
        assert event["seed"] == seed and np.array_equal(pixels_of(event["png"]), picture)
    assert drawn[-1]["scene"] == SCENE


def test_every_iteration_is_told_and_the_picture_grows(drawn: list[dict[str, Any]]) -> None:
    steps = [event for event in drawn if event["event"] == "step" and event["image"] == 0]
    assert [(step["iteration"], step["iterations"]) for step in steps] == [(number, 4) for number in (1, 2, 3, 4)]
    shown = [pixels_of(step["picture"])[..., 3] for step in steps if step["picture"]]
    shares = [(opacity == 255).mean() for opacity in shown]
    assert shares == sorted(shares) and shares[0] > 0 and set(np.unique(shown[0])) <= {0, 255}


def test_an_empty_prompt_and_no_boxes_are_drawn_too(caller: Caller) -> None:
    for scene in ({"prompt": "a red dog", "objects": []}, {**SCENE, "prompt": ""}):
        assert len(pictures_of(caller.draw({"scene": scene}))) == 1


def test_options_count(caller: Caller, drawn: list[dict[str, Any]]) -> None:
    (other,) = pictures_of(caller.draw({"scene": SCENE, "seed": 5, "options": {"cfg_text": 4.0, "num_iter": 2}}))
    assert not np.array_equal(pixels_of(other["png"]), pixels_of(pictures_of(drawn)[0]["png"]))


def test_two_users_at_once_get_their_own_pictures(caller: Caller) -> None:
    wishes = [{"scene": {**SCENE, "prompt": f"a dog {n}"}, "seed": 10 * n, "num_images": 2} for n in range(3)]
    alone = [[event["png"] for event in pictures_of(caller.draw(wish))] for wish in wishes]
    together: dict[int, list[dict[str, Any]]] = {}
    threads = [
        threading.Thread(target=lambda n=n, wish=wish: together.update({n: caller.draw(wish)}))
        for n, wish in enumerate(wishes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[event["png"] for event in pictures_of(together[n])] for n in range(3)] == alone
    assert {wish["scene"]["prompt"] for wish in wishes} == {
        events[-1]["scene"]["prompt"] for events in together.values()
    }
    assert any(event["event"] == "waiting" for events in together.values() for event in events)


def test_a_browser_that_goes_stops_its_job(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "engine.page.studio"):
        events = caller.stream({"scene": SCENE, "num_images": 16, "options": {"num_iter": 64}})
        assert next(events)["event"] == "step"
        events.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while "stopped after" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "stopped after" in caplog.text and "of 16 pictures" in caplog.text
    assert len(pictures_of(caller.draw({"scene": SCENE}))) == 1


def test_a_picture_s_file_restores_all_that_it_was_drawn_with(caller: Caller) -> None:
    wish = {"scene": SCENE, "seed": 7, "options": {**QUICK.to_dict(), "cfg_layout": 2.5}, "precision": "bf16"}
    (made,) = pictures_of(caller.draw(wish))
    status, found = caller.post("/open", {"content": made["png"]})
    assert status == 200 and np.array_equal(pixels_of(found.pop("picture")), pixels_of(made["png"]))
    assert found == {"scenes": [SCENE], **{name: wish[name] for name in ("seed", "options", "precision")}}
    (again,) = pictures_of(caller.draw({"scene": found.pop("scenes")[0], **found}))
    assert again["png"] == made["png"]


def test_a_layout_file_opens_with_all_its_scenes(caller: Caller) -> None:
    entries = [SCENE, {"prompt": "two", "objects": []}]
    assert caller.open(json.dumps(entries).encode()) == (200, {"scenes": entries})
    assert caller.open(json.dumps(SCENE).encode()) == (200, {"scenes": [SCENE]})


def test_any_other_picture_opens_cut_to_the_model_s_size(caller: Caller, tmp_path: Path) -> None:
    Image.effect_noise((90, 50), 40).convert("RGB").save(tmp_path / "a.jpg")
    status, found = caller.open((tmp_path / "a.jpg").read_bytes())
    assert status == 200 and found.keys() == {"picture"} and pixels_of(found["picture"]).shape == (32, 32, 3)


def test_editing_keeps_what_is_outside_and_opens_again(caller: Caller, drawn: list[dict[str, Any]]) -> None:
    wish = edit_of(drawn)
    (edited,) = pictures_of(caller.draw(wish))
    before, after = pixels_of(wish["edit"]["picture"]), pixels_of(edited["png"])
    assert np.array_equal(before[:12], after[:12]) and not np.array_equal(before[16:, 16:], after[16:, 16:])
    _, found = caller.post("/open", {"content": edited["png"]})
    assert np.array_equal(pixels_of(found["edit"]["picture"]), before) and found["edit"]["boxes"] == HOLE
    again = {"scene": found["scenes"][0], **{name: found[name] for name in ("seed", "options", "precision", "edit")}}
    assert pictures_of(caller.draw(again))[0]["png"] == edited["png"]


def test_boxes_in_words(world: World, tmp_path: Path) -> None:
    """For weights that know phrases; the others say that they do not."""
    write_checkpoint(world, tmp_path / "words.pth", replace(CONFIG, phrases=True))
    boxes = [[0.125, 0.25, 0.5, 0.75], [0.5, 0.0, 1.0, 0.5]]
    named = {"label": "dog", "phrase": "large red dog", "bbox": boxes[0]}
    described = {"label": "a blue bird", "bbox": boxes[1]}
    scene = {"prompt": "", "objects": [named, described]}
    with served(tiny_studio(world, checkpoint=tmp_path / "words.pth")) as server:
        caller = Caller(server)
        assert json.loads(caller.get("/facts")[1])["has_phrases"]
        (made,) = pictures_of(caller.draw({"scene": scene}))
        assert caller.post("/open", {"content": made["png"]})[1]["scenes"] == [scene]
        plain = {**scene, "objects": [{"label": "dog", "bbox": box} for box in boxes]}
        assert pictures_of(caller.draw({"scene": plain}))[0]["png"] != made["png"]
        described["label"] = "a" * 201
        assert "what a box holds has 201 characters" in caller.post("/draw", {"scene": scene})[1]["error"]


CONTROLS = {
    "layout_schedule": [0.3, 0.2],
    "layout_scale": 0.5,
    "drop_grounding_tokens": True,
    "negative_prompt": "a ball",
    "cfg_text": 2.0,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_each_control_counts_and_is_kept_in_the_file(caller: Caller, name: str) -> None:
    options = {**QUICK.to_dict(), "cfg_text": 3.0, "num_iter": 8}
    (plain,) = pictures_of(caller.draw({"scene": SCENE, "options": options}))
    (steered,) = pictures_of(caller.draw({"scene": SCENE, "options": {**options, name: CONTROLS[name]}}))
    assert not np.array_equal(pixels_of(plain["png"]), pixels_of(steered["png"]))
    assert caller.post("/open", {"content": steered["png"]})[1]["options"] == {**options, name: CONTROLS[name]}


def test_a_box_s_strength_counts(caller: Caller) -> None:
    weak = {**SCENE, "objects": [{**SCENE["objects"][0], "scale": 0.25}]}
    one, other = (pictures_of(caller.draw({"scene": scene}))[0]["png"] for scene in (SCENE, weak))
    assert not np.array_equal(pixels_of(one), pixels_of(other))
    assert caller.post("/open", {"content": other})[1]["scenes"] == [weak]


def test_a_layout_is_proposed_as_the_command_line_does(world: World, caller: Caller, tmp_path: Path) -> None:
    question = {"prompt": "a dog and a ball", "seed": 6}
    status, answer = caller.post("/propose", question)
    assert (
        status == 400 and "--planner_path" in answer["error"] and not json.loads(caller.get("/facts")[1])["has_planner"]
    )
    planner = write_planner(tmp_path / "planner.safetensors", world)
    studio = tiny_studio(world)
    studio.pipeline.load_planner(planner)
    with served(studio) as server:
        caller = Caller(server)
        status, scene = caller.post("/propose", question)
        assert (status, scene) == caller.post("/propose", question) and scene["objects"]
        assert caller.post("/propose", {**question, "seed": 7})[1] != scene
        for bad in ({"prompt": "  "}, {"prompt": "a" * 2001}, {"prompt": 1}, {"seed": 1}, {**question, "seed": -1}):
            assert caller.post("/propose", bad)[0] == 400
    flags = [
        "--resume",
        str(world.checkpoint),
        *world.frozen_flags(),
        "--planner_path",
        str(planner),
        "--num_iter",
        "2",
    ]
    flags += ["--num_sampling_steps", "2", "--num_images", "1", "--seed", "6", "--prompt", question["prompt"]]
    scripts.sample.main([*flags, "--layout", "auto", "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    (image,) = json.loads((tmp_path / "out" / "samples.json").read_text())["images"]
    assert {"prompt": image["prompt"], "objects": image["objects"]} == scene


def test_the_command_line_draws_the_same_pictures(
    caller: Caller, drawn: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a scene, of a caption alone with other options, and of a picture that is edited."""
    monkeypatch.chdir(tmp_path)
    cases = [
        {"scene": SCENE, "seed": 5, "num_images": 2},
        {"scene": {"prompt": "it's a 'dog'", "objects": []}, "seed": 3, "options": {"cfg_text": 3.0, "t_max": 900}},
        {"scene": SCENE, "seed": 4, "options": CONTROLS | {"drop_grounding_tokens": False}},
        edit_of(drawn),
    ]
    for wish in cases:
        events = caller.draw(wish)
        (tmp_path / "layout.json").write_text(json.dumps(wish["scene"]))
        if "edit" in wish:
            Image.fromarray(pixels_of(wish["edit"]["picture"])).save(tmp_path / "before.png")
        words = shlex.split(events[-1]["command"])
        assert words[:3] == ["python", "-m", "scripts.sample"]
        scripts.sample.main([*words[3:], "--device", "cpu", "--output_dir", "out"])
        for number, made in enumerate(pictures_of(events)):
            assert np.array_equal(
                pixels_of((tmp_path / "out" / f"{number:04d}.png").read_bytes()), pixels_of(made["png"])
            )
