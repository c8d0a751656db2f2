"""One page for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.page.server import PageServer
from tests.helpers.page_world import Caller, served, tiny_studio
from tests.helpers.tiny import World, write_world


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="package")
def page(world: World) -> Iterator[PageServer]:
    with served(tiny_studio(world)) as server:
        yield server


@pytest.fixture
def caller(page: PageServer) -> Caller:
    return Caller(page)
