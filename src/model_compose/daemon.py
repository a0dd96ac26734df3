"""Blocking work in a thread that never keeps the process from ending."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a daemon thread. asyncio.to_thread would make an interrupted download delay the exit until its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            outcome: Callable[[], None] = lambda error=error: future.set_exception(error)  # type: ignore[misc]  # noqa: E731
        else:
            outcome = lambda: future.set_result(value)  # noqa: E731
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await future
