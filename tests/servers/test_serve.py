"""`serve`: ports, warnings, and an end that keeps nobody waiting."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.errors import AddressInUse
from model_compose.loading import load
from model_compose.servers.serve import Addresses, address, bind, serve
from tests.servers.conftest import ENDLESS
from tests.servers.test_http import events
from tests.tiny import YAML
from tests.waiting import SECONDS, held, until, wait_until

PROGRAM = """
import asyncio, sys
from pathlib import Path
from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.servers.serve import serve

def announce(addresses): print(addresses.api, flush=True)
def ready(): print("ready", flush=True)
asyncio.run(serve(Compose(load([Path(sys.argv[1])])), announce=announce, on_ready=ready))
print("ended", flush=True)
"""


@pytest.fixture
def process(endless_file: Path) -> Iterator[subprocess.Popen[str]]:
    """The endless project, served by a process of its own."""
    path = endless_file.with_name("process.yml")
    controller = "controller: {type: http-server, port: 0, shutdown_timeout: 0s}\n"
    path.write_text(controller + ENDLESS, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    yield child
    child.kill()
    child.communicate()


def test_a_signal_ends_the_service_at_once_and_tells_its_clients(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    url = process.stdout.readline().strip()
    assert httpx.get(f"{url}/api/health").json()["status"] in ("loading", "ok")  # the port answers while models load
    assert process.stdout.readline() == "ready\n"
    answers: dict[str, httpx.Response] = {}

    def call(name: str, path: str, body: object) -> None:
        answers[name] = httpx.post(url + path, json=body, timeout=SECONDS)

    calls = {
        "run": ("/api/workflows/runs", {"input": {"prompt": "a"}}),
        "stream": ("/api/workflows/runs", {"input": {"prompt": "a"}, "stream": True}),
        "completion": ("/v1/completions", {"model": "default", "prompt": "a"}),
    }
    threads = [threading.Thread(target=call, args=(name, *arguments), daemon=True) for name, arguments in calls.items()]
    for thread in threads:
        thread.start()
    running = 'model_compose:num_requests_running{component="default"} 3.0'
    wait_until(lambda: running in httpx.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ended\n"
    for thread in threads:
        thread.join(SECONDS)
    assert answers["run"].status_code == answers["completion"].status_code == 503
    assert "shutting down" in answers["run"].json()["detail"]
    name, problem = events(answers["stream"].text)[-1]
    assert (name, problem["status"]) == ("error", 503)
    assert process.wait(10) == 0
    assert "Traceback" not in process.stderr.read()


async def _served(project: Path, yaml: str) -> tuple[asyncio.Task[None], Compose, str]:
    """A service in this event loop, ready; SIGTERM to this process ends it."""
    path = project.with_name("served.yml")
    path.write_text(yaml, encoding="utf-8")
    compose = Compose(load([path]))
    ready, told = asyncio.Event(), asyncio.get_running_loop().create_future()

    def announce(addresses: Addresses) -> None:
        told.set_result(addresses.api)

    running = asyncio.create_task(serve(compose, announce=announce, on_ready=ready.set))
    url = await asyncio.wait_for(told, SECONDS)
    await asyncio.wait_for(ready.wait(), SECONDS)
    return running, compose, url


async def test_running_requests_may_end_where_the_file_allows_and_new_ones_are_refused(project: Path) -> None:
    yaml = YAML.replace("controller:\n", "controller:\n  shutdown_timeout: 60s\n")
    running, compose, url = await _served(project, yaml.replace("max_output_length: 12", "max_output_length: 200"))
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        body = {"input": {"prompt": "Hello"}}
        with held(compose.models["__component__"].engine):
            call = asyncio.create_task(client.post(f"{url}/api/workflows/runs", json=body))
            await until(lambda: compose.busy)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: not compose.ready)
            assert (await client.post(f"{url}/api/workflows/runs", json=body)).status_code == 503
            assert (await client.get(f"{url}/api/health")).json() == {"status": "shutting_down"}
            assert not call.done()
        assert (await call).json()["status"] == "completed"
    await asyncio.wait_for(running, SECONDS)


async def test_a_second_signal_waits_for_nobody(endless_file: Path) -> None:
    yaml = "controller: {adapter: {type: http-server, port: 0}, shutdown_timeout: 1h}\n"
    running, compose, url = await _served(endless_file, yaml + ENDLESS)
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        call = asyncio.create_task(client.post(f"{url}/api/workflows/runs", json={"input": {"prompt": "Hello"}}))
        await until(lambda: compose.busy)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not compose.ready)
        assert (await client.get(f"{url}/api/health")).json() == {"status": "shutting_down"}
        assert not running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await call).status_code == 503
    await asyncio.wait_for(running, SECONDS)


async def test_the_garbage_collector_passes_over_what_the_libraries_brought(project: Path) -> None:
    """A full collection that visits them stops everything, health included, for a fifth of a second."""
    running, _, _ = await _served(project, YAML)
    assert gc.get_freeze_count() > 100_000
    assert len(gc.get_objects()) < 10_000
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 5)
    assert gc.get_freeze_count() == 0


async def test_a_failing_load_ends_the_service_with_its_error(project: Path) -> None:
    path = project.with_name("missing.yml")
    path.write_text(YAML.replace("./alpaca", "./nowhere"), encoding="utf-8")
    with pytest.raises(Exception, match="nowhere"):
        await asyncio.wait_for(serve(Compose(load([path]))), SECONDS)


# Ports.


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            AddressInUse, match=rf"port {port} on 127\.0\.0\.1 is in use.*stop it, or set another port"
        ) as caught:
            bind("127.0.0.1", port)
        assert caught.value.port == port


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(AddressInUse, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind("192.0.2.1", 0)
    with pytest.raises(AddressInUse, match="cannot listen on no such host:0"):
        bind("no such host", 0)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", r"[::1]")])
def test_addresses_are_shown_as_they_are_reached(host: str, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with bind(host, 0) as listener:
        assert address(listener) == f"http://{shown}:{listener.getsockname()[1]}"
    assert address(None) is None


@pytest.mark.parametrize(
    ("adapter", "warned"),
    [
        ('host: "0.0.0.0"', True),
        ('host: "0.0.0.0", api_keys: [k]', False),
        ("host: 127.0.0.1", False),
        ("host: localhost", False),
    ],
)
async def test_binding_elsewhere_without_keys_is_warned_of(
    project: Path, adapter: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    running, _, _ = await _served(project, YAML.replace("port: 0,", f"port: 0, {adapter},"))
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, SECONDS)
    assert ("without a key; set api_keys" in caplog.text) == warned


async def test_small_answers_are_not_held_back() -> None:
    """A server's side of a connection has TCP_NODELAY: Nagle's algorithm would wait for the client's ACK."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = bind("127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await accepted
        writer.close()
