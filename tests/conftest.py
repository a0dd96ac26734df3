"""Fixtures: a tiny project that tests share and must not change, opened with the Python API or served over HTTP."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.servers.http import create_app
from model_compose.servers.serve import address, bind, connections_of, listening
from tests import tiny

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that forgets the fake Hub must fail at once, not ask the real one
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
torch.set_num_threads(1)  # on a busy machine, two threads that wait for each other make tiny steps 15 times slower


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a tiny project's YAML file."""
    return tiny.save_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
async def compose(project: Path) -> AsyncIterator[Compose]:
    async with Compose.open(project) as opened:
        yield opened


@pytest.fixture(scope="session")
def server(project: Path) -> Iterator[str]:
    """The URL of a server of the tiny project, whose models are loaded."""
    with serving(project) as url:
        yield url


@contextmanager
def serving(path: Path, *, load_models: bool = True, env: dict[str, str] | None = None) -> Iterator[str]:
    """Serve a file's API on a free port, in a thread with its own event loop. Yields the URL."""
    ready, stop = threading.Event(), threading.Event()
    result: dict[str, str | BaseException] = {}

    async def main() -> None:
        compose = Compose(load([path], env))
        options = compose.config.serving.server
        assert options is not None
        listener = bind(options.host, 0)
        try:
            async with listening(create_app(compose, options), listener, connections_of(options)):
                if load_models:
                    await compose.load()
                result["url"] = str(address(listener))
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.02)
        finally:
            await compose.close()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            result["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(120)
    if "error" in result:
        raise RuntimeError("the test server failed") from result["error"]  # type: ignore[misc]
    try:
        yield str(result["url"])
    finally:
        stop.set()
        thread.join(30)
