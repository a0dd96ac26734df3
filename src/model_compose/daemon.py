"""Blocking work in daemon threads, which do not keep the process from ending."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from model_compose.errors import NotReady

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a daemon thread. With asyncio.to_thread the process could not exit before a download has ended."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled while the thread works

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await asyncio.wrap_future(future)


class Lane:
    """One daemon thread that does the work it is given, in order. The first work starts it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}
        self._running: Future[Any] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` in the thread, and returns its result. Work that is cancelled before its turn is dropped.

        Raises NotReady once closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise _shutting_down()
            self._waiting[future] = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            return await asyncio.wrap_future(future)
        finally:
            with self._changed:
                self._waiting.pop(future, None)

    def close(self) -> None:
        """Ends all work with NotReady, at once. What runs goes on in the thread, but its result is lost."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify()
        for future in left:
            with suppress(InvalidStateError):
                future.set_exception(_shutting_down())

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Waits for the next work and does it. Returns False once closed."""
        with self._changed:
            self._running = None
            while not (self._waiting or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            future = next(iter(self._waiting))
            work = self._waiting.pop(future)
            self._running = future
            wanted = future.set_running_or_notify_cancel()  # before `close` may end it
        if wanted:
            _settle(future, work)
        return True


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    settle: Callable[[], None]
    try:
        settle = partial(future.set_result, work())
    except BaseException as error:
        settle = partial(future.set_exception, error)
    with suppress(InvalidStateError):  # `close` has ended it meanwhile
        settle()


def _shutting_down() -> NotReady:
    return NotReady("the service is shutting down")
