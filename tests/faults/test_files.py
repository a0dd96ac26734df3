"""What lies on disk and is read back: who may read it, how large it grows, and what a hostile file may cost."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model_compose.loading import Loaded, load
from model_compose.running import find, hold, log_file
from tests.test_cli import cli, folder, state  # noqa: F401 - fixtures
from tests.tiny import YAML

Record = Callable[[str, int, str], None]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def loaded(folder: Path) -> Loaded:  # noqa: F811
    return load([folder / "model-compose.yml"], {})


# What is up.


@pytest.mark.parametrize("before", [None, 0o777])
def test_records_locks_and_logs_are_this_users_alone(loaded: Loaded, before: int | None, record: Record) -> None:
    """Also where a version before left them open, or the umask would."""
    umask = os.umask(0)
    try:
        log = log_file(loaded.files)
        if before is not None:
            for kind in ("log", "json", "lock", "tmp"):
                log.with_suffix(f".{kind}").touch(before)
                log.with_suffix(f".{kind}").chmod(before)
            log.parent.chmod(before)
        with hold(loaded.files, loaded.config):
            modes = {path.suffix: mode(path) for path in log.parent.iterdir() if path.suffix in (".json", ".lock")}
            assert modes == {".json": 0o600, ".lock": 0o600}
            assert mode(log.parent) == 0o700
            assert find(loaded.files) is not None
    finally:
        os.umask(umask)
    record(f"state folder, before: {before and oct(before)}", 1, "0700, files 0600")


def test_a_log_is_appended_to_and_the_last_start_is_told(folder: Path, record: Record) -> None:  # noqa: F811
    path = folder / "model-compose.yml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path.write_text(YAML.replace("port: 0", f"port: {port}"))
        told = [cli("up", "-d", cwd=folder)[2] for _ in range(2)]
    log = log_file((path,))
    assert log.read_text(encoding="utf-8").count(f"❌ port {port}") == 2
    assert told[0] == told[1]
    assert told[0].count("❌") == 1
    assert mode(log) == 0o600
    record("up -d twice", 2, "one log")


SPEAKS = """
import ctypes, logging, os, sys
from pathlib import Path
from model_compose import running
from model_compose.commands.options import log_to_stderr
running.LOG_BYTES = 10_000
log_to_stderr(verbose=False, kept_in=Path(sys.argv[1]))
for number in range(1000):
    logging.getLogger("model_compose").info("logged %d", number)
    print("printed", number, flush=True)
    os.write(2, b"by C %d\\n" % number)
"""


def test_a_log_is_bounded_whoever_writes_it(tmp_path: Path, record: Record) -> None:
    log = tmp_path / "service.log"
    log.write_text("of an earlier start\n" * 100)
    subprocess.run([sys.executable, "-c", SPEAKS, str(log)], check=True)
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["service.log", "service.log.1"]
    assert [mode(path) for path in kept] == [0o600] * 2
    assert max(path.stat().st_size for path in kept) < 10_100
    lines = [line for path in reversed(kept) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[-3:] == ["INFO     logged 999", "printed 999", "by C 999"]
    assert {line.split()[0] for line in lines} == {"INFO", "printed", "by"}
    record("a log of 10 kB", 3000, f"{sum(path.stat().st_size for path in kept)} bytes in two files")
