"""Clients that leave, a service that ends, and many clients at once: nothing computes for nobody, nobody is mixed up."""

import asyncio
from contextlib import suppress
from typing import Any

import httpx
import pytest

from model_compose.engines.text import StopStrings
from tests.servers.conftest import Live
from tests.servers.test_http import post
from tests.waiting import SECONDS

RUN, RAW, COMPLETION, CHAT = (
    ("/api/workflows/runs", {"input": {"prompt": "Hello"}}),
    ("/api/workflows/runs", {"input": {"prompt": "Hello"}, "output_only": True}),
    ("/v1/completions", {"model": "default", "prompt": "Hello"}),
    ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "n": 2}),
)
CALLS = pytest.mark.parametrize(("path", "body"), [RUN, RAW, COMPLETION, CHAT])


@CALLS
async def test_a_client_that_leaves_a_stream_stops_the_computation(live: Live, path: str, body: dict[str, Any]) -> None:
    async with live.client.stream("POST", live.url + path, json={**body, "stream": True}) as response:
        lines = response.aiter_lines()
        first = [await anext(lines) for _ in range(9)]
        assert any(line.startswith("data: ") for line in first)  # text comes while the run is going on
        assert live.compose.busy == 1
    await live.stopped()


@CALLS
async def test_a_client_that_leaves_while_it_waits_stops_the_computation(
    live: Live, path: str, body: dict[str, Any]
) -> None:
    waiting = asyncio.create_task(live.client.post(live.url + path, json=body))
    await live.running()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await live.stopped()


@CALLS
async def test_a_client_that_leaves_before_the_first_text_stops_the_computation(
    live: Live, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is tired of waiting: here every token is held back, as the start of a stop string would be."""
    monkeypatch.setattr(StopStrings, "push", lambda *_: ("", False))
    waiting = asyncio.create_task(live.client.post(live.url + path, json={**body, "stream": True}))
    await live.running()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await live.stopped()


async def test_a_client_that_leaves_the_queue_is_never_computed_for(live: Live) -> None:
    limit = asyncio.Semaphore(1)
    live.compose._runs = limit
    first = asyncio.create_task(live.client.post(live.url + RUN[0], json=RUN[1]))
    await live.running()
    second = asyncio.create_task(live.client.post(live.url + RUN[0], json={**RUN[1], "stream": True}))
    await live.until(lambda: live.compose.busy == 2, "waiting")
    second.cancel()
    await live.until(lambda: live.compose.busy == 1, "left the queue")
    first.cancel()
    await live.stopped()
    assert not limit.locked()


async def test_closing_answers_every_client(live: Live) -> None:
    calls = [
        asyncio.create_task(live.client.post(live.url + path, json={**body, "stream": stream}))
        for path, body in (RUN, COMPLETION, CHAT)
        for stream in (False, True)
    ]
    await live.until(lambda: live.compose.busy == len(calls), "all busy")
    await live.running()
    await asyncio.wait_for(live.compose.close(), SECONDS)
    for answer in await asyncio.wait_for(asyncio.gather(*calls), SECONDS):
        streamed = answer.headers["content-type"].startswith("text/event-stream")
        assert answer.status_code == (200 if streamed else 503)
        assert "shutting down" in answer.text.strip().rpartition("\n")[2]
    assert (await live.client.get(f"{live.url}/api/health")).json() == {"status": "shutting_down"}
    assert live.compose.busy == 0


async def test_requests_at_once_get_the_text_that_they_get_alone(server: str) -> None:
    blends: list[Any] = [
        None, {}, "strong", "plain", {"alpaca": 1}, {"pirate": 1.5}, {"alpaca": -0.5, "pirate": 2}, {"alpaca": 0.1},
    ]  # fmt: skip
    bodies = [{"input": {"prompt": f"Say {number}"}, "blend": blend} for number, blend in enumerate(blends)]
    alone = [post(server, body).json() for body in bodies]
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        answers = await asyncio.gather(*(client.post(server + RUN[0], json=body) for body in bodies))
        streams = await asyncio.gather(*(client.post(server + RUN[0], json=body | {"stream": True}) for body in bodies))
    for expected, answer, stream in zip(alone, answers, streams, strict=True):
        assert answer.json()["output"] == expected["output"]
        assert answer.json()["blend"] == expected["blend"]
        assert expected["blend"]["identity"] in stream.text
    assert len({answer["output"]["generated"] for answer in alone}) > 5
