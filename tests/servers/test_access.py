"""The log of requests: one line each, and an id by which the other lines are found."""

import asyncio
import io
import logging
import re
from collections.abc import Iterator

import httpx
import pytest

from model_compose.engines.stepping.sequence import Sequence
from model_compose.request_log import REQUEST_FORMAT, RequestFilter
from tests.servers.conftest import Live
from tests.servers.test_http import post
from tests.waiting import wait_until


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a service writes: the lines of `up`."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(RequestFilter())
    handler.setFormatter(logging.Formatter(REQUEST_FORMAT))
    logger = logging.getLogger("model_compose")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(before)


def lines(log: io.StringIO, id: str) -> list[str]:
    """The lines of a request, without their beginning."""
    return [line.partition(f"[{id}] ")[2] for line in log.getvalue().splitlines() if f"[{id}] " in line]


def test_a_requests_id_comes_back_and_stands_on_all_of_its_lines(server: str, log: io.StringIO) -> None:
    response = post(server, {"input": {"prompt": "Hello"}}, headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    wait_until(lambda: any(" POST " in line for line in lines(log, "mine-1")))  # the answer may be here before
    told = lines(log, "mine-1")
    task = response.json()["task_id"]
    assert f"[task-{task}] completed" in told
    access = r"127\.0\.0\.1 POST /api/workflows/runs 200 \d+ ms, \d+\+\d+ tokens, blend default"
    assert [line for line in told if re.fullmatch(access, line)]


@pytest.mark.parametrize("given", [None, "", "with space", "\u00e9", "x" * 129, "a\tb"])
def test_an_id_is_made_where_none_can_be_taken(server: str, given: str | None) -> None:
    headers = [] if given is None else [(b"X-Request-ID", given.encode("latin-1"))]
    made = {httpx.get(f"{server}/api/health", headers=headers).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in made)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/health", 200), ("GET", "/nowhere", 404), ("POST", "/v1/completions", 400),
        ("GET", "/docs", 200), ("GET", "/metrics", 200), ("GET", "/api/tasks/1%0A2?token=secret", 404),
    ],
)  # fmt: skip
def test_each_request_is_one_line(server: str, log: io.StringIO, method: str, path: str, status: int) -> None:
    """With its path as it was sent, so that it cannot begin a line of its own, and without its query."""
    response = httpx.request(method, server + path, headers={"X-Request-ID": "one"})
    assert response.headers["x-request-id"] == "one"
    wait_until(lambda: bool(lines(log, "one")))
    (line,) = lines(log, "one")
    shown = re.escape(path.partition("?")[0])
    assert re.fullmatch(rf"127\.0\.0\.1 {method} {shown} {status} \d+ ms", line)


async def test_the_engines_thread_logs_under_the_requests_id(
    live: Live, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("torn")

    monkeypatch.setattr(Sequence, "take", fails)
    headers = {"X-Request-ID": "torn-1"}
    body = {"model": "default", "prompt": "a"}
    assert (await live.client.post(f"{live.url}/v1/completions", json=body, headers=headers)).status_code == 500
    assert "a sequence failed" in lines(log, "torn-1")


def test_refusals_have_their_line_too(locked: str, log: io.StringIO) -> None:
    response = httpx.get(f"{locked}/api/workflows", headers={"X-Request-ID": "refused", "Authorization": "Bearer no"})
    assert response.headers["x-request-id"] == "refused"
    wait_until(lambda: len(lines(log, "refused")) > 1)
    warned, line = lines(log, "refused")
    assert warned == "a wrong API key from 127.0.0.1"
    assert "GET /api/workflows 401" in line
    assert "Bearer" not in log.getvalue()


def test_pages_of_listed_origins_may_read_the_id(locked: str) -> None:
    answer = httpx.get(f"{locked}/api/health", headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-expose-headers"] == "X-Request-ID"


async def test_a_stream_is_logged_at_its_end(live: Live, log: io.StringIO) -> None:
    headers = {"X-Request-ID": "stream"}
    body = {"input": {"prompt": "Hello"}, "stream": True}
    async with live.client.stream("POST", f"{live.url}/api/workflows/runs", json=body, headers=headers) as response:
        assert response.headers["x-request-id"] == "stream"
        await live.running()
        assert not any("POST" in line for line in lines(log, "stream"))
    await live.until(lambda: any("POST" in line for line in lines(log, "stream")), "logged")
    assert lines(log, "stream")[-1].endswith("ms, not read to the end")


async def test_a_client_that_leaves_within_its_body_is_no_error(live: Live, log: io.StringIO) -> None:
    port = int(live.url.rpartition(":")[2])
    for path in ("/api/workflows/runs", "/v1/completions"):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode())
        writer.write(b"Content-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await live.until(lambda path=path: f"POST {path} " in log.getvalue(), "logged")  # type: ignore[misc]
    assert "ERROR" not in log.getvalue()
    assert "Traceback" not in log.getvalue()
