"""Connections that are too many, too slow or too long: the service stays up for everybody else."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.server_options import HttpServerOptions
from model_compose.servers import bodies, connections
from model_compose.servers.connections import Connections, Limits
from model_compose.servers.http import create_app
from model_compose.servers.serve import bind, listening
from tests.conftest import serving
from tests.faults.service import Service, seconds_of_health, up
from tests.tiny import YAML
from tests.waiting import wait_until

Record = Callable[[str, int, str], None]

FEW_FILES = 128


@pytest.fixture(scope="module")
def few_files(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that may open no more than FEW_FILES files."""
    path = project.with_name("few_files.yml")
    path.write_text(YAML, encoding="utf-8")
    with up(path, tmp_path_factory.mktemp("few_files"), FEW_FILES) as service:
        yield service


def test_idle_sockets_keep_nobody_out(few_files: Service, record: Record) -> None:
    """Three times as many sockets as there may be files stand open and say nothing."""
    run = {"input": {"prompt": "Hello"}}
    slowest = 0.0
    with ExitStack() as sockets:
        for _ in range(3 * FEW_FILES):
            sockets.enter_context(socket.create_connection(("127.0.0.1", few_files.port)))
        before = few_files.log.stat().st_size
        for _ in range(20):
            took, told = seconds_of_health(few_files.port)
            assert told == {"status": "ok"}
            slowest = max(slowest, took)
            assert httpx.post(f"{few_files.url}/api/workflows/runs", json=run, timeout=20).status_code == 200
        grown = few_files.log.stat().st_size - before
    assert few_files.log.stat().st_size < 50_000
    record("health beside idle sockets", 3 * FEW_FILES, f"slowest {1000 * slowest:.0f} ms, log {grown} bytes")


def test_connections_that_cannot_be_accepted_are_a_line_a_second(few_files: Service, record: Record) -> None:
    few_files.until(lambda: not few_files.connections(), "rid of earlier connections")
    few_files.limit_files(few_files.files())  # as if the program had opened as many of its own
    before = few_files.log.stat().st_size
    with ExitStack() as sockets:
        for _ in range(20):
            sockets.enter_context(socket.create_connection(("127.0.0.1", few_files.port)))
        time.sleep(3)
    few_files.limit_files(FEW_FILES)
    grown = few_files.log.stat().st_size - before
    text = few_files.text()
    assert "a connection cannot be accepted: Too many open files" in text
    assert "Traceback" not in text
    assert grown < 2000
    record("log of failed accepts in 3 s", 20, f"{grown} bytes")


@asynccontextmanager
async def edge(app: Any, limits: Limits | None = None) -> AsyncIterator[int]:
    """The port of an application behind the edge that all faces have."""
    listener = bind("127.0.0.1", 0)
    shared = Connections(limits) if limits else None
    async with listening(app, listener, shared):
        yield listener.getsockname()[1]


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers once it has the body."""
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] != "http.disconnect":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
    return None


async def lifespan(receive: Any, send: Any) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def ended(reader: asyncio.StreamReader, seconds: float = 10.0) -> bytes:
    """All that the server sends until it closes."""
    with suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), seconds)
    return b""


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
async def test_headers_that_do_not_come_end_the_connection(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """Also where a byte comes now and then, and where an earlier request was a good one."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    async with edge(reads_all) as port:
        for before in (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if before and sent:
                writer.write(before)
                assert b"ok" in await reader.readuntil(b"ok")
            started = time.monotonic()
            writer.write(sent)

            async def drip(writer: asyncio.StreamWriter = writer) -> None:
                with suppress(ConnectionError):
                    while sent:
                        await asyncio.sleep(0.05)
                        writer.write(b"x")

            dripping = asyncio.create_task(drip())
            await ended(reader)
            dripping.cancel()
            record(f"slow headers, {len(sent)} bytes sent (0.5 s allowed)", 1, f"{time.monotonic() - started:.1f} s")
            writer.close()


async def test_a_connection_between_requests_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_compose.servers.serve.IDLE_SECONDS", 0.3)
    async with edge(reads_all) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await ended(reader)).endswith(b"ok")
        writer.close()


