"""The engine's thread: one step of every running sequence in turn, so that all of them move and none is blocked."""

import asyncio
import logging
import threading
from collections.abc import Iterable
from typing import Any

import torch

from model_compose.engines.huggingface.sequence import Sequence
from model_compose.errors import ComposeError, NotReady, RunError
from model_compose.generation import Chunk

log = logging.getLogger(__name__)


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
    """Runs sequences until they are done. An error in a step ends only the request that it belongs to."""

    def __init__(self) -> None:
        self._running: list[tuple[Sequence, Mailbox]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @staticmethod
    def mailbox() -> Mailbox:
        return Mailbox()

    def add(self, sequences: Iterable[Sequence], mailbox: Mailbox) -> None:
        with self._changed:
            if self._closed:
                raise NotReady("the service is shutting down")
            self._running.extend((sequence, mailbox) for sequence in sequences)
            self._changed.notify()

    def close(self) -> None:
        """Stops within one step; requests that still run get an error. Blocks until the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while running := self._next():
            for sequence, mailbox in running:
                if not (sequence.done or self._closed):
                    self._step(sequence, mailbox)

    def _next(self) -> list[tuple[Sequence, Mailbox]]:
        """The sequences of the next round; waits for one. Empty once closed."""
        with self._changed:
            self._running = [entry for entry in self._running if not entry[0].done]
            while not self._running and not self._closed:
                self._changed.wait()
            if self._closed:
                for _, mailbox in self._running:
                    mailbox.put(NotReady("the service is shutting down"))
                self._running = []
            return list(self._running)

    @staticmethod
    def _step(sequence: Sequence, mailbox: Mailbox) -> None:
        try:
            sequence.step()
        except Exception as error:  # whatever a request makes the model do, the engine goes on
            sequence.done = True
            log.exception("a step failed")
            mailbox.put(_run_error(error))


def _run_error(error: Exception) -> ComposeError:
    if isinstance(error, ComposeError):
        return error
    text: Any = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        failure = RunError("out of memory while generating; ask for a shorter text, or send fewer requests at once")
    else:
        failure = RunError(f"the model failed while generating ({type(error).__name__}); the log has the details")
    failure.__cause__ = error
    return failure
