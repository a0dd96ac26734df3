"""What lies on disk and is read back: who may read it, how large it grows, and what a hostile file may cost."""

import ctypes
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model_compose.errors import ConfigError
from model_compose.loading import ComposeFile, load
from model_compose.native import compiling, kernels
from model_compose.native.compiling import find_compiler, load_compiled
from model_compose.running import find, hold, log_file, make_state_dir
from tests.engines.test_child import alive
from tests.test_cli import cli, folder, state  # noqa: F401 - fixtures
from tests.tiny import YAML
from tests.waiting import wait_until

Record = Callable[[str, int, str], None]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def loaded(folder: Path) -> ComposeFile:  # noqa: F811
    return load([folder / "model-compose.yml"], {})


# What is up.


@pytest.mark.parametrize("before", [None, 0o777])
def test_records_locks_and_logs_are_this_users_alone(loaded: ComposeFile, before: int | None, record: Record) -> None:
    """Also where a version before left them open, or the umask would."""
    umask = os.umask(0)
    try:
        make_state_dir()
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


# Compiled kernels.

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NOBODY = 65534


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "model-compose"


def compile_here() -> Path:
    """Where the library is that would be used. It is tried first."""
    compiler = find_compiler()
    assert compiler is not None

    def tried(path: Path) -> Path:
        assert ctypes.CDLL(str(path)).decode
        return path

    return load_compiled(compiler, tried)


def put(library: Path, content: bytes) -> None:
    """Another file in its place: this process has the first one loaded."""
    library.unlink(missing_ok=True)
    library.write_bytes(content)
    library.chmod(0o700)


def foreign_owner(library: Path) -> None:
    os.chown(library, NOBODY, NOBODY)


def writable_by_others(library: Path) -> None:
    library.chmod(0o777)


def of_other_bytes(library: Path) -> None:
    put(library, library.read_bytes() + b"\0")


def truncated(library: Path) -> None:
    """To dlopen this looks whole, and the first look into it ends the process by SIGBUS."""
    put(library, library.read_bytes()[: library.stat().st_size // 2])


def a_link(library: Path) -> None:
    library.symlink_to(library.rename(library.parents[1] / "elsewhere.so"))


@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [pytest.param(foreign_owner, marks=needs_root), writable_by_others, of_other_bytes, truncated, a_link],
)
def test_a_library_that_cannot_be_trusted_is_compiled_again(
    cache: Path, spoil: Callable[[Path], None], record: Record
) -> None:
    first = compile_here()
    assert (first.parent, mode(cache), mode(first)) == (cache, 0o700, 0o700)
    before = first.stat().st_ino
    assert compile_here() == first
    assert first.stat().st_ino == before, "what is sound is used again"
    spoil(first)
    again = compile_here()
    assert again.lstat().st_ino != before
    assert (again.lstat().st_uid, mode(again)) == (os.geteuid(), 0o700)
    record(f"library: {spoil.__name__}", 1, "compiled again")


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_compiled_again(cache: Path) -> None:
    first = compile_here()
    content = b"made for a libc that is not here"
    first.unlink()
    put(first.with_name(first.name.replace(first.stem[-16:], compiling._digest(content))), content)
    assert compile_here() == first


@needs_compiler
@pytest.mark.parametrize("spoil", ["open", pytest.param("foreign", marks=needs_root), "a file"])
def test_a_cache_folder_of_others_is_not_used(
    cache: Path, spoil: str, caplog: pytest.LogCaptureFixture, record: Record
) -> None:
    if spoil == "a file":
        cache.touch()
    else:
        cache.mkdir()
        cache.chmod(0o777)
    if spoil == "foreign":
        os.chown(cache, NOBODY, NOBODY)
    path = compile_here()
    if spoil == "open":  # it is this user's: nobody else may write to it from now on
        assert (path.parent, mode(cache)) == (cache, 0o755)
    else:
        assert cache not in path.parents
        assert not path.exists(), "a private copy is gone once it is loaded"
        assert "are compiled anew at each start: set XDG_CACHE_HOME to a folder of yours" in caplog.text
    record(f"cache folder: {spoil}", 1, "closed and used" if spoil == "open" else "not used")


@needs_compiler
def test_the_words_of_cc_are_split(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler()
    assert compiler is not None
    spaced = cache.parent / "with space"
    spaced.mkdir()
    (spaced / "cc").symlink_to(shutil.which(compiler[0]) or "")
    monkeypatch.setenv("CC", f"'{spaced}/cc' -g0")
    assert find_compiler() == [f"{spaced}/cc", "-g0"]
    assert compile_here().parent == cache
    monkeypatch.setenv("CC", "gcc '-m64")
    with pytest.raises(ValueError, match="No closing quotation"):
        find_compiler()


def test_a_compiler_that_hangs_is_ended_with_its_children(
    cache: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    script = cache.parent / "cc"
    script.write_text('#!/bin/sh\nsleep 600 &\necho "$$ $!" > "$0.pids"\nwait\n')
    script.chmod(0o755)
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        load_compiled([str(script)], Path)
    pids = [int(pid) for pid in script.with_name("cc.pids").read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)), "all ended")
    record("a compiler that hangs, its limit 1 s", 1, f"ended with its child after {time.monotonic() - started:.1f} s")


# YAML that stands for more than it holds.


def levels(count: int, wide: int) -> str:
    lines = ["a0: &a0 x"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, count)]
    return "\n".join(lines)


