"""A page on the tiny world's weights, and somebody who talks to it over HTTP."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.scenes import read_layout_file
from engine.page.server import PageServer
from engine.page.studio import Studio
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from tests.helpers.tiny import World

QUICK = SamplingConfig(num_iter=4, num_sampling_steps=4, clip_x0=3.0)
SCENE = {"prompt": "a dog", "objects": [{"label": "dog", "bbox": [0.125, 0.25, 0.5, 0.75]}]}


def tiny_studio(world: World, config: SamplingConfig = QUICK, checkpoint: Path | None = None, **options: Any) -> Studio:
    checkpoint = checkpoint or world.checkpoint
    pipeline = StructMARPipeline.from_checkpoint(checkpoint, world.vae, world.clip)
    examples = read_layout_file(world.layout, pipeline.known_labels)
    words = ("python", "-m", "scripts.sample", "--resume", str(checkpoint), *world.frozen_flags())
    return Studio(pipeline, config, words, {"exact": {"num_iter": 4, "precision": "fp32"}}, examples, **options)


@contextmanager
def served(studio: Studio, hosts: tuple[str, ...] = ()) -> Iterator[PageServer]:
    """On a free port, in threads of this process."""
    server = PageServer("127.0.0.1", 0, studio, hosts)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Caller:
    """Requests as a browser makes them; headers may be others, None leaves one out."""

    def __init__(self, server: PageServer) -> None:
        self.port = server.server_address[1]

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str | None] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        own = {"Host": f"localhost:{self.port}", "Origin": f"http://localhost:{self.port}"}
        if body is not None:
            own |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {**own, **(headers or {})}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        response = self.send("GET", path, headers=headers)
        return response.status, response.read()

    def post(self, path: str, value: Any, **headers: str | None) -> tuple[int, Any]:
        """The status, and the JSON of the answer."""
        response = self.send("POST", path, json.dumps(value).encode(), headers)
        return response.status, json.loads(response.read())

    def stream(self, value: Any) -> Iterator[dict[str, Any]]:
        """The events of a drawing, as they come."""
        response = self.send("POST", "/draw", json.dumps(value).encode())
        assert response.status == 200, response.read()
        try:
            for line in response:
                yield json.loads(line)
        finally:
            response.close()

    def draw(self, value: Any) -> list[dict[str, Any]]:
        """All events, of which the last one says that it is done."""
        events = list(self.stream(value))
        assert events[-1]["event"] == "done", events[-1]
        return events

    def open(self, content: bytes) -> tuple[int, Any]:
        return self.post("/open", {"content": base64.b64encode(content).decode()})


def pictures_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "picture"]


def pixels_of(png: str | bytes) -> np.ndarray:
    """Of a PNG, which may be base64."""
    content = base64.b64decode(png) if isinstance(png, str) else png
    return np.asarray(Image.open(io.BytesIO(content)))