@pytest.mark.parametrize(("ahead", "pieces"), [(0, 0), (0, 1000), (90_000, 0), (90_000, 1000)])
async def test_a_body_that_does_not_come_is_answered_with_408(
    ahead: int, pieces: int, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    async with edge(reads_all) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.monotonic()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * ahead
        )

        async def drip() -> None:
            with suppress(ConnectionError):
                for _ in range(pieces):
                    writer.write(b"x")
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        answer = await ended(reader)
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        assert b'"code":"request_timeout"' in answer
        record(
            f"slow body, {ahead} bytes at once, {pieces} pieces (0.5 s allowed)",
            1,
            f"{time.monotonic() - started:.1f} s",
        )
        writer.close()


async def test_a_body_that_keeps_coming_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "BYTES_PER_SECOND", 1000)
    async with edge(reads_all) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 10000\r\n\r\n")
        for _ in range(10):  # a second for each piece, in 0.1 s
            writer.write(b"x" * 1000)
            await asyncio.sleep(0.1)
        assert (await ended(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    over = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        over.set()
        return None

    async with edge(endless) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        started = time.monotonic()
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await asyncio.wait_for(over.wait(), 10)  # what is sent after the end goes nowhere, so it gets there
        record("answers that nobody reads end (0.5 s allowed)", 1, f"{time.monotonic() - started:.1f} s")
        writer.close()


async def test_a_slow_reader_gets_all_of_a_large_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all limits, and reads all the time."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    size = 8 << 20

    async def large(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})
        return None

    async with edge(large) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 15)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200" in head
        read = 0
        while read < size:
            piece = await asyncio.wait_for(reader.read(1 << 16), 10)
            assert piece, f"{read} of {size} bytes came"
            read += len(piece)
            await asyncio.sleep(0.01)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")  # and its connection goes on
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        writer.close()


# Bodies that are too large, or that nobody wants.

ENDLESS = b"Host: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /api/workflows/runs HTTP/1.1\r\nContent-Type: application/json\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\n", 413),
        (b"POST /nowhere HTTP/1.1\r\n", 404),
        (b"DELETE /api/health HTTP/1.1\r\n", 405),
        (b"GET /api/health HTTP/1.1\r\n", 503),
        (b"POST /v1/completions HTTP/1.1\r\nOrigin: http://evil.example\r\n", 403),
        (b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nOrigin: http://evil.example\r\n", 403),
    ],
)
def test_an_endless_body_is_not_read_on_after_its_answer(
    unloaded: str, head: bytes, status: int, record: Record
) -> None:
    """The client goes on sending without reading until it cannot."""
    port = int(unloaded.rpartition(":")[2])
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(10)
        started = time.monotonic()
        client.sendall(head + ENDLESS)
        with suppress(ConnectionError):
            while sent < 1 << 30 and time.monotonic() - started < 10:
                client.sendall(CHUNK)
                sent += len(CHUNK)
        with suppress(ConnectionError):
            answer = client.recv(1 << 16)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"connection: close" in answer.lower()
    assert sent < 64 << 20
    record(
        f"endless body after {status} to {head.split()[1].decode()}",
        1,
        f"{sent / 1e6:.0f} MB in {time.monotonic() - started:.1f} s",
    )


@pytest.mark.parametrize("size", [10_000_001, 12_000_000])
def test_who_sends_a_little_too_much_gets_to_read_why(unloaded: str, size: int) -> None:
    response = httpx.post(f"{unloaded}/v1/completions", content=iter([b"x" * size]))
    assert response.status_code == 413 if size > 10 << 20 else response.status_code == 400


def test_the_connection_goes_on_after_a_body_that_was_read(unloaded: str) -> None:
    with httpx.Client() as client:
        for _ in range(2):
            response = client.post(f"{unloaded}/v1/completions", json={"model": "default", "prompt": "a"})
            assert response.status_code == 503
            assert "connection" not in response.headers


