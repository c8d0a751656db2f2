"""scripts.page: what it refuses, and the page as a person uses it, in headless Chromium on the committed weights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scripts.page
from tests.conftest import ROOT
from tests.helpers.browser import chromium

QUICK = ["--num_iter", "6", "--num_sampling_steps", "5", "--num_threads", "1", "--device", "cpu"]
WAIT_MS = 60_000


def test_the_committed_weights_stand_in_where_none_are_named() -> None:
    stand_in = ["--config", scripts.page.DEFAULT_CONFIG]
    assert scripts.page.with_default_config(["--port", "1"]) == [*stand_in, "--port", "1"]
    for words in (["--resume", "a"], ["--resume=a", "--port", "1"], ["--config", "b"]):
        assert scripts.page.with_default_config(words) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host '0.0.0.0' is no name: --allowed_hosts says"),
        (["--port", "65536"], "--port must be at most 65535, got 65536"),
        (["--resume", ""], "--resume is empty"),
        (["--resume", "none.pth"], "none.pth does not exist"),
        (["--detector", "none.pth"], "detector none.pth does not exist"),
        (["--examples", "none.json"], "layout file none.json does not exist"),
        (["--host", "203.0.113.1"], "cannot listen on host 203.0.113.1, port 8000"),
        (["--cfg", "101"], r"--cfg must lie in \[0, 100\], got 101"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        scripts.page.main(words)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of the page as a process of its own, on the committed weights."""
    command = [sys.executable, "-m", "scripts.page", "--port", "0", *QUICK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    found = re.fullmatch(r"page: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
    if not found:
        pytest.fail(f"{line}{process.communicate()[1]}")
    yield found[1]
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Any]:
    with chromium() as started:
        yield started


class Person:
    """Somebody at the page."""

    def __init__(self, browser: Any, url: str, folder: Path) -> None:
        self.folder, self.errors = folder, []
        self.tab = browser.new_page(viewport={"width": 1200, "height": 1000}, accept_downloads=True)
        self.tab.set_default_timeout(WAIT_MS)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.tab.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.tab.goto(url)
        self.tab.wait_for_selector("#objects li")  # the first example

    def clear(self) -> None:
        for _ in range(self.tab.locator("#objects li").count()):
            self.tab.locator("#objects li button").first.click()

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one point of the picture to another, in shares of its sides."""
        area = self.tab.locator("#canvas").bounding_box()
        at = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
        self.tab.mouse.move(*at[0])
        self.tab.mouse.down()
        self.tab.mouse.move(*at[1], steps=5)
        self.tab.mouse.up()

    def label(self, number: int, name: str) -> None:
        self.tab.locator("#objects li select").nth(number).select_option(name)

    def draw(self) -> None:
        before = self.tab.locator("#strip button").count()
        self.tab.click("#draw")
        self.tab.locator("#strip button").nth(before).wait_for()
        self.tab.wait_for_selector("#draw:visible")
        assert self.tab.inner_text("#error") == ""

    def save(self, button: str) -> Path:
        with self.tab.expect_download() as download:
            self.tab.click(button)
        path = self.folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def picture(self) -> np.ndarray:
        return np.asarray(Image.open(self.save("#save-png"))).astype(int)

    def open(self, path: Path) -> None:
        self.tab.set_input_files("#open", path)
        self.tab.wait_for_selector("#status:not(:empty)")


@pytest.fixture
def person(browser: Any, url: str, tmp_path: Path) -> Iterator[Person]:
    """Nothing may go wrong in the browser unseen."""
    someone = Person(browser, url, tmp_path)
    yield someone
    someone.tab.close()
    assert someone.errors == []


def test_boxes_by_mouse_a_picture_and_the_same_again_from_a_layout_file(person: Person, url: str) -> None:
    person.clear()
    person.tab.fill("#prompt", "a red umbrella and a yellow kite on a beach")
    person.drag((0.1, 0.4), (0.5, 0.9))
    person.label(0, "umbrella")
    person.drag((0.6, 0.1), (0.9, 0.45))
    person.label(1, "kite")
    person.draw()
    first = person.picture()
    assert first.shape == (64, 64, 3) and first.std() > 10
    saved = person.save("#save-layout")
    objects = json.loads(saved.read_text())["objects"]
    assert [each["label"] for each in objects] == ["umbrella", "kite"]
    np.testing.assert_allclose(objects[0]["bbox"], [0.1, 0.4, 0.5, 0.9], atol=0.005)

    person.tab.goto(url)
    person.tab.wait_for_selector("#objects li")
    person.clear()
    person.open(saved)
    assert person.tab.input_value("#prompt") == "a red umbrella and a yellow kite on a beach"
    person.draw()
    assert np.array_equal(person.picture(), first)


def test_a_box_in_words_of_some_strength(person: Person) -> None:
    person.tab.locator("#objects li input[type=text]").first.click(delay=300)  # as slowly as people press
    person.tab.keyboard.type("large blue umbrella")
    person.tab.locator("#objects li input[type=number]").first.fill("1.5")
    person.tab.locator("#objects li button").nth(1).click(delay=300)  # the kite goes
    (umbrella,) = json.loads(person.save("#save-layout").read_text())["objects"]
    assert (umbrella["label"], umbrella["phrase"], umbrella["scale"]) == ("umbrella", "large blue umbrella", 1.5)
    person.tab.keyboard.press("Control+z")
    assert person.tab.locator("#objects li").count() == 2
    person.draw()


def test_moving_a_box_repaints_its_old_and_new_place_and_keeps_the_rest(person: Person) -> None:
    person.draw()
    before = person.picture()
    person.tab.locator("text=Edit this one").click()
    assert person.tab.is_disabled("#draw")  # nothing has changed
    person.drag((0.7, 0.25), (0.7, 0.40))
    assert "moved" in person.tab.inner_text("#objects")
    person.draw()
    after = person.picture()
    assert np.array_equal(before[:, :24], after[:, :24])  # the umbrella's side
    assert not np.array_equal(before[8:36, 38:56], after[8:36, 38:56])
    person.tab.locator("#objects li button").nth(1).click()  # the kite goes
    assert "kite: removed" in person.tab.inner_text("#removed")
    person.draw()
    assert person.tab.locator("#objects li").count() == 1


def test_a_prompt_alone_and_its_file_again(person: Person) -> None:
    person.clear()
    person.tab.fill("#prompt", "a clock on a wooden table")
    person.tab.fill("#field-seed", "11")
    person.draw()
    picture = person.picture()
    saved = person.folder / "seed-11.png"
    person.tab.fill("#prompt", "something else")
    person.tab.fill("#field-seed", "3")
    person.open(saved)
    person.tab.wait_for_selector("#strip button >> nth=1")
    assert person.tab.input_value("#prompt") == "a clock on a wooden table"
    assert person.tab.input_value("#field-seed") == "11"
    person.draw()
    assert np.array_equal(person.picture(), picture)


def test_a_layout_is_proposed_for_a_caption(person: Person) -> None:
    person.clear()
    person.tab.fill("#prompt", "a red umbrella and a yellow kite on a beach")
    person.tab.click("#propose")
    person.tab.wait_for_selector("#objects li")
    first = person.tab.locator("#objects select").evaluate_all("all => all.map((each) => each.value)")
    assert {"umbrella", "kite"} & set(first)
    person.draw()


def test_a_preset_sets_options_and_reset_takes_them_back(person: Person) -> None:
    person.tab.click("#more summary")
    first = person.tab.input_value("#field-speed")
    person.tab.select_option("#field-speed", "fast")
    person.tab.check("#field-auto")
    person.tab.locator("[id='field-options.start_step']").fill("2")
    person.draw()
    person.tab.locator("#again summary").click()
    command = person.tab.inner_text("#command")
    for words in ("--precision bf16", "--uncond_refresh 4", "--num_sampling_steps_last 5", "--start_step 2"):
        assert words in command
    person.tab.click("#reset")
    assert person.tab.input_value("#field-speed") == first and not person.tab.is_checked("#field-auto")


def test_texts_of_files_stay_texts(person: Person) -> None:
    layout = {"prompt": "<img src=x onerror=alert(1)>", "objects": [{"label": "kite", "bbox": [0, 0, 1, 1]}]}
    (person.folder / "html.json").write_text(json.dumps([layout, layout]))
    person.open(person.folder / "html.json")
    assert person.tab.input_value("#prompt") == layout["prompt"]
    person.draw()
    assert person.tab.locator("img:not(#strip img)").count() == 0
    (person.folder / "bad.json").write_text(json.dumps({**layout, "objects": [{"label": "<b>", "bbox": [0, 0, 2, 1]}]}))
    person.tab.set_input_files("#open", person.folder / "bad.json")
    person.tab.wait_for_selector("#error:not(:empty)")
    assert "object 0 ('<b>'): 'bbox' x1 = 2 is not in [0, 1]" in person.tab.inner_text("#error")
    person.errors = [error for error in person.errors if "400" not in error]  # Chromium's own line of the refusal


def test_keys_move_boxes_and_stop_a_drawing(person: Person) -> None:
    person.tab.focus("#canvas")
    for key in ("n", "n", "ArrowRight", "Shift+ArrowDown", "Control+z"):
        person.tab.keyboard.press(key)
    objects = json.loads(person.save("#save-layout").read_text())["objects"]
    example = json.loads((ROOT / "configs" / "layouts" / "mini.json").read_text())[0]["objects"]
    assert objects[0] == example[0]
    np.testing.assert_allclose(np.subtract(objects[1]["bbox"], example[1]["bbox"]), [1 / 64, 0, 1 / 64, 0], atol=1e-3)
    person.tab.fill("#field-num_images", "16")
    person.tab.keyboard.press("Control+Enter")
    person.tab.wait_for_selector("#stop:visible")
    person.tab.keyboard.press("Escape")
    person.tab.wait_for_selector("#draw:visible")
    assert person.tab.inner_text("#status") == "Stopped."


def test_phones_and_dark_rooms(person: Person) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = person.tab.evaluate(colour)
    person.tab.emulate_media(color_scheme="dark")
    assert person.tab.evaluate(colour) != light
    person.tab.set_viewport_size({"width": 360, "height": 740})
    assert person.tab.evaluate("document.documentElement.scrollWidth") <= 360
