"""Which services of this user are up. Each service has a small record beside a lock, which it holds while it lives.

The lock, not the pid alone, says whether the process lives: a pid may be reused, and a killed process leaves its record
behind.
"""

import hashlib
import json
import logging.handlers
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from model_compose.errors import ConfigError, Conflict

if TYPE_CHECKING:
    from model_compose.config import Config
    from model_compose.lora.blend import Blend

PATIENCE_SECONDS = 1.0
"""How long a service that starts waits for its lock: `find` takes each lock for an instant."""
FOLDER_MODE, FILE_MODE = 0o700, 0o600
LOG_BYTES = 10 << 20
"""A log that would grow beyond this size is renamed to FILE.1, which replaces an older FILE.1."""


@dataclass(frozen=True)
class Mix:
    """A blend as the command line shows it. method: how the adapters are combined, where it is not by the exact sum."""

    name: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    method: str | None = None

    @classmethod
    def of(cls, blend: "Blend") -> "Mix":
        return cls(blend.name, dict(blend.weights), None if blend.method is None else blend.method.method)


@dataclass(frozen=True)
class Model:
    """A model component as the command line shows it. base: where its weights come from. blends: the default first."""

    id: str
    base: str
    driver: str
    adapters: tuple[str, ...] = ()
    blends: tuple[Mix, ...] = ()


@dataclass(frozen=True)
class Record:
    """One running service.

    config: the fingerprint of what it serves. ready: its models are loaded. files: the YAML files it was started with.
    name: the controller's name in the file. started: seconds since the epoch. log: the file that keeps the output of a
    service in the background.
    """

    pid: int
    config: str = ""
    api: str | None = None
    page: str | None = None
    base_path: str = ""
    ready: bool = False
    files: tuple[str, ...] = ()
    name: str | None = None
    started: float = 0.0
    log: str | None = None
    models: tuple[Model, ...] = ()


def state_dir() -> Path:
    """The folder of the records, and of the logs of services in the background."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "model-compose"


def fingerprint(config: "Config") -> str:
    """A digest of everything that a file and its environment say except secrets. Equal digests mean equal answers."""
    return hashlib.sha256(config.model_dump_json(warnings=False).encode()).hexdigest()[:16]


def _state(files: tuple[Path, ...], kind: str) -> Path:
    digest = hashlib.sha256("\0".join(map(str, files)).encode()).hexdigest()[:12]
    return state_dir() / f"{files[0].parent.name}-{digest}.{kind}"


def log_file(files: tuple[Path, ...]) -> Path:
    """Where `up -d` keeps the log of these files' service. It may not exist yet."""
    return _state(files, "log")


def make_state_dir() -> None:
    """Makes the folder, which only this user may enter. Raises ConfigError."""
    try:
        state_dir().mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        state_dir().chmod(FOLDER_MODE)  # an older version made it with a wider mode
    except OSError as error:
        raise ConfigError(
            f"the folder {state_dir()}, which records what is up, cannot be made ({error.strerror}); set XDG_STATE_HOME "
            "to a folder that can be written"
        ) from None


def private(path: str, flags: int) -> int:
    """An opener for files that only this user may read. It also narrows the mode of a file that exists."""
    descriptor = os.open(path, flags, FILE_MODE)
    os.fchmod(descriptor, FILE_MODE)
    return descriptor


class ServiceLog(logging.handlers.RotatingFileHandler):
    """The log of a service in the background. With FILE.1 it stays below 2 · LOG_BYTES.

    Standard output and standard error go to the same file, and move on with it when it is renamed. So the log also keeps
    what libraries print and the interpreter's last words.
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
        """Changes fields of the record and writes it, whole or not at all."""
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8", opener=private) as file:
            json.dump(asdict(self._record), file)
        temporary.replace(self._path)


@contextmanager
def hold(files: tuple[Path, ...], config: "Config", log: Path | None = None) -> Iterator[Running]:
    """Within the block this process is the service of these files. log: see Record.

    Raises Conflict if these files have a service already, and ConfigError.
    """
    make_state_dir()
    lock = FileLock(_state(files, "lock"), mode=FILE_MODE)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise already_up(files, find(files)) from None
    _state(files, "lock").chmod(FILE_MODE)
    path = _state(files, "json")
    record = Record(
        os.getpid(), fingerprint(config), files=tuple(map(str, files)), name=config.serving.name,
        started=time.time(), log=None if log is None else str(log), models=_models(config),
    )  # fmt: skip
    try:
        yield Running(path, record)
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _models(config: "Config") -> tuple[Model, ...]:
    found = []
    for id, options in config.models:
        blends = options.to_blends()
        mixes = tuple(map(Mix.of, (blends.default, *blends.named.values())))
        found.append(Model(id, str(options.model), options.driver, blends.adapters, mixes))
    return tuple(found)


def already_up(files: tuple[Path, ...], record: Record | None) -> Conflict:
    """The refusal to start a second service of the same files."""
    where = f" at {record.api or record.page}" if record and (record.api or record.page) else ""
    return Conflict(f"{files[0].name} is up already{where}; `model-compose down` ends it")


def find(files: tuple[Path, ...]) -> Record | None:
    """The service of these files that is up now, else None. Removes the record that a killed service left."""
    path = _state(files, "json")
    return _read(path) if _is_held(path) else None


def find_all() -> list[Record]:
    """Every service of this user that is up now."""
    return [record for _, record in held() if record is not None]


def held() -> Iterator[tuple[Path, Record | None]]:
    """The record's path of each service of this user that is up now. Its record is None where it cannot be read."""
    for path in sorted(state_dir().glob("*.json")):
        if _is_held(path):
            yield path, _read(path)


def _is_held(path: Path) -> bool:
    """Whether the process that wrote this record lives. Removes the record if it does not."""
    if not path.is_file():
        return False
    lock = FileLock(path.with_suffix(".lock"), mode=FILE_MODE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # another user's file, or a file system that cannot be written
        return False
    with suppress(OSError):
        path.unlink(missing_ok=True)
    lock.release()
    return False


def _read(path: Path) -> Record | None:
    """The record in this file. None if it is gone or makes no sense. Fields of a later version are passed over."""
    from pydantic import TypeAdapter, ValidationError

    try:
        record = TypeAdapter(Record).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.pid > 0 else None  # `down` signals this pid; 0 would be a whole group of processes
