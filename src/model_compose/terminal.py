"""What the command line shows: a run's result, its text as it is made, and bars for long work.

stdout carries results only; bars are for a terminal's stderr, and silent when piped.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model_compose.errors import InputError
from model_compose.progress import Progress, Report, silent


def render(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def write(text: str, output: Path | None) -> None:
    """To stdout, or to a file: whole or not at all."""
    if output is None:
        if text:
            print(text)
        return
    try:
        if output.exists() and not output.is_file():  # /dev/null, a pipe
            output.write_text(text + "\n", encoding="utf-8")
            return
        temporary = output.with_name(f".{output.name}.part")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written ({error.strerror})") from None


class Printer:
    """Prints a run's text as it is made. Of several texts the first to start is live; the others follow it."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._in_line = False

    def __call__(self, path: str, text: str) -> None:
        self._texts[path] = self._texts.get(path, "") + text
        if path == next(iter(self._texts)):
            self._print(text)

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._in_line = not text.endswith("\n")

    def finish(self, result: Any) -> None:
        """The rest of the texts; the result itself where none of it came as text."""
        _, *others = self._texts.values() or [""]
        for text in others:
            self._print(f"\n\n{text}")
        if not self._texts and not _is_empty(result):
            self._print(render(result))
        print()

    def end_line(self) -> None:
        """What is printed next, an error, starts its own line."""
        if self._in_line:
            with suppress(OSError):
                self._print("\n")


def _is_empty(value: Any) -> bool:
    """Nothing but empty texts, which have no pieces to stream."""
    if isinstance(value, dict | list):
        return all(_is_empty(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


@contextmanager
def bars() -> Iterator[Report]:
    """Bars on a terminal's stderr; nothing when piped."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}"),
    )
    shown = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, redirect_stdout=False)
    tasks: dict[str, TaskID] = {}

    def report(progress: Progress) -> None:
        if progress.what not in tasks:
            tasks[progress.what] = shown.add_task(progress.what, total=progress.total, count="")
        count = _count(progress)
        shown.update(tasks[progress.what], completed=progress.done, total=progress.total, count=count)

    with shown:
        yield report


def _count(progress: Progress) -> str:
    if not progress.unit or not progress.done:
        return f"{progress.done / progress.total:.0%}" if progress.total else ""
    if progress.unit != "B":
        return f"{progress.done}/{progress.total or '?'}"
    total = f" of {progress.total / 1e6:.0f}" if progress.total else ""
    return f"{progress.done / 1e6:.0f}{total} MB"
