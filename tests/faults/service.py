"""A service as a user starts it: `model-compose up` in a process of its own, with its log."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx

COMMAND = [sys.executable, "-m", "model_compose", "up", "-f"]


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"still not {what}; the log:\n{self.text()[-5000:]}")
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until(lambda: "\nready" in f"\n{self.text()}", "ready")
        told = next(line for line in self.text().splitlines() if line.startswith("API "))
        self.url = told.split()[1].removesuffix("/api")

    def limit_files(self, files: int) -> None:
        """As of now it may have so many open files."""
        _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (files, hard))

    def connections(self) -> int:
        """Those that are open, or that only the other side has closed."""
        lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        own = [line.split() for line in lines]
        return sum(one[1].endswith(f":{self.port:04X}") and one[3] in ("01", "08") for one in own)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}


@contextmanager
def up(path: Path, folder: Path, files: int | None = None) -> Iterator[Service]:
    """The service of this file, ready. folder: for its log and state. files: the hard limit on those that it may open."""
    log = folder / "up.log"
    with log.open("wb") as sink:
        child = subprocess.Popen([*COMMAND, str(path)], stderr=sink, env=environment(folder), start_new_session=True)
    service = Service(child, log)
    try:
        if files:
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (files, files))
        service.until_ready()
        yield service
    finally:
        child.kill()
        child.wait()


def seconds_of_health(port: int, source: str = "127.0.0.1") -> tuple[float, Any]:
    """How long the health took on a connection of its own, and what it says. httpx would need longer than the service."""
    started = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=20, source_address=(source, 0))
    connection.request("GET", "/api/health")
    text = connection.getresponse().read()
    seconds = time.monotonic() - started
    connection.close()
    return seconds, json.loads(text)


def post(service: Service, path: str, body: object) -> httpx.Response:
    return httpx.post(service.url + path, json=body, timeout=60)
