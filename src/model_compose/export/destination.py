"""Makes an export atomic: it is written to a hidden folder beside its destination and renamed at the end.

While the process lives, it holds a lock in the hidden folder. So the next export to the same place can recognise, and
remove, a folder that a killed process left.
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
def atomic(destination: Path) -> Iterator[Path]:
    """Yield a path at which the caller creates a file or folder. It is renamed to `destination` when the block ends.

    The rename happens after all bytes are on the disk (fsync). If the block raises, nothing is left. If the process is
    killed, only the hidden folder is left.

    Raises InputError if `destination` exists (an empty folder may) or cannot be written.
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
                    destination.rmdir()  # fails unless it is empty; Windows cannot rename onto an existing folder
                os.rename(hidden / destination.name, destination)
                _sync_folder(destination.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"--output: {destination} cannot be written ({error.strerror or error}); the partial export was removed"
        ) from error


def check_free(path: Path, size: int) -> None:
    """Raise InputError if the disk of `path` has fewer than `size` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise InputError(
            f"--output: the export takes {size / 1e9:.1f} GB, but the disk has only {free / 1e9:.1f} GB free; free space, "
            "choose a folder on another disk, or a smaller --precision"
        )


def _check_vacant(destination: Path) -> None:
    if not destination.parent.is_dir():
        raise InputError(f"--output: there is no folder {destination.parent}; make it first")
    if os.path.lexists(destination) and not (destination.is_dir() and not any(destination.iterdir())):
        kind = "is a folder that is not empty" if destination.is_dir() else "exists already"
        raise InputError(f"--output: {destination} {kind}; remove it, or choose another place")


def _clear(parent: Path, prefix: str) -> None:
    """Remove hidden folders that killed exports to the same place left; those of living ones are locked."""
    for left in parent.glob(f"{prefix}*"):
        if (left / LOCK).is_file():
            with suppress(Timeout), FileLock(left / LOCK, blocking=False):
                shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush all files below `folder`, and the folders' entries, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
