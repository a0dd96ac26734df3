"""What ends a service: running requests get their time and are told the reason, whatever the signal and the terminal."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.config import Controller
from tests import tiny
from tests.faults.service import COMMAND, Service, environment, post, up
from tests.servers.conftest import ENDLESS
from tests.servers.test_http import events
from tests.waiting import wait_until

Record = Callable[[str, int, str], None]
RUN = {"input": {"prompt": "a"}, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose answers take minutes."""
    folder = tmp_path_factory.mktemp("signals")
    tiny.save_base(folder / "endless", tiny.llama_config(max_position_embeddings=1 << 16))
    return folder


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """Services inherit the default of SIGHUP; tests that are run by nohup would have them ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def written(folder: Path, shutdown_timeout: str) -> Path:
    path = folder / "model-compose.yml"
    path.write_text(
        f"controller: {{type: http-server, port: 0, shutdown_timeout: {shutdown_timeout}}}\n{ENDLESS}", encoding="utf-8"
    )
    return path


class Stream(threading.Thread):
    """A client that reads a run's text to its end. started: once there is some."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.started, self.text, self.ended = url, threading.Event(), "", 0.0
        self.start()
        assert self.started.wait(30)

    def run(self) -> None:
        with (
            httpx.stream("POST", f"{self.url}/api/workflows/runs", json=RUN, timeout=60) as response,
            suppress(httpx.RemoteProtocolError),
        ):
            for text in response.iter_text():
                self.text += text
                self.started.set()
        self.ended = time.monotonic()

    def last(self) -> tuple[str | None, Any]:
        self.join(30)
        return events(self.text)[-1]


@contextmanager
def streaming(folder: Path, tmp_path: Path, shutdown_timeout: str) -> Iterator[tuple[Service, Stream]]:
    with up(written(folder, shutdown_timeout), tmp_path) as service:
        yield service, Stream(service.url)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_gives_running_requests_their_time_and_then_a_reason(
    folder: Path, tmp_path: Path, name: str, record: Record
) -> None:
    with streaming(folder, tmp_path, "2s") as (service, stream):
        sent = time.monotonic()
        service.process.send_signal(getattr(signal, name))
        service.until(lambda: health(service) == {"status": "shutting_down"}, "draining")
        refused = post(service, "/api/workflows/runs", RUN)
        assert (refused.status_code, refused.json()["title"]) == (503, "Not ready")
        assert refused.headers["retry-after"]
        assert "shutting down" in refused.json()["detail"]
        read = len(stream.text)
        service.until(lambda: len(stream.text) > read, "going on")
        kind, problem = stream.last()
        assert (kind, problem["status"]) == ("error", 503)
        assert "shutting down" in problem["detail"]
        assert stream.ended - sent >= 2
        assert service.process.wait(20) == 0
        assert "Traceback" not in service.text()
        record(f"{name}, 2 s allowed", 1, f"ended after {time.monotonic() - sent:.1f} s")


def test_a_second_signal_ends_at_once_and_nohup_is_respected(folder: Path, tmp_path: Path, record: Record) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    with streaming(folder, tmp_path, "1h") as (service, stream):
        service.process.send_signal(signal.SIGHUP)
        read = len(stream.text)
        service.until(lambda: len(stream.text) > read + 1000, "going on")
        assert health(service) == {"status": "ok"}
        service.process.send_signal(signal.SIGTERM)
        service.until(lambda: health(service) == {"status": "shutting_down"}, "draining")
        sent = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert stream.last()[0] == "error"
        assert service.process.wait(20) == 0
        record("second signal, 1 h allowed", 1, f"ended after {time.monotonic() - sent:.1f} s")


@contextmanager
def in_terminal(command: list[str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program in a terminal of its own, and what is closed to close that."""
    outer, inner = pty.openpty()

    def take_over() -> None:
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    child = subprocess.Popen(
        command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=take_over,
        env=environment(tmp_path) | {"NO_COLOR": "1", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(inner)
    try:
        yield child, outer
    finally:
        child.kill()
        child.wait()


def shown(outer: int, until: str) -> str:
    """What the terminal shows, up to these words."""
    text = ""
    while until not in text:
        text += os.read(outer, 1 << 16).decode(errors="replace")
    return text


def test_closing_the_terminal_ends_the_service_like_a_signal(folder: Path, tmp_path: Path, record: Record) -> None:
    with in_terminal([*COMMAND, str(written(folder, "2s"))], tmp_path) as (child, outer):
        url = re.findall(r"http://[\d.:]+", shown(outer, "ready"))[0]
        stream = Stream(url)
        closed = time.monotonic()
        os.close(outer)
        kind, problem = stream.last()
        assert (kind, problem["status"]) == ("error", 503)
        assert stream.ended - closed >= 2
        assert child.wait(20) == 0
        record("terminal closed, 2 s allowed", 1, f"ended after {time.monotonic() - closed:.1f} s")


def test_a_detached_service_outlives_its_terminal_and_drains_too(folder: Path, tmp_path: Path, record: Record) -> None:
    path = written(folder, "2s")
    with in_terminal([sys.executable, "-m", "model_compose", "up", "-d", "-f", str(path)], tmp_path) as (child, outer):
        pid = int(re.findall(r"up as process (\d+)", shown(outer, "/api\r\n"))[0])
        assert child.wait(20) == 0
        os.close(outer)
        (state,) = (tmp_path / "model-compose").glob("*.json")
        try:
            stream = Stream(json.loads(state.read_text())["api"])
            sent = time.monotonic()
            os.kill(pid, signal.SIGHUP)
            assert stream.last()[0] == "error"
            assert stream.ended - sent >= 2
            wait_until(lambda: not state.exists(), "ended")
        finally:
            if state.exists():
                os.kill(pid, signal.SIGKILL)
        record("SIGHUP to up -d, 2 s allowed", 1, f"ended after {time.monotonic() - sent:.1f} s")


def test_running_requests_have_ten_seconds_by_default() -> None:
    assert Controller().shutdown_timeout == 10


def health(service: Service) -> Any:
    return httpx.get(f"{service.url}/api/health").json()
