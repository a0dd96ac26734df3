"""A lane does its work in one thread, in order. Cancelling a call or closing the lane does not wait for that thread."""

import asyncio
import threading

import pytest

from model_compose.daemon import Lane
from model_compose.errors import NotReady


async def until_running(lane: Lane) -> None:
    while lane._running is None:
        await asyncio.sleep(0)


async def test_work_is_done_in_order_and_its_errors_are_the_callers() -> None:
    lane, done = Lane("test"), []
    results = await asyncio.gather(*(lane.run(lambda n=n: done.append(n) or n) for n in range(20)))  # type: ignore[func-returns-value,misc]
    assert done == results == list(range(20))
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 / 0)
    assert await lane.run(threading.current_thread) is not threading.current_thread()
    assert (await lane.run(threading.current_thread)).daemon
    lane.close()


async def test_cancelled_work_is_dropped_with_all_that_it_holds() -> None:
    lane, go, done = Lane("test"), threading.Event(), []
    first = asyncio.create_task(lane.run(go.wait))
    await until_running(lane)
    waiting = asyncio.create_task(lane.run(lambda: done.append("never")))
    while not lane._waiting:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not lane._waiting
    go.set()
    await first
    assert await lane.run(lambda: "on") == "on"
    assert not done
    lane.close()


async def test_closing_ends_waiting_and_running_calls_at_once() -> None:
    lane, go = Lane("test"), threading.Event()
    running = asyncio.create_task(lane.run(go.wait))
    await until_running(lane)
    waiting = asyncio.create_task(lane.run(lambda: None))
    while not lane._waiting:
        await asyncio.sleep(0)
    lane.close()
    for task in (running, waiting):
        with pytest.raises(NotReady, match="shutting down"):
            await task
    with pytest.raises(NotReady):
        await lane.run(lambda: None)
    go.set()
    thread = lane._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
