"""Which service of a file is up: a small record beside a lock that is held for as long as its process lives.

A lock, not the pid alone, says whether the process lives: pids are reused, and a killed process leaves its record behind.
"""

import hashlib
import json
import logging.handlers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path

from filelock import FileLock, Timeout

from model_compose.config import Config
from model_compose.errors import ConfigError, Conflict

# `find` takes the lock for an instant, which must not look like a running service to one that starts.
PATIENCE_SECONDS = 1.0
FOLDER_MODE, FILE_MODE = 0o700, 0o600
LOG_BYTES = 10 << 20
"""A log that would grow beyond this is put aside as FILE.1, over the one that was there."""


@dataclass(frozen=True)
class Record:
    """One running service. files: what it was started with. config: the fingerprint of what it serves. ready: its models
    are loaded."""

    pid: int
    config: str = ""
    api: str | None = None
    page: str | None = None
    base_path: str = ""
    ready: bool = False
    files: tuple[str, ...] = ()


def state_dir() -> Path:
    """Where records and logs of detached services are kept."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "model-compose"


def fingerprint(config: Config) -> str:
    """A digest of all that a file and its environment say, secrets apart: equal ones give equal answers."""
    return hashlib.sha256(config.model_dump_json(warnings=False).encode()).hexdigest()[:16]


def _state(files: tuple[Path, ...], kind: str) -> Path:
    digest = hashlib.sha256("\0".join(map(str, files)).encode()).hexdigest()[:12]
    return state_dir() / f"{files[0].parent.name}-{digest}.{kind}"


def log_file(files: tuple[Path, ...]) -> Path:
    """The log of the file's detached service. Makes its folder, which only this user may enter. Raises ConfigError."""
    try:
        state_dir().mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        state_dir().chmod(FOLDER_MODE)  # an older version left it open
    except OSError as error:
        raise ConfigError(
            f"the folder {state_dir()}, which remembers what is up, cannot be made ({error.strerror}); set XDG_STATE_HOME "
            "to a folder that can be written"
        ) from None
    return _state(files, "log")


def private(path: str, flags: int) -> int:
    """The opener of files that only this user may read, also where they were there before with a wider mode."""
    descriptor = os.open(path, flags, FILE_MODE)
    os.fchmod(descriptor, FILE_MODE)
    return descriptor


class ServiceLog(logging.handlers.RotatingFileHandler):
    """The log of a detached service. It stays below 2 · LOG_BYTES.

    Standard output and error go to the same file and follow it when it is put aside, so that what libraries print and the
    interpreter's last words are kept too.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="replace")

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.fchmod(stream.fileno(), FILE_MODE)
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
        return stream


class Running:
    """The record of this process, while it serves."""

    def __init__(self, path: Path, record: Record) -> None:
        self._path, self._record = path, record
        self.update()

    def update(self, **changes: str | bool | None) -> None:
        """Writes the record whole or not at all."""
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8", opener=private) as file:
            json.dump(asdict(self._record), file)
        temporary.replace(self._path)


@contextmanager
def hold(files: tuple[Path, ...], config: Config) -> Iterator[Running]:
    """Within the block this process is the service of these files. Raises Conflict if there is one already, ConfigError."""
    log_file(files)
    lock = FileLock(_state(files, "lock"), mode=FILE_MODE)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise already_up(files, find(files)) from None
    _state(files, "lock").chmod(FILE_MODE)
    path = _state(files, "json")
    try:
        yield Running(path, Record(os.getpid(), fingerprint(config), files=tuple(map(str, files))))
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def already_up(files: tuple[Path, ...], record: Record | None) -> Conflict:
    """The refusal to start a second service of the same files."""
    where = f" at {record.api or record.page}" if record and (record.api or record.page) else ""
    return Conflict(f"{files[0].name} is up already{where}; `model-compose down` ends it")


def find(files: tuple[Path, ...]) -> Record | None:
    """The service of these files that is up now, else None. Clears away what a killed one left."""
    return _find(_state(files, "json"))


def find_all() -> list[Record]:
    """Every service of this user that is up now."""
    return [record for path in sorted(state_dir().glob("*.json")) if (record := _find(path)) is not None]


def _find(path: Path) -> Record | None:
    """The service whose record stands there, if it is up."""
    if not path.is_file():
        return None
    lock = FileLock(path.with_suffix(".lock"), mode=FILE_MODE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            return replace(record, files=tuple(record.files))  # a list in JSON
        except (OSError, ValueError, TypeError):  # ended in between, or written by another version
            return None
    path.unlink(missing_ok=True)
    lock.release()
    return None
