"""`model-compose run`: one run of a workflow, in this process or on the service that is up."""

import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model_compose.commands import completion
from model_compose.commands.options import (
    EnvFiles,
    EnvPairs,
    Files,
    Verbose,
    blend_option,
    check_new_file,
    load_files,
    log_to_stderr,
    parse_blend,
)
from model_compose.errors import InputError

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile
    from model_compose.running import Record

POLL_SECONDS = 0.2


def run(
    workflow: Annotated[
        str | None,
        typer.Argument(
            metavar="WORKFLOW", help="The workflow's id. Default: the file's default workflow",
            autocompletion=completion.workflows,
        ),
    ] = None,
    input: Annotated[
        str,
        typer.Option(
            "--input", "-i", metavar="JSON|TEXT|@FILE|-",
            help="The input: JSON, plain text for the one text that the workflow needs, @FILE, or - for standard input",
        ),
    ] = "{}",
    blend: Annotated[str | None, blend_option("The blend: its name, or weights. Default: the file's own weights")] = None,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Print the text while it is made")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result to FILE instead of stdout")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the result and errors alone: no bars, no notes, no speed")
    ] = False,
    files: Files = None,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Run a workflow once, on the running service if there is one.

    In a terminal, stderr then shows which blend answered and how fast.
    """
    from contextlib import nullcontext

    from model_compose.commands.inputs import example, read_input, read_text
    from model_compose.oneshot import run_here, run_there
    from model_compose.progress import silent
    from model_compose.terminal import Printer, bars, render, show_answers, write

    text, mix = read_text(input), parse_blend(blend)
    loaded = load_files(files, env_files, env)
    value = read_input(text, loaded, workflow)
    if output is not None:
        check_new_file(output, "--output")
    log_to_stderr(verbose, level=logging.ERROR if quiet else logging.WARNING)
    printer = Printer() if stream and output is None else None
    try:
        if record := service(loaded, quiet=quiet):
            ran = run_there(record, loaded, value, workflow, mix, printer)
        else:
            loading = nullcontext(silent) if quiet else bars()
            ran = asyncio.run(run_here(loaded, value, workflow, mix, printer, loading))
    except BaseException as error:
        if printer is not None:
            printer.end_line()
        missing = [each for each in getattr(error, "fields", ()) if each.field.startswith("input")]
        if value == {} and missing:
            raise InputError(f"{error}; for example {example(loaded, workflow)}") from None
        raise
    if printer is not None:
        printer.finish(ran.output)
    else:
        write(render(ran.output), output)
    if not quiet:
        for note in ran.notes:
            print(f"⚠ {note}", file=sys.stderr)
        show_answers(ran.answers)


def service(loaded: "ComposeFile", *, quiet: bool = False) -> "Record | None":
    """The running service of this file, once its models are loaded. None if there is none that would answer the same."""
    from model_compose.running import find, fingerprint

    waiting = quiet
    while (record := find(loaded.files)) is not None and not record.ready:
        if not waiting:
            print("waiting for the running service to load its models", file=sys.stderr)
        waiting = True
        time.sleep(POLL_SECONDS)
    if record is None or record.api is None:
        return None
    if record.config != fingerprint(loaded.config):
        if not quiet:
            print(
                "the running service was started from another version of this file (or of its variables), so this command "
                "loads the models itself; `model-compose down`, then `up`, renews the service",
                file=sys.stderr,
            )
        return None
    return record
