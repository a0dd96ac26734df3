"""The engine's thread. It runs steps of the batch, one after the other, as long as the batch has sequences."""

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from model_compose.engines.stepping.scheduler import Scheduler
from model_compose.engines.stepping.sequence import Sequence
from model_compose.errors import ComposeError, NotReady
from model_compose.generation import Chunk


class Mailbox:
    """Carries chunks, or the error that ended a request, from the engine's thread to its event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | ComposeError] = asyncio.Queue()

    def put(self, item: Chunk | ComposeError) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self) -> Chunk:
        """The next chunk. Raises the error that ended the request."""
        item = await self._queue.get()
        if isinstance(item, ComposeError):
            raise item
        return item


class Loop:
    """Runs sequences until they are done. Sequences join and leave between two steps."""

    def __init__(self, batch: Scheduler) -> None:
        self._batch = batch
        self._joining: list[Sequence] = []
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []
        self.running: tuple[Sequence, ...] = ()
        """The sequences that ran or waited when the last step began."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Adds sequences to the batch before the next step. Raises NotReady once closed."""
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._joining.extend(sequences)
            self._changed.notify()

    @property
    def load(self) -> int:
        """How many sequences run, wait, or have just been added."""
        return len(self.running) + len(self._joining)

    def call(self, work: Callable[[], None]) -> Future[None]:
        """Runs `work` between two steps, in the engine's thread. Raises NotReady once closed."""
        future: Future[None] = Future()
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stops after the current step. Requests that still run get an error. Blocks until the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._join():
            try:
                self._batch.step()
            except Exception as error:  # our own bug outside any request: fail all, so that none waits for ever
                for sequence in self._batch.sequences:
                    sequence.fail(error)
        for sequence in self._batch.sequences:
            sequence.fail(_shutting_down())

    def _join(self) -> bool:
        """Takes new sequences and calls; waits while there is nothing to do. Returns False once closed."""
        with self._changed:
            while not (self._joining or self._calls or self._closed) and self._batch.idle:
                self.running = ()
                self._changed.wait()
            self._batch.add(self._joining)
            self._joining = []
            self.running = tuple(self._batch.sequences)
            calls, self._calls = self._calls, []
        for work, future in calls:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
        return not self._closed


def _shutting_down() -> NotReady:
    return NotReady("the service is shutting down")
