"""Which service of a file is up: a small record, held by a lock for as long as its process lives.

A lock, not the pid alone, says whether the process lives: pids are reused, and a killed process leaves its record behind.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from model_compose.errors import Conflict


@dataclass(frozen=True)
class Record:
    """One running service. ready: its models are loaded."""

    pid: int
    api: str | None = None
    page: str | None = None
    base_path: str = ""
    ready: bool = False


def state_dir() -> Path:
    """Where records and logs of detached services are kept."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "model-compose"


def _stem(files: Sequence[Path]) -> Path:
    digest = hashlib.sha256("\0".join(map(str, files)).encode()).hexdigest()[:12]
    return state_dir() / f"{files[0].parent.name}-{digest}"


def log_file(files: Sequence[Path]) -> Path:
    """The log of the file's detached service."""
    return _stem(files).with_suffix(".log")


class Running:
    """The record of this process, while it serves."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._record = Record(os.getpid())
        self.update()

    def update(self, **changes: str | bool | None) -> None:
        """Writes the record whole or not at all."""
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self._record)), encoding="utf-8")
        temporary.replace(self._path)


@contextmanager
def hold(files: Sequence[Path]) -> Iterator[Running]:
    """Within the block this process is the service of these files. Raises Conflict if there is one already."""
    stem = _stem(files)
    stem.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(stem.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        record = find(files)
        where = f" at {record.api or record.page}" if record else ""
        raise Conflict(f"{files[0].name} is up already{where}; `model-compose down` ends it") from None
    path = stem.with_suffix(".json")
    try:
        yield Running(path)
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def find(files: Sequence[Path]) -> Record | None:
    """The service of these files that is up now, else None."""
    stem = _stem(files)
    path = stem.with_suffix(".json")
    if not path.is_file():
        return None
    lock = FileLock(stem.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # ended in between
            return None
    lock.release()
    return None
