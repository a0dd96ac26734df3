"""Whole or not at all: what is written grows in a hidden folder beside its destination, and is renamed at the end.

The hidden folder is locked while its process lives, so that what a killed one left is known, and removed by the next
export to the same place.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from model_compose.errors import InputError

LOCK = "lock"


@contextmanager
def whole(destination: Path) -> Iterator[Path]:
    """Yields a path to make a folder or file at, which becomes `destination` when the block ends well, after all its bytes
    are on the disk. Otherwise nothing is left, however it ends; after a kill, a hidden folder.

    Raises InputError where `destination` exists (but for an empty folder) or cannot be written.
    """
    destination = Path(os.path.abspath(destination))
    _check_vacant(destination)
    prefix = f".{destination.name}.partial-"
    try:
        _clear(destination.parent, prefix)
        hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        try:
            with FileLock(hidden / LOCK):
                yield hidden / destination.name
                _sync(hidden)
                _check_vacant(destination)
                if destination.is_dir():
                    destination.rmdir()  # empty, or this fails; Windows renames onto nothing
                os.rename(hidden / destination.name, destination)
                _sync_folder(destination.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"--output: {destination} cannot be written ({error.strerror or error}); nothing is left of it"
        ) from error


def check_free(path: Path, size: int) -> None:
    """Raises InputError where the disk of `path` has no room for so many bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise InputError(
            f"--output: {size / 1e9:.1f} GB are to be written, and the disk has {free / 1e9:.1f} GB free; make room, name "
            "a folder on another disk, or choose a smaller --precision"
        )


def _check_vacant(destination: Path) -> None:
    if not destination.parent.is_dir():
        raise InputError(f"--output: no folder {destination.parent}; make it first")
    if os.path.lexists(destination) and not (destination.is_dir() and not any(destination.iterdir())):
        kind = "is a folder that is not empty" if destination.is_dir() else "exists"
        raise InputError(f"--output: {destination} {kind}; remove it, or name another place")


def _clear(parent: Path, prefix: str) -> None:
    """Removes what killed exports to the same place left."""
    for left in parent.glob(f"{prefix}*"):
        if (left / LOCK).is_file():
            with suppress(Timeout), FileLock(left / LOCK, blocking=False):
                shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """All bytes below, and the names of the files, onto the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
