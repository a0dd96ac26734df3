"""Runs as the browser gets them: events, heartbeats, errors with their field, and the headers that keep the page closed."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.errors import RunError
from model_compose.loading import load
from model_compose.servers.webui import create_page
from model_compose.servers.webui.runs import HEARTBEAT, beating


@pytest.fixture
async def page(compose: Compose) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_page(compose, "http://api"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8081") as client:
        yield client


def events(answer: httpx.Response) -> list[tuple[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    pairs = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


async def test_a_run_is_its_deltas_and_then_all_there_is_to_know(page: httpx.AsyncClient, compose: Compose) -> None:
    asked = {
        "workflow": "__workflow__",
        "values": {"prompt": "Ahoy"},
        "blend": {"alpaca": 2},
        "sampling": {"seed": "7"},
    }
    *deltas, (name, done) = events(await page.post("/runs", json=asked))
    expected = (await compose.answer({"prompt": "Ahoy"}, blend="strong")).output
    assert {name for name, _ in deltas} == {"delta"}
    assert "".join(data["text"] for _, data in deltas) == expected["generated"]
    assert {data["label"] for _, data in deltas} == {"generated"}
    assert name == "done"
    assert (done["texts"], done["input"]) == (expected, {"prompt": "Ahoy"})
    (answer,) = done["answers"]
    assert answer["blend"]["weights"] == {"alpaca": 2}
    assert (answer["component"], answer["usage"]["completion_tokens"]) == ("__component__", 12)
    assert done["notes"] == ["the text was cut at max_output_length (12 tokens)"]
    titles = [call["title"] for call in done["calls"]]
    assert titles == ["curl", "Python, with the openai package", "YAML, to keep this blend in the file"]


@pytest.mark.parametrize(
    ("asked", "status", "field"),
    [
        ({"values": {"prompt": " "}}, 400, "input.prompt"),
        ({"values": {"prompt": "x"}, "blend": {"alpacca": 1}}, 400, "blend"),
        ({"values": {"prompt": "x"}, "blend": {"alpaca": None}}, 400, "blend.alpaca"),
        ({"values": {"prompt": "x"}, "sampling": {"temperature": -1}}, 400, "sampling.temperature"),
        ({"values": {"prompt": "x"}, "sampling": {"top_q": 1}}, 400, "sampling.top_q"),
        ({"values": {"prompt": "x"}, "workflow": "other"}, 404, None),
        ({"values": 3}, 400, "values"),
    ],
)
async def test_what_is_wrong_is_told_with_its_field(
    page: httpx.AsyncClient, asked: dict[str, Any], status: int, field: str | None
) -> None:
    answer = await page.post("/runs", json={"workflow": "__workflow__", **asked})
    assert answer.status_code == status
    assert [error["field"] for error in answer.json().get("errors", ())] == ([field] if field else [])


async def test_what_fails_half_way_ends_the_events(
    page: httpx.AsyncClient, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([RunError("the card is full"), KeyError("a bug")])

    async def run(*given: Any, **named: Any) -> AsyncGenerator[Any]:
        async with aclosing(original(*given, **named)) as items:
            yield await anext(items)
            raise next(failures)

    original = compose.run
    monkeypatch.setattr(compose, "run", run)
    details = []
    for _ in range(2):
        _, (name, problem) = events(
            await page.post("/runs", json={"workflow": "__workflow__", "values": {"prompt": "Ahoy"}})
        )
        assert (name, problem["status"]) == ("error", 500)
        details.append(problem["detail"])
    assert details == ["the card is full", "the run failed; the server's log has the details"]


async def test_a_run_on_which_nothing_comes_still_beats() -> None:
    go, left = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncGenerator[str]:
        try:
            yield "first"
            await go.wait()
            yield "second"
            await asyncio.Event().wait()
        finally:
            left.set()

    beats = beating(slow(), seconds=0.001)
    assert await anext(beats) == "first"
    assert [await anext(beats) for _ in range(3)] == [HEARTBEAT] * 3
    go.set()
    while (item := await anext(beats)) == HEARTBEAT:
        pass
    assert item == "second"
    await anext(beats)
    await beats.aclose()
    assert left.is_set()  # what makes the events ends with them


async def test_events_end_where_their_source_ends_or_fails() -> None:
    async def failing() -> AsyncGenerator[str]:
        yield "one"
        raise RunError("no more")

    async def short() -> AsyncGenerator[str]:
        yield "one"

    async def failing_at_once() -> AsyncGenerator[str]:
        await failed.wait()
        raise RunError("no more")
        yield

    failed = asyncio.Event()
    assert [item async for item in beating(short())] == ["one"]
    one, error = [item async for item in beating(failing())]
    assert one == "one"
    assert error.startswith("event: error\ndata: ")
    beats = beating(failing_at_once(), seconds=0.001)
    assert await anext(beats) == HEARTBEAT
    failed.set()  # after a heartbeat it is too late for a status
    assert [item for item in [item async for item in beats] if item != HEARTBEAT] == [error]
    with pytest.raises(RunError, match="no more"):
        await anext(beating(failing_at_once()))


async def test_the_page_lets_a_browser_ask_nobody_else(project: Path) -> None:
    transport = httpx.ASGITransport(create_page(Compose(load([project])), None))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8081") as client:
        for path in ("/", "/page.json", "/assets/page.js", "/assets/none.js"):
            answer = await client.get(path)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"  # so a new version is seen at once