def in_each_other(depth: int) -> str:
    return "\n".join(f"{'  ' * level}a:" for level in range(depth))


def chained(count: int) -> str:
    """Each alias adds a level of ninety to the one before it."""
    pairs = [f"a{n}: &a{n} {'[' * 90}*a{n - 1}{']' * 90}" for n in range(1, count)]
    return "\n".join(["a0: &a0 x", *pairs])


def merged(count: int) -> str:
    return "\n".join(["a0: &a0 {k0: 0}", *(f"a{n}: &a{n} {{<<: *a{n - 1}, k{n}: 0}}" for n in range(1, count))])


BOMBS = {
    "ten levels of ten aliases": (levels(11, 10), "holds 111,111 values with its aliases written out"),
    "forty levels of two": (levels(41, 2), "written out; a file may hold 100,000"),
    "a thousand aliases of a thousand": (levels(3, 1000), "written out; a file may hold 100,000"),
    "as keys of mappings": (levels(3, 1000).replace("[", "{k: [").replace("]", "]}"), "a file may hold 100,000"),
    "10,000 merges, each of the one before": (merged(10_000), "brings in more than the 100,000 values"),
    "many merges of one": (
        "a: &a {" + ", ".join(f"k{n}: 0" for n in range(1000)) + "}\nb: {<<: [" + "*a, " * 50_000 + "]}",
        "written out; a file may hold 100,000",
    ),
    "an anchor that holds itself": ("a: &a [x, *a]", "an anchor cannot contain its own alias"),
    "an anchor that holds itself below": ("a: &a {b: {c: [*a]}}", "an anchor cannot contain its own alias"),
    "an anchor that merges itself": ("a: &a {<<: *a}", "an anchor cannot contain its own alias"),
    "nested 150 deep": (in_each_other(150), "nested deeper than 100"),
    "nested 900 deep": (in_each_other(900), "nested deeper than 100"),
    "nested 100,000 deep": ("a: " + "[" * 100_000, "exceeded maximum nesting depth"),
    "nested by aliases": (chained(30), "its aliases nest mappings and lists deeper than 100"),
    "two megabytes": ("a: " + "x" * (2 << 20), "is longer than 1 MiB"),
    "a megabyte of values": ("a: [" + "1," * 500_000 + "]", "holds more than 100,000 values"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_yaml_that_stands_for_too_much_is_refused_by_name(tmp_path: Path, case: str, record: Record) -> None:
    text, words = BOMBS[case]
    path = tmp_path / "bomb.yml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        load([path], {})
    (problem,) = str(refused.value).splitlines()
    assert words in problem
    assert problem.startswith(f"{path}:")
    record(f"YAML: {case}", 1, f"{len(text):,} characters refused in {time.monotonic() - started:.2f} s")


def test_what_is_large_and_plain_loads(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "model-compose.yml"
    path.write_text(YAML.replace("text: ${input", f"text: {'x' * 900_000} ${{input"), encoding="utf-8")
    started = time.monotonic()
    component = load([path], {}).config.component
    assert component is not None
    record("YAML: a prompt of 900 kB", 1, f"loads in {time.monotonic() - started:.2f} s")
