"""A supervised server: real processes that say a line, touch a file and wait."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model_compose.engines.served import child as module
from model_compose.engines.served.child import Child, inherited
from model_compose.errors import LoadError
from tests.waiting import until

# Its own process waits too, as vLLM's engine does beside its server.
SERVER = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
{before}
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("(Server pid=1) INFO 11-24 13:27:12 [a.py:1] hello", flush=True)
print("(Server pid=1) ERROR 11-24 13:27:12 [a.py:1] oh", flush=True)
print("and a bar", end="\\r", flush=True)
(folder / "pids").write_text(f"{{os.getpid()}} {{inner.pid}}")
(folder / "ready").touch()
time.sleep(600)
"""
# model-compose, as far as a child sees it.
PARENT = """
import asyncio, os, pathlib, sys
from model_compose.engines.served.child import Child
async def ready(): return (pathlib.Path(sys.argv[1]) / "ready").exists()
async def main():
    command, socket = [sys.executable, "-c", sys.argv[2], sys.argv[1]], pathlib.Path(sys.argv[1], "socket")
    child = Child("x", command, dict(os.environ), socket, ready, lambda: None, patience=20)
    await child.start()
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def make(
    folder: Path, before: str = "", before_start: Callable[[], None] = lambda: None, patience: float = 20
) -> Child:
    async def is_ready() -> bool:
        return (folder / "ready").exists()

    command = [sys.executable, "-c", SERVER.format(before=before), str(folder)]
    return Child("alpha", command, dict(os.environ), folder / "socket", is_ready, before_start, patience=patience)


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(pid: int) -> bool:
    """Not a zombie either: whoever adopts an orphan in a container may never reap it."""
    try:
        return stat(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def parent_of(pid: int) -> int:
    return int(stat(pid)[1])


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


def stat(pid: int) -> list[str]:
    """State, parent and so on (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start_when_told(engine: Any, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """From now on the engine's server is started again only once the event is set."""
    told, start = asyncio.Event(), engine._child._start

    async def wait_and_start() -> None:
        await told.wait()
        await start()

    monkeypatch.setattr(engine._child, "_start", wait_and_start)
    return told


def test_a_server_inherits_what_it_needs_and_no_secret() -> None:
    needed = {
        "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2", "HF_HOME": "/hf",
        "TOKENIZERS_PARALLELISM": "false", "LD_LIBRARY_PATH": "/l", "VLLM_CACHE_ROOT": "/c", "GGML_CUDA_FORCE_MMQ": "1",
    }  # fmt: skip
    others = (
        "HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "DATABASE_URL", "PYTHONPATH", "PYTHONHOME",
        "VIRTUAL_ENV", "LLAMA_ARG_CACHE_RAM", "LLAMA_API_KEY", "SSH_AUTH_SOCK", "PATHS", "https_proxy",
    )  # fmt: skip
    assert inherited(needed | dict.fromkeys(others, "hidden")) == needed


async def test_its_lines_are_logged_under_its_name_and_close_ends_all_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "model_compose")
    child = make(tmp_path)
    await child.start()
    assert child.ready
    assert all(alive(pid) for pid in pids(tmp_path))
    await child.close()
    assert not child.ready
    assert not any(alive(pid) for pid in pids(tmp_path))
    told = [(record.name, record.levelno, record.message) for record in caplog.records if "component" in record.name]
    assert [level for _, level, _ in told] == [logging.INFO, logging.ERROR, logging.DEBUG]
    assert {name for name, _, _ in told} == {"model_compose.component.alpha"}
    assert told[2][2] == "alpha: and a bar"


async def test_one_that_ends_at_once_says_why(tmp_path: Path) -> None:
    child = make(tmp_path, before='raise ValueError("no room for keys and values")')
    with pytest.raises(LoadError, match="ended before it was ready: ValueError: no room for keys and values"):
        await child.start()
    llama = "print('0.00.005.842 E srv    load_model: failed to load'); print('0.00.006 I the end'); sys.exit(1)"
    with pytest.raises(LoadError, match="ended before it was ready: load_model: failed to load"):
        await make(tmp_path, before=llama).start()
    missing = Child(
        "alpha",
        [str(tmp_path / "nowhere")],
        {},
        tmp_path / "socket",
        make(tmp_path)._is_ready,
        lambda: None,
        patience=20,
    )
    with pytest.raises(LoadError, match=r"nowhere cannot be run \(No such file or directory\)"):
        await missing.start()


async def test_one_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    child = make(tmp_path, before='(folder / "pids").write_text(str(os.getpid())); time.sleep(600)', patience=1)

    async def never() -> bool:
        await until((tmp_path / "pids").exists)
        return False

    child._is_ready = never
    with pytest.raises(LoadError, match="was not ready after 1 s"):
        await child.start()
    assert not any(alive(pid) for pid in pids(tmp_path))


async def test_one_that_crashes_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.1)
    starts: list[bool] = []
    socket = tmp_path / "socket"  # a server does not listen at one that is there
    socket.touch()
    child = make(tmp_path, before_start=lambda: starts.append(child.ready or socket.exists()))
    await child.start()
    for crash in (1, 2):
        before = pids(tmp_path)
        (tmp_path / "ready").unlink()
        socket.touch()
        os.kill(before[0], signal.SIGKILL)
        await until(lambda crash=crash: len(starts) > crash and child.ready)  # type: ignore[misc]
        assert not any(alive(pid) for pid in before)
        assert all(alive(pid) for pid in pids(tmp_path))
    assert starts == [False] * 3
    await child.close()
    assert not any(alive(pid) for pid in pids(tmp_path))


async def test_one_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    child = make(tmp_path, before="signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    await child.start()
    await child.close()
    assert not any(alive(pid) for pid in pids(tmp_path))


async def test_closing_while_it_starts_again_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.0)
    child = make(tmp_path)
    await child.start()
    first = pids(tmp_path)
    (tmp_path / "ready").unlink()
    os.kill(first[0], signal.SIGKILL)
    await until(lambda: pids(tmp_path) != first)
    await child.close()
    assert not any(alive(pid) for pid in (*first, *pids(tmp_path)))


@pytest.mark.parametrize("victim", ["model-compose", "watcher"])
async def test_kill_9_leaves_no_orphan(tmp_path: Path, victim: str) -> None:
    arguments = ["-c", PARENT, str(tmp_path), SERVER.format(before="")]
    parent = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert await parent.stdout.readline() == b"up\n"
        server, inner = pids(tmp_path)
        os.kill(parent.pid if victim == "model-compose" else parent_of(server), signal.SIGKILL)
        await until(lambda: not alive(server))
        if victim == "model-compose":
            await until(lambda: not alive(inner))
        else:
            os.kill(inner, signal.SIGKILL)  # of a server that was told to end: vLLM ends its own
    finally:
        with suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()
