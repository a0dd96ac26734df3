"""`model-compose logs`: what a service in the background has written."""

import os
import select
import sys
from collections import deque
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from model_compose.commands.options import FILE_HELP, all_files
from model_compose.errors import NotFound

POLL_MILLISECONDS = 200
BLOCK = 1 << 16
"""Bytes that are read at once."""


def logs(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help=FILE_HELP)] = None,
    named: Annotated[list[Path] | None, typer.Option("--file", metavar="FILE", help="The same as FILE")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written from now on, until Ctrl+C")
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", metavar="LINES", min=0, help="Only the last LINES lines. Default: all")
    ] = None,
) -> None:  # fmt: skip
    """Print the log of a service that `up -d` started.

    Here -f means follow, as in tail. Name the file alone or before the command: `model-compose -f FILE logs -f`.
    """
    from model_compose.loading import find_files
    from model_compose.running import find, log_file

    found = find_files(all_files([*(named or []), *(files or [])]))
    path = log_file(found)
    record = find(found)
    if record is not None and record.log is None:
        raise NotFound(
            f"{found[0].name} is up as process {record.pid} in a terminal, which shows its log; only `up -d` keeps a log"
        )
    if not path.is_file():
        raise NotFound(f"{found[0].name} has no log yet; only `up -d` keeps one")
    with suppress(KeyboardInterrupt), path.open("rb") as log:  # Ctrl+C is how following ends, so it is no failure
        _print_last(path.with_name(f"{path.name}.1"), log, lines)
        if follow:
            _follow(path, log)


def _print_last(older: Path, log: BinaryIO, lines: int | None) -> None:
    """Prints the log to its end, after the part that was put aside. lines: how many of them, None for all."""
    with ExitStack() as stack:
        parts = [log]
        with suppress(FileNotFoundError):
            before = stack.enter_context(older.open("rb"))
            if not os.path.sameopenfile(before.fileno(), log.fileno()):  # put aside since it was opened
                parts.insert(0, before)
        if lines is None:
            for part in parts:
                _copy(part)
        else:
            _write(b"".join(deque(chain.from_iterable(parts), maxlen=lines)))


def _follow(path: Path, log: BinaryIO) -> None:
    """Prints what is written from now on, also after the file was put aside for a new one. Ends when the reader leaves."""
    with ExitStack() as stack:
        while True:
            _copy(log)
            if os.fstat(log.fileno()).st_size < log.tell():  # somebody emptied it
                log.seek(0)
            replaced = _is_replaced(path, log)
            if _reader_leaves():
                return
            if replaced:
                _copy(log)  # what the service wrote there before it went on in the new file
                log = stack.enter_context(path.open("rb"))


def _is_replaced(path: Path, log: BinaryIO) -> bool:
    """Whether another file stands at the path."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(log.fileno()))
    except FileNotFoundError:  # put aside, and the new one is not there yet
        return False


def _reader_leaves() -> bool:
    """Waits a moment, or until nobody reads standard output any more."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # 0: only errors and hang-ups are reported
    return bool(poller.poll(POLL_MILLISECONDS))


def _copy(file: BinaryIO) -> None:
    while block := file.read(BLOCK):
        _write(block)


def _write(block: bytes) -> None:
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
