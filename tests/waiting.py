"""How tests wait without sleeps: they wait for a condition, or they stop the engine's thread and step it by hand.

A fixed sleep that must be long enough fails on a slower machine, and one that must be short enough fails on a faster one.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 120.0
"""The longest wait. A condition that never becomes true fails after this time; one that does is not slowed by it."""


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait until `condition()` is true; fail after SECONDS. `what` is the condition's name in the failure."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"after {SECONDS:.0f} s still not: {what}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """`until`, for tests without an event loop."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"after {SECONDS:.0f} s still not: {what}"
        time.sleep(0.005)


class Held:
    """An engine whose thread waits between two steps, until the test lets it make the next one."""

    def __init__(self, engine: Any) -> None:
        self._loop = engine._loop
        self._permits = threading.Semaphore(0)
        self._standing = threading.Event()
        self._over = False

    @property
    def generated(self) -> list[int]:
        """The number of generated tokens of each sequence that runs or waits."""
        return [sequence.generated for sequence in self._loop.running]

    def step(self) -> None:
        """Let the thread handle all calls and new sequences so far, and then make one step. Returns after the step."""
        self._standing.clear()
        self._permits.release()
        self._wait()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Make steps until the condition is true."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            self.step()
            await asyncio.sleep(0.001)

    async def during(self, work: Awaitable[T]) -> T:
        """The result of work that needs the engine's thread, such as loading an adapter. Makes a step for each call."""
        task = asyncio.ensure_future(work)
        while not task.done():
            if self._loop._calls:
                self.step()
            await asyncio.sleep(0.001)
        return task.result()

    def _stand(self) -> None:
        self._standing.set()
        assert self._permits.acquire(timeout=SECONDS)
        if not self._over:
            self._loop.call(self._stand)

    def _wait(self) -> None:
        assert self._standing.wait(SECONDS), "the engine's thread does not come back"


@contextmanager
def held(engine: Any) -> Iterator[Held]:
    """Within this context, the engine makes only the steps that the test asks for."""
    holding = Held(engine)
    engine._loop.call(holding._stand)
    holding._wait()
    try:
        yield holding
    finally:
        holding._over = True
        holding._permits.release()
