"""How tests wait: for a condition, or with the engine's thread standing still. A pause that hopes to be long enough fails
on a slower machine, and one that hopes to be short enough on a faster one."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 60.0
"""The longest wait. What never comes true takes so long to fail; what comes true is not slowed by it."""


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
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
    """An engine whose thread stands between two steps, and takes the next one when it is told to."""

    def __init__(self, engine: Any) -> None:
        self._loop = engine._loop
        self._permits = threading.Semaphore(0)
        self._standing = threading.Event()
        self._over = False

    @property
    def generated(self) -> list[int]:
        """How many tokens each text has that runs or waits."""
        return [sequence.generated for sequence in self._loop.running]

    def step(self) -> None:
        """One step of the batch, with the calls and the texts that have come before it. Returns when it is done."""
        self._standing.clear()
        self._permits.release()
        self._wait()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Steps until the condition is true."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            self.step()
            await asyncio.sleep(0.001)

    async def during(self, work: Awaitable[T]) -> T:
        """The result of what waits for the engine's thread, such as the loading of an adapter: a step for each call."""
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
    """Within the block the engine computes nothing but the steps that the test asks for."""
    holding = Held(engine)
    engine._loop.call(holding._stand)
    holding._wait()
    try:
        yield holding
    finally:
        holding._over = True
        holding._permits.release()