def test_the_connection_goes_on_after_a_small_body_that_nobody_asked_for(unloaded: str) -> None:
    with httpx.Client() as client:
        for _ in range(2):
            response = client.post(f"{unloaded}/nowhere", json={"a": 1})
            assert response.status_code == 404
            assert "connection" not in response.headers


@pytest.fixture(scope="module")
def unloaded(project: Path) -> Iterator[str]:
    """A server whose models never load."""
    with serving(project, load_models=False) as url:
        yield url


# The limit.


@contextmanager
def occupied(url: str, count: int, source: str = "127.0.0.1") -> Iterator[None]:
    """So many busy connections from an address: each has begun a body."""
    port = int(url.rpartition(":")[2])
    with ExitStack() as sockets:
        for _ in range(count):
            one = sockets.enter_context(socket.create_connection(("127.0.0.1", port), source_address=(source, 0)))
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        yield


@pytest.fixture(scope="module")
def limited(project: Path) -> Iterator[str]:
    """A server for eight connections, five of them of one client."""
    path = project.with_name("limited.yml")
    limits = "port: 0, max_connections: 8, max_connections_per_client: 5,"
    path.write_text(project.read_text(encoding="utf-8").replace("port: 0,", limits), encoding="utf-8")
    with serving(path, load_models=False) as url:
        yield url


def get(url: str, source: str = "127.0.0.1") -> httpx.Response:
    """A request on a connection of its own."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=source)) as client:
        return client.get(url)


def test_a_client_may_not_take_all_connections(limited: str) -> None:
    with occupied(limited, 20, "127.0.0.2"):
        refused = get(f"{limited}/v1/models", "127.0.0.2")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert refused.headers["retry-after"]
        assert refused.headers["connection"] == "close"  # it is one of the few for the health
        assert get(f"{limited}/api/workflows").status_code == 200
    wait_until(lambda: get(f"{limited}/api/workflows", "127.0.0.2").status_code == 200)


def test_health_answers_when_all_connections_are_busy(limited: str, record: Record) -> None:
    slowest = 0.0
    with occupied(limited, 20, "127.0.0.2"), occupied(limited, 20, "127.0.0.3"):
        for source in 10 * ("127.0.0.1", "127.0.0.2"):
            refused = get(f"{limited}/api/workflows", source)
            assert (refused.status_code, refused.json()["title"]) == (503, "Too many connections")
            took, told = seconds_of_health(int(limited.rpartition(":")[2]), source)
            assert told["status"] == "loading"
            slowest = max(slowest, took)
    record("health when all connections are busy", 20, f"slowest {1000 * slowest:.0f} ms")
    wait_until(lambda: get(f"{limited}/api/workflows").status_code == 200)


@pytest.mark.parametrize("files", [64, 128, 256, 1024, 4096, 20_000, 1 << 16])
def test_the_limit_leaves_files_for_everything_else(files: int) -> None:
    limits = Limits.of_files(files)
    assert 1 <= limits.of_client <= limits.most
    if files > 64:
        assert files - limits.most - connections.SPARE >= 48 + 4 * limits.at_once
    assert Limits.of_files(files, 10, 3).of_client == min(3, limits.most)


def test_the_soft_limit_on_files_is_raised_to_the_hard_one() -> None:
    program = (
        "import resource; from model_compose.servers.connections import raise_file_limit as up;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300)); print(up(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["300", "300", "300"]


async def test_a_page_of_an_allowed_origin_can_read_that_its_body_came_too_slowly(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    options = HttpServerOptions(origins=("https://a.example",))
    compose = Compose(load([project]))
    async with edge(create_app(compose, options)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /api/workflows/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://a.example\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        answer = (await ended(reader)).lower()
        writer.close()
    await compose.close()
    assert answer.startswith(b"http/1.1 408 ")
    assert b"access-control-allow-origin: https://a.example" in answer
    assert b"connection: close" in answer
    assert b"application/problem+json" in answer
