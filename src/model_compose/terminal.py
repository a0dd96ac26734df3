"""What the command line shows: a run's result, its text while it is made, who answered, and bars for long work.

stdout carries results only. Bars, and the line about who answered, go to stderr, and only where that is a terminal.
"""

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_compose.errors import InputError
from model_compose.progress import Progress, Report, silent
from model_compose.running import Mix

NARROW = 80
"""Columns of a terminal below which bars leave out the remaining time."""


@dataclass(frozen=True)
class Answered:
    """Which model answered a run, and how. component: None where only one did. finish: how each of its texts ended."""

    mix: Mix
    tokens: int
    tokens_per_second: float
    finish: Collection[str]
    component: str | None = None


def render(value: Any) -> str:
    """A text as it is, anything else as JSON, and null as nothing."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def write(text: str, output: Path | None) -> None:
    """Writes to stdout, or to the file `output`: whole or not at all. Raises InputError."""
    if output is None:
        if text:
            print(text)
        return
    try:
        write_whole(output, text + "\n")
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written ({error.strerror})") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Writes through what is no regular file: /dev/null, a pipe. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def show_answers(answers: Collection[Answered]) -> None:
    """On a terminal's stderr: a line for each model that answered, with its blend and its speed. Nothing when piped."""
    if not sys.stderr.isatty():
        return
    for each in answers:
        name = f"{each.component}: " if each.component else ""
        finish = ", ".join(dict.fromkeys(each.finish))
        speed = f"{each.tokens:,} token{'' if each.tokens == 1 else 's'}, {each.tokens_per_second:.1f} tokens/s"
        print(f"{name}{mix_text(each.mix)} ({speed}, {finish})", file=sys.stderr)


def mix_text(mix: Mix) -> str:
    """captain · alpaca 0.5 · pirate 1.25"""
    name = [mix.name or "", f"({mix.method})" if mix.method else ""]
    weights = [f"{adapter} {weight:g}" for adapter, weight in mix.weights.items() if weight]
    return " · ".join(filter(None, [" ".join(filter(None, name)), *(weights or ["base model alone"])]))


def duration_text(seconds: float) -> str:
    """45 s, 12 min, 3 h 5 min, 2 d 4 h"""
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    shown = parts[first : first + 2] if first < 2 else parts[first : first + 1]
    return " ".join(f"{count} {unit}" for count, unit in shown if count or len(shown) == 1)


class Printer:
    """Prints a run's texts to stdout while they are made. The text that starts first is live; the others follow its end."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._in_line = False

    def __call__(self, path: str, text: str) -> None:
        """Takes the next piece of the text at `path` of the output."""
        self._texts[path] = self._texts.get(path, "") + text
        if path == next(iter(self._texts)):
            self._print(text)

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._in_line = not text.endswith("\n")

    def finish(self, result: Any) -> None:
        """Prints the other texts, or the result itself if none of it came as text."""
        _, *others = self._texts.values() or [""]
        for text in others:
            self._print(f"\n\n{text}")
        if not self._texts and not _is_empty(result):
            self._print(render(result))
        print(flush=True)  # before a line on stderr, which would else come first

    def end_line(self) -> None:
        """Ends a line that was begun, so that an error starts its own line."""
        if self._in_line:
            with suppress(OSError):
                self._print("\n")


def _is_empty(value: Any) -> bool:
    """Whether a value holds nothing but empty texts, which have no pieces to stream."""
    if isinstance(value, dict | list):
        return all(_is_empty(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


@contextmanager
def bars() -> Iterator[Report]:
    """Bars on a terminal's stderr, which vanish at the end. Nothing when piped."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    console = Console(stderr=True)
    what = Column(no_wrap=True, overflow="ellipsis", max_width=console.width // 2)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=what),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
    ]
    if console.width >= NARROW:
        columns.append(TimeRemainingColumn())
    shown = Bars(*columns, console=console, transient=True, redirect_stdout=False)
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
