"""The library of decode.c: compiled by this machine's compiler, and kept in the user's cache.

A loaded library can do whatever this process can. So we load one from the cache only if nobody but this user or root can
have written it. Its name contains a digest of its bytes, since a truncated library would end the process by SIGBUS.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
COMPILE_SECONDS = 60
"""After this time we take the compiler to hang; it needs about two seconds."""


def find_compiler() -> list[str] | None:
    """The words of the variable CC, or else the path of cc, gcc or clang.

    Raises ValueError if a quotation in CC does not end.
    """
    given = shlex.split(os.environ.get("CC", ""))
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return given or ([found] if found else None)


def load_compiled(compiler: list[str], load: Callable[[Path], T]) -> T:
    """Gives `load` the path of the library and returns its result. Compiles the library if the cache has none to trust.

    Raises OSError, SubprocessError if the compiler fails, and whatever `load` raises.
    """
    key = _key(compiler)
    try:
        folder = _cache()
        for path in folder.glob(f"native-{key}-*.so"):
            if _is_trusted(path):
                with suppress(OSError):  # compiled on a machine with another libc or OpenMP, say
                    return load(path)
        made = _compile(compiler, folder, key)
    except OSError as error:
        log.warning("%s; the kernels are compiled anew at each start: set XDG_CACHE_HOME to a folder of yours", error)
        with tempfile.TemporaryDirectory() as private:
            return load(_compile(compiler, Path(private), key))
    return load(made)


def _cache() -> Path:
    """The folder of compiled libraries, after making sure that only this user or root can write to it.

    Raises OSError.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-compose"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"the folder {folder} belongs to another user")
    if status.st_mode & OTHERS_WRITE:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS_WRITE)
    return folder


def _is_trusted(path: Path) -> bool:
    """Whether only this user or root can have written this file, and the file is complete."""
    status = path.lstat()
    ours = stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & OTHERS_WRITE
    return ours and path.stem.endswith(f"-{_digest(path.read_bytes())}")


def _compile(compiler: list[str], folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # in the same folder, so that the rename is one step
        made = Path(scratch) / "native.so"
        _run([*compiler, *FLAGS, "-o", str(made), str(SOURCES / "decode.c"), "-lm"])
        made.chmod(0o700)
        with made.open("rb") as file:
            path = folder / f"native-{key}-{_digest(file.read())}.so"
            os.fsync(file.fileno())  # after a power failure there must be no name without its bytes
        return made.replace(path)


def _key(compiler: list[str]) -> str:
    """A digest of everything that the library depends on: sources, flags, compiler, processor."""
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]
    how = (shlex.join([*compiler, *FLAGS]).encode(), _run([*compiler, "--version"]), _processor().encode())
    return _digest(b"|".join((*sources, *how)))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _run(command: list[str]) -> bytes:
    """What the command prints. After COMPILE_SECONDS it is killed with all that it started. Raises SubprocessError."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            out, complaint = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.SubprocessError(f"{command[0]}: {complaint.decode(errors='replace').strip()}")
    return out


def _processor() -> str:
    """What -march=native depends on: machines with different processors may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
