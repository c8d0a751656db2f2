"""What a page refuses: other hosts and pages, names of files, too much of anything. Each answer is one JSON line."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import pytest
from PIL import Image

from engine.page import limits
from engine.page.server import FILES, STATIC, PageServer
from tests.helpers.page_world import SCENE, Caller, served


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "localhost.evil.example", "a@localhost", "["])
def test_other_hosts_are_refused(caller: Caller, host: str) -> None:
    response = caller.send("GET", "/", headers={"Host": host})
    assert response.status in (400, 403) and b"<" not in response.read()


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_lead_to_the_page_at_any_port(caller: Caller, host: str) -> None:
    assert caller.send("GET", "/", headers={"Host": host}).status == 200


def test_other_names_lead_to_it_where_they_are_allowed(page: PageServer) -> None:
    with served(page.studio, ("GPU.example",)) as server:
        caller = Caller(server)
        assert caller.send("GET", "/", headers={"Host": "gpu.example:8000"}).status == 200
        assert caller.send("GET", "/", headers={"Host": "other.example"}).status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": None}, 415),
        ({"Content-Length": None}, 411),
        ({"Content-Length": "-1"}, 411),
        ({"Content-Length": str(limits.MAX_BODY + 1)}, 413),
        ({"Content-Length": "9" * 400}, 413),
        ({"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_requests_of_other_pages_and_shapes_are_refused(
    caller: Caller, headers: dict[str, str | None], status: int
) -> None:
    for path in ("/draw", "/open"):
        response = caller.send("POST", path, b"{}", headers)
        assert response.status == status and "error" in json.loads(response.read())


def test_a_program_that_is_no_browser_needs_no_origin(caller: Caller) -> None:
    assert caller.post("/draw", {}, Origin=None)[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/static/../../server.py",
        "/%2e%2e/server.py",
        "//etc/passwd",
        "/index.html/..",
        "/none",
        "/\x01",
    ],
)
def test_only_fixed_names_are_files(caller: Caller, path: str) -> None:
    response = caller.send("GET", path.replace("\x01", "%00"))
    answer = json.loads(response.read())
    assert response.status == 404 and answer == {"error": "there is no such page"}


def test_what_is_no_request_is_refused_in_json_too(caller: Caller) -> None:
    for method, path, status in (("PUT", "/", 501), ("<b>", "/", 501), ("GET", "/" + "a" * 70_000, 414)):
        response = caller.send(method, path)
        assert response.status == status and response.headers["Content-Type"] == "application/json"
        assert "error" in json.loads(response.read())


def test_every_answer_says_what_browsers_may_do_with_it(caller: Caller) -> None:
    for path in ("/", "/page.js", "/facts", "/none"):
        response = caller.send("GET", path)
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        response.read()


def test_the_page_needs_nothing_from_outside_and_makes_no_html_of_texts() -> None:
    assert {path.name for path in STATIC.iterdir()} == {path.name for path in FILES.values()}
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[\w-]+\.\w", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )


HTML = "<img src=x onerror=alert(1)>"
BOX = {"label": "dog", "bbox": [0, 0, 1, 1]}
BAD = {
    "html in a label": ({"scene": {"prompt": "", "objects": [{**BOX, "label": HTML}]}}, "unknown label '<img src=x"),
    "ten thousand boxes": ({"scene": {"prompt": "", "objects": [BOX] * 10_000}}, "10000 objects, but the checkpoint"),
    "a novel": ({"scene": {"prompt": "a" * 2001, "objects": []}}, "2001 characters, at most 2000"),
    "no scene": ({}, "scene is missing"),
    "no object": ([1], "a request must be an object"),
    "unknown key": ({"scene": SCENE, "path": "../../etc/passwd"}, "unknown key 'path'"),
    "a box outside": ({"scene": {"prompt": "", "objects": [{**BOX, "bbox": [0, 0, 2, 1]}]}}, r"x1 = 2 is not in"),
    "no number": ({"scene": {"prompt": "", "objects": [{**BOX, "bbox": [0, 0, float("nan"), 1]}]}}, "nan is not in"),
    "many images": ({"scene": SCENE, "num_images": 17}, r"num_images must be a whole number in 1 ... 16, got 17"),
    "a seed": ({"scene": SCENE, "seed": 2**53}, "seed must be a whole number in 0 ..."),
    "a seed that is true": ({"scene": SCENE, "seed": True}, "seed must be a whole number"),
    "precision": ({"scene": SCENE, "precision": "fp8"}, "precision must be one of"),
    "no options": ({"scene": SCENE, "options": [1]}, "options must be names and values"),
    "unknown option": ({"scene": SCENE, "options": {"rm": 1}}, r"unknown fields \['rm'\]"),
    "guidance": ({"scene": SCENE, "options": {"cfg_text": 1000}}, r"cfg_text must lie in \[0, 100\], got 1000"),
    "half a character": ({"scene": SCENE, "options": {"negative_prompt": "\ud800"}}, "negative_prompt is no text"),
    "a negative novel": ({"scene": SCENE, "options": {"negative_prompt": "a" * 2001}}, "negative_prompt has 2001"),
    "iterations": ({"scene": SCENE, "options": {"num_iter": 65}}, "num_iter must lie between 1 and"),
    "another head's": ({"scene": SCENE, "options": {"top_k": 3}}, "top_k is an option of the discrete head"),
    "a head": ({"scene": SCENE, "options": {"head": "discrete"}}, "the model has the diffusion head"),
    "edit of nothing": ({"scene": SCENE, "edit": {"picture": "", "boxes": [[0, 0, 1, 1]]}}, "edit: picture"),
    "edit without boxes": ({"scene": SCENE, "edit": {"picture": "", "boxes": []}}, "1 to 64 boxes"),
    "a side": ({"scene": {**SCENE, "height": 5, "width": 5}}, "5x5"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_said_before_anything_is_drawn(caller: Caller, case: str) -> None:
    body, message = BAD[case]
    status, answer = caller.post("/draw", body)
    assert status == 400 and re.search(message, answer["error"]), answer
    assert "\n" not in answer["error"] and len(answer["error"]) < 2000


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff{}", b'{"scene": 1, "scene": 2}', b"1" * 5000])
def test_what_is_no_json_is_refused(caller: Caller, content: bytes) -> None:
    response = caller.send("POST", "/draw", content)
    assert response.status == 400 and "the request" in json.loads(response.read())["error"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_a_hundred_megapixels_is_not_decoded(caller: Caller) -> None:
    content = png(Image.new("1", (10_000, 10_000)))
    for status, answer in (
        caller.open(content),
        caller.post(
            "/draw",
            {"scene": SCENE, "edit": {"picture": base64.b64encode(content).decode(), "boxes": [[0, 0, 0.5, 0.5]]}},
        ),
    ):
        assert status == 400 and "10000x10000 pixels, at most 34 million are opened" in answer["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xffno picture", "cannot read image the file"),
        (png(Image.new("RGB", (8, 8)))[:45], "cannot read image the file"),
        (b'{"prompt": "a", "objects": 1}', "'objects' must be a list"),
        (b"[]", "an empty list"),
        (b"{", "not valid JSON"),
        (b"[\xff]", "cannot read image the file"),
        (json.dumps({"prompt": "a", "objects": [{**BOX, "label": HTML}]}).encode(), "unknown label"),
    ],
    ids=["text", "half a picture", "objects", "nothing", "half", "bytes", "html"],
)
def test_files_that_are_none_are_refused(caller: Caller, content: bytes, message: str) -> None:
    status, answer = caller.open(content)
    assert status == 400 and message in answer["error"], answer


@pytest.mark.parametrize("body", [{}, {"content": 1}, {"content": "?"}, {"content": "", "path": "a"}, []])
def test_a_file_is_sent_in_base64(caller: Caller, body: Any) -> None:
    assert caller.post("/open", body)[0] == 400


def test_a_port_that_is_taken_is_named(page: PageServer) -> None:
    port = page.server_address[1]
    with pytest.raises(ValueError, match=f"cannot listen on host 127.0.0.1, port {port}"):
        PageServer("127.0.0.1", port, page.studio)
