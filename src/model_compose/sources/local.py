"""Finds weights that are already on this machine, as a folder or a single file. Copies nothing."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from model_compose.errors import SourceError
from model_compose.schema import LocalPath, Options
from model_compose.sources.choice import no_such_file, only_gguf, preferred
from model_compose.sources.fetched import Fetched

_PATH = re.compile(r"\.{1,2}$|\.{1,2}[/\\]|~|/|[A-Za-z]:[/\\]")


def is_path(text: str) -> bool:
    """Whether `text` is a local path: it starts with ./, ../, ~, / or a drive letter."""
    return _PATH.match(text) is not None


class LocalSource(Options):
    """A folder or file. A relative `path` counts from the folder of the YAML file that holds it. `filename` asks for
    one file of the folder (a GGUF base)."""

    provider: Literal["local"] = Field(default="local", description="A folder or file on this machine")
    path: LocalPath = Field(
        min_length=1,
        description="The folder or file; a relative path starts at the folder of the YAML file that holds it",
    )
    filename: str | None = Field(
        default=None, min_length=1, description="One weights file of the folder, such as a GGUF"
    )

    def __str__(self) -> str:
        return os.path.join(self.path, self.filename) if self.filename else self.path


def fetch(source: LocalSource, *, base_dir: Path) -> Fetched:
    """Look the path up. A folder whose only weights are one GGUF file stands for that file.

    Raises SourceError, which names the absolute path, if the path does not exist, holds several GGUF files, or cannot
    be read.
    """
    path = absolute(source.path, base_dir)
    try:
        return _look_up(source, path, base_dir)
    except OSError as error:  # no permission, a name that is too long, a circle of links
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): correct '{source.path}' or its permissions."
        ) from error


def _look_up(source: LocalSource, path: Path, base_dir: Path) -> Fetched:
    if path.is_file():
        if source.filename is not None:
            raise SourceError(f"{path} is a file, so `filename` cannot be used: remove it, or set `path` to a folder.")
        return _file(path.parent, path.name, source)
    if not path.is_dir():
        raise SourceError(
            f"There is no file or folder {path} ('{source.path}' counted from {base_dir}): correct the path."
        )
    files = sorted(_files(path))
    if not files:
        raise SourceError(f"The folder {path} holds no files: point '{source.path}' to the folder with the weights.")
    names = [file.relative_to(path).as_posix() for file in files]
    if source.filename is not None:
        if os.path.normpath(source.filename) not in names:
            raise no_such_file(names, str(path), source.filename)
        return _file(path, os.path.normpath(source.filename), source)
    outer = [name for name in names if "/" not in name]
    if gguf := only_gguf(outer, folder=str(path)):
        return _file(path, gguf, source)
    _refuse_pointers(path / name for name in preferred(outer))
    return Fetched(path, None, f"local:{_digest(path, files)}", source.path)


def _file(folder: Path, name: str, source: LocalSource) -> Fetched:
    _refuse_pointers([folder / name])
    return Fetched(folder, name, f"local:{_digest(folder, [folder / name])}", str(source))


def absolute(path: str, base_dir: Path) -> Path:
    """`path` as an absolute path: ~ is expanded, and a relative path counts from `base_dir`.

    Symbolic links are not resolved, since a snapshot in the Hub's cache is a folder of links. Raises SourceError if ~
    has no home folder.
    """
    try:
        return Path(os.path.abspath(base_dir / Path(path).expanduser()))
    except RuntimeError as error:  # ~ of a user that does not exist, or no home folder
        raise SourceError(f"The ~ in '{path}' stands for no home folder: write the full path.") from error


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder` except hidden ones: .git and .cache change while the weights stay the same."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


_POINTER = b"version https://git-lfs.github.com/spec/"


def _refuse_pointers(files: Iterable[Path]) -> None:
    """Raise SourceError for git-lfs pointers: `git clone` without git-lfs leaves these small texts in place of
    files."""
    for file in files:
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise SourceError(
                f"{file} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in "
                f"{file.parent}."
            )


def _digest(folder: Path, files: list[Path]) -> str:
    """A digest of names, sizes and modification times; reading gigabytes of content would add minutes to each start."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat() if file.exists() else file.lstat()  # a dangling link: its own size and time
        digest.update(f"{file.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
