"""Runs a server in a process of its own: starts it, restarts it when it ends, and makes sure that it never outlives us.

The server runs under `watcher.py`, which stops it when model-compose ends, even if model-compose is killed. This file does
not know what the server does or which protocol it speaks.
"""

import asyncio
import logging
import re
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from model_compose.engines.served import watcher
from model_compose.errors import LoadError

STOP_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL_SECONDS = 0.2
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a server that has ended is started again. The pause doubles each time, until a server has lived for
longer than LONGEST_PAUSE."""
KEPT_LINES = 400

INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX", "CPATH", "LIBRARY_PATH", "MAX_JOBS",
)  # fmt: skip
INHERITED_PREFIXES = (
    "LC_", "XDG_", "CUDA", "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCM_", "ROCR_", "AMD_", "GPU_", "ONEAPI_", "SYCL_", "ZE_",
    "GGML_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_",
    "GLOO_", "UCX_", "RAY_", "VLLM_", "HF_", "TRANSFORMERS_", "TOKENIZERS_",
)  # fmt: skip
"""The environment variables that servers need: where files are, and how libraries compute."""
_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|AUTH)(?:_|$)")
"""Names of secrets, such as HF_TOKEN and VLLM_API_KEY. A server needs none: it reads only local files, and only its
user can open the socket on which it listens."""

_LEVELS = {
    "INFO": logging.INFO, "WARNING": logging.INFO, "ERROR": logging.ERROR, "CRITICAL": logging.ERROR, "E": logging.ERROR
}  # fmt: skip
"""A server's level -> ours. Warnings count as information, since most concern things that users cannot change. "E" marks
llama.cpp's errors."""
_LEVEL = re.compile(r"(?<=^\d\.\d\d\.\d{3}\.\d{3} )E\b|\b(?:INFO|WARNING|ERROR|CRITICAL)\b")
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)$|^[\d.]+ E +(?:srv|slot|cmn)? *(.+)$")


def inherited(own: Mapping[str, str]) -> dict[str, str]:
    """The part of the environment `own` that a server gets: variables that it needs, without secrets."""
    return {
        name: value
        for name, value in own.items()
        if (name in INHERITED or name.startswith(INHERITED_PREFIXES)) and not _SECRET.search(name)
    }


class Child:
    """One server.

    name: the component's name, for log lines. command: the command line. environment: all variables of the process.
    socket: the Unix socket on which the server listens; it is removed before every start, since a server cannot listen on a
    socket file that exists. is_ready(): whether the server answers; it must do so within `patience` seconds.
    before_start(): called before every start, including the first.
    """

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], socket: Path,
        is_ready: Callable[[], Awaitable[bool]], before_start: Callable[[], None], *, patience: float,
    ) -> None:  # fmt: skip
        self.ready = False
        self._name, self._command, self._environment, self._socket = name, command, environment, socket
        self._is_ready, self._before_start, self._patience = is_ready, before_start, patience
        self._log = logging.getLogger(f"model_compose.component.{name}")
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the server and return when it answers; from then on it is restarted when it ends.

        Raises LoadError, with the reason from the server's log, if it ends or does not answer in time.
        """
        await self._start()
        self._watching = asyncio.create_task(self._keep_running())

    async def close(self) -> None:
        """Stop the server and all processes that it has started."""
        self.ready = False
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None
        await self._stop()

    async def _start(self) -> None:
        self._lines.clear()
        self._socket.unlink(missing_ok=True)
        self._before_start()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(Path(watcher.__file__)), str(STOP_SECONDS), *self._command,
            stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=dict(self._environment), start_new_session=True,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read(self._process))
        deadline = time.monotonic() + self._patience
        try:
            while not await self._is_ready():
                if self._process.returncode is not None:
                    await self._reading
                    raise LoadError(f"{self._command[0]} ended before it was ready: {self._reason()}")
                if time.monotonic() > deadline:
                    raise LoadError(f"{self._command[0]} was not ready after {self._patience:.0f} s: {self._reason()}")
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            await self._stop()
            raise
        self.ready = True

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # tells the watcher to stop the server
        await process.wait()
        if self._reading is not None:
            await self._reading

    async def _keep_running(self) -> None:
        pause = 0.0
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            self.ready = False
            await self._stop()
            self._log.error("%s: the server ended with code %d (%s)", self._name, code, self._reason())
            if time.monotonic() - started > LONGEST_PAUSE:
                pause = 0.0
            while not self.ready:
                pause = min(2 * pause, LONGEST_PAUSE) or SHORTEST_PAUSE
                self._log.warning("%s: the server will be started again in %.0f s", self._name, pause)
                await asyncio.sleep(pause)
                try:
                    await self._start()
                except LoadError as error:
                    self._log.error("%s: %s", self._name, error)

    async def _read(self, process: Process) -> None:
        """Log the server's output. Each line gets about the level that it states, or DEBUG if it states none."""
        assert process.stdout is not None
        rest = b""
        while block := await process.stdout.read(1 << 16):
            *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                self._tell(line.decode(errors="replace").rstrip())
        self._tell(rest.decode(errors="replace").rstrip())

    def _tell(self, line: str) -> None:
        if line:
            self._lines.append(line)
            stated = _LEVEL.search(line[:80]) if self._process else None  # errors while stopping do not matter
            self._log.log(_LEVELS[stated[0]] if stated else logging.DEBUG, "%s: %s", self._name, line)

    def _reason(self) -> str:
        """Why the server ended: the first exception among its last lines (others follow from it), or else the last line."""
        found = (match[1] or match[2] for line in self._lines if (match := _EXCEPTION.search(line)))
        return next(found, self._lines[-1] if self._lines else "it wrote nothing to its log")
