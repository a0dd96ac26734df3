"""Servers of several files: one with many workflows, one behind keys, one that never stops by itself."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.engines.stepping.sequence import Sequence
from model_compose.loading import load
from model_compose.servers.http import create_app
from model_compose.servers.serve import address, bind, listening
from tests import tiny
from tests.conftest import serving
from tests.waiting import SECONDS, until

WIDE = """\
controller:
  adapter:
    type: http-server
    base_path: /api
    callback_private_hosts: true
    callback_secret: hush
workflows:
  - id: main
    title: Main
    description: The one that is meant.
    default: true
    job: {action: plain, output: {generated: "${output}"}}
  - id: raw
    job: {action: raw}
  - id: hidden
    private: true
    job: {action: plain}
  - id: typed
    job: {action: typed}
  - id: echo
    job: {action: plain, output: {generated: "${output}", raw: "${input.raw as json}"}}
component:
  type: model
  id: tiny
  task: text-generation
  model: ./base
  precision: float32
  peft_adapters:
    - {type: lora, name: alpaca, model: ./alpaca, weight: 0.7}
    - {type: lora, name: pirate, model: ./pirate, weight: 0.8}
  actions:
    - {id: plain, text: "${input.prompt as text}", max_output_length: 8, params: {do_sample: false}}
    - {id: raw, text: "${input.prompt}", streaming: true, max_output_length: 8, params: {do_sample: false}}
    - id: typed
      text: "${input.tone as select/calm,loud | calm}: ${input.prompt as text @(description What to say)}"
      blend: ${input.blend}
      max_output_length: 4
      params: {temperature: "${input.heat as slider/0,2,0.5 | 1}", seed: "${input.seed as integer}"}
"""

LENGTH = 60_000
ENDLESS = """\
component:
  type: model
  task: text-generation
  model: ./endless
  precision: float32
  action:
    text: ${input.prompt}
    streaming: ${input.streaming}
    min_output_length: LENGTH
    max_output_length: LENGTH
    params: {do_sample: false}
""".replace("LENGTH", str(LENGTH))

KEYS = tiny.YAML.replace(
    "base_path: /api", 'base_path: /api, api_keys: [first-key, second-key], origins: "https://a.example"'
)


@pytest.fixture(scope="session")
def wide(project: Path) -> Iterator[str]:
    """The URL of a server with several workflows and one named component."""
    path = project.with_name("wide.yml")
    path.write_text(WIDE, encoding="utf-8")
    with serving(path) as url:
        yield url


@pytest.fixture(scope="session")
def locked(project: Path) -> Iterator[str]:
    """The URL of a server behind api_keys, whose models never load; https://a.example may call it."""
    path = project.with_name("keys.yml")
    path.write_text(KEYS, encoding="utf-8")
    with serving(path, load_models=False) as url:
        yield url


@pytest.fixture(scope="session")
def endless_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose answers take minutes: only leaving, cancelling and closing end them."""
    folder = tmp_path_factory.mktemp("endless")
    tiny.save_base(folder / "endless", tiny.llama_config(max_position_embeddings=1 << 16))
    path = folder / "model-compose.yml"
    path.write_text(ENDLESS, encoding="utf-8")
    return path


@dataclass
class Live:
    """A server in the test's own event loop, so that what goes on inside can be watched."""

    compose: Compose
    url: str
    client: httpx.AsyncClient
    steps: list[float] = field(default_factory=list)
    """When the engine ran the model."""

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await until(condition, what)

    async def running(self) -> None:
        """Until the engine makes tokens."""
        before = len(self.steps)
        await self.until(lambda: len(self.steps) > before + 3, "making tokens")

    async def stopped(self) -> None:
        """Soon nothing is busy, no place is taken, no token is made any more, and no asyncio task of ours is left."""
        engine: Any = self.compose.models["__component__"].engine
        await self.until(lambda: self.compose.busy == 0, "idle")
        if engine._loop is not None:  # as it is once the service has closed
            await self.until(lambda: not engine._loop.running, "making no tokens")
        rooms = [model.engine.room for model in self.compose.models.values()]
        await self.until(lambda: not any(room.texts or room.promised for room in rooms), "free of places")
        assert len(self.steps) < LENGTH, "a text came to its own end"
        await self.until(lambda: not self.leftovers(), "free of tasks")

    def leftovers(self) -> list[str]:
        """Tasks of ours that run besides the test's own and the server's."""
        names = [str(task.get_coro()) for task in asyncio.all_tasks()]
        return [name for name in names if any(part in name for part in ("Tasks.", "attended", "runner"))]


@pytest.fixture
async def live(
    endless_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Live]:
    """A loaded server of the endless project. What its tests do must leave no complaint of asyncio or uvicorn behind."""
    compose = Compose(load([endless_file]))
    options = compose.config.serving.server
    assert options is not None
    listener = bind(options.host, 0)
    steps: list[float] = []
    take = Sequence.take

    def counted(sequence: Sequence, *drawn: Any) -> None:
        steps.append(time.monotonic())
        take(sequence, *drawn)

    monkeypatch.setattr(Sequence, "take", counted)
    try:
        async with listening(create_app(compose, options), listener), httpx.AsyncClient(timeout=SECONDS) as client:
            await compose.load()
            yield Live(compose, str(address(listener)), client, steps)
            await compose.close()
    finally:
        await compose.close()
    gc.collect()  # asyncio complains of errors that nobody looked at when their task is collected
    complaints = [one for one in caplog.get_records("call") if one.name in ("asyncio", "uvicorn.error")]
    told = [one.getMessage() for one in complaints if one.levelno >= logging.WARNING]
    # What asyncio says where several pieces are written before it sees that the client has left, as some here do.
    assert not [text for text in told if text != "socket.send() raised exception."]
