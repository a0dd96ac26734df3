"""The way of one request: how deep its frames nest, which files it passes, and what is done for it no more than once.

Everything here is counted on real calls, with the interpreter's own profile hook, in the server's event loop.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx
import pytest

import model_compose
from model_compose import expressions
from model_compose.compose import Compose
from model_compose.config import Config
from model_compose.engines.stepping.engine import SteppingEngine
from model_compose.engines.stepping.loop import Loop
from model_compose.loading import load
from model_compose.lora.blend import Blends
from model_compose.oneshot import run_here
from model_compose.progress import silent
from model_compose.servers.http import create_app
from model_compose.servers.serve import address, bind, listening
from model_compose.servers.tasks import Tasks
from model_compose.workflow import variables
from tests.waiting import SECONDS

ROOT = Path(model_compose.__file__).parent
EDGE = ("access.py", "bodies.py", "connections.py", "guard.py")
"""The middlewares and the connection, which stand before the route."""

MOST_FRAMES = 8
ONCE = (Config.find_workflow, Blends.resolve, variables.check)
NEVER = (expressions.parse,)

Chain = tuple[CodeType, ...]


class Way:
    """What the event loop's thread called while this watched."""

    def __init__(self) -> None:
        self.calls = Counter[CodeType]()
        self.files: set[str] = set()
        self.changes = 0
        """How often the next call was in another file than the one before."""
        self.deepest: dict[CodeType, Chain] = {}
        """Of the engine's generate, as it is entered and as each chunk is made, and of the hand-off to its thread."""
        self._creators: dict[asyncio.Task[Any] | None, Chain] = {}
        self._last = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._create)  # type: ignore[arg-type]  # typeshed has a protocol of its own
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            loop.set_task_factory(None)

    def _create(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **more: Any) -> Any:
        """A task is nested in the frames that created it, but a run's Task begins a way of its own."""
        task = asyncio.Task(work, loop=loop, **more)
        begins = getattr(work, "cr_code", None) is Tasks._work.__code__
        self._creators[task] = () if begins else self._chain(sys._getframe())
        return task

    def _chain(self, frame: FrameType | None) -> Chain:
        """Our own frames from the route, the Task or the caller down to this one."""
        own = []
        while frame is not None:
            if self._is_ours(frame.f_code) and not frame.f_code.co_filename.endswith(EDGE):
                own.append(frame.f_code)
            frame = frame.f_back
        try:
            inherited = self._creators.get(asyncio.current_task(), ())
        except RuntimeError:  # between two tasks
            inherited = ()
        return (*inherited, *reversed(own))

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not self._is_ours(code):
            return
        self.calls[code] += 1
        self.files.add(code.co_filename)
        self.changes += code.co_filename != self._last
        self._last = code.co_filename
        if code in (SteppingEngine.generate.__code__, Loop.add.__code__):
            self.deepest[code] = max(self.deepest.get(code, ()), self._chain(frame), key=len)

    @staticmethod
    def _is_ours(code: CodeType) -> bool:
        return code.co_filename.startswith(str(ROOT))


class Asked:
    """A loaded file, and a client of it, in the test's own event loop."""

    def __init__(self, compose: Compose, path: Path, url: str, client: httpx.AsyncClient) -> None:
        self.compose, self.path, self.url, self.client = compose, path, url, client

    async def run(self, **body: Any) -> None:
        await self._post("/api/workflows/runs", {"input": {"prompt": "Once"}, **body})

    async def chat(self, **body: Any) -> None:
        turns = [{"role": "user", "content": "Hi"}]
        await self._post("/v1/chat/completions", {"model": "default", "messages": turns, "max_tokens": 4, **body})

    async def python(self) -> None:
        await self.compose.answer({"prompt": "Once"}, blend={"alpaca": 0.5})

    async def oneshot(self) -> None:
        await run_here(load([self.path]), {"prompt": "Once"}, None, {"alpaca": 0.5}, None, nullcontext(silent))

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = await self.client.post(self.url + path, json=body)
        assert answer.status_code == 200, answer.text


@pytest.fixture
async def asked(project: Path) -> AsyncIterator[Asked]:
    compose = Compose(load([project]))
    options = compose.config.serving.server
    assert options is not None
    listener = bind(options.host, 0)
    try:
        async with listening(create_app(compose, options), listener), httpx.AsyncClient(timeout=SECONDS) as client:
            await compose.load()
            yield Asked(compose, project, str(address(listener)), client)
            await compose.close()
    finally:
        await compose.close()


Ask = Callable[[Asked], Awaitable[None]]
WAYS: dict[str, Ask] = {
    "run, whole": lambda asked: asked.run(blend={"alpaca": 0.5}),
    "run, streamed": lambda asked: asked.run(stream=True),
    "chat, whole": lambda asked: asked.chat(lora={"alpaca": 0.5}),
    "chat, streamed": lambda asked: asked.chat(stream=True),
    "the Python API": lambda asked: asked.python(),
    "one-shot": lambda asked: asked.oneshot(),
}


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)
async def test_a_request_passes_at_most_eight_frames(asked: Asked, ask: Ask) -> None:
    way = Way()
    with way.watching():
        await ask(asked)
    assert way.deepest.keys() == {SteppingEngine.generate.__code__, Loop.add.__code__}
    for chain in way.deepest.values():
        shown = [f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_qualname}" for code in chain]
        assert len(chain) <= MOST_FRAMES, "\n".join(shown)
        assert chain[0] is not chain[-1], "the hook saw no caller"


@pytest.mark.parametrize("ask", list(WAYS.values())[:4], ids=list(WAYS)[:4])
async def test_a_request_is_found_resolved_and_checked_once_and_parses_nothing(asked: Asked, ask: Ask) -> None:
    await ask(asked)  # the first request of all may import modules
    way = Way()
    with way.watching():
        await ask(asked)
    counts = {each.__qualname__: way.calls[each.__code__] for each in (*ONCE, *NEVER)}
    assert all(counts[each.__qualname__] <= 1 for each in ONCE), counts
    assert all(counts[each.__qualname__] == 0 for each in NEVER), counts
    assert counts["Blends.resolve"] == 1, counts
    files = sorted(str(Path(file).relative_to(ROOT)) for file in way.files)
    assert len(files) <= 34, files
