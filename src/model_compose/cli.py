"""The command line: it registers the commands, and turns what they raise into sentences and exit codes.

Results go to stdout, everything else to stderr.
"""

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Collection
from typing import Annotated, Any, NoReturn

import typer

from model_compose import __version__
from model_compose.commands import adapters
from model_compose.commands.export import export
from model_compose.commands.init import init
from model_compose.commands.logs import logs
from model_compose.commands.options import (
    EnvFiles,
    EnvPairs,
    Files,
    Group,
    Verbose,
    global_files,
    load_files,
    log_to_stderr,
)
from model_compose.commands.run import run
from model_compose.commands.services import ps, status
from model_compose.commands.setup import setup
from model_compose.commands.up import down, up
from model_compose.errors import ComposeError, LoadError

INTERRUPTED = 130

app = typer.Typer(
    name="model-compose", cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve a base language model with several weighted LoRA adapters, blended exactly, from one YAML file.",
    epilog="Start with: model-compose init",
)  # fmt: skip


def main() -> NoReturn:
    """Runs the command line of this process and ends it."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    interrupts: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    code = execute(sys.argv[1:], interrupts)
    # Not sys.exit, which would wait for the download threads of an interrupted load.
    os._exit(code)


def execute(arguments: Collection[str], interrupts: Collection[int] = ()) -> int:
    """Runs one command line in this process. Returns its exit code: 0, 1 (failed), 2 (wrong usage), 130 (interrupted).

    `status` has codes of its own for services that are not ready. interrupts: the SIGINTs so far, since torch's C code may
    turn KeyboardInterrupt into another exception.
    """
    code = 0
    try:
        app(arguments)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        code = 1
    except Exception as error:
        code = INTERRUPTED if interrupts else 1
        if not interrupts:
            _complain(error, with_traceback="-v" in arguments or "--verbose" in arguments)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            print(f"❌ the output cannot be written ({error.strerror})", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def options(
    files: Files = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    if version:
        print(f"model-compose {__version__}")
        raise typer.Exit
    global_files[:] = files or []


def validate(files: Files = None, env_files: EnvFiles = None, env: EnvPairs = None) -> None:
    """Check the file, and its models and adapters on this machine.

    This loads no model and asks no network.
    """
    from model_compose.preflight import check_files

    loaded = load_files(files, env_files, env)
    check_files(loaded)
    config = loaded.config
    server = config.serving.server
    counts = f"{len(config.all_components)} component(s), {len(config.all_workflows)} workflow(s)"
    print(f"✅ Configuration is valid (controller: {server.type if server else 'none'}, {counts})")


def plan(
    files: Files = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory", "-m", metavar="[DEVICE=]SIZE",
            help="Assume this much memory: 16GB, or cuda:0=16GB; repeatable. Default: what this machine has free",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text, with sizes in bytes")] = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show what memory and downloads the models need.

    This fetches configs but no weights. Exit code 1: something does not fit.
    """
    from model_compose import plan as planning
    from model_compose.terminal import bars, render

    pretended = planning.parse_memory(memory or ())
    loaded = load_files(files, env_files, env)
    log_to_stderr(verbose, level=logging.WARNING)
    with bars() as report:
        made = planning.plan(loaded, pretended, report)
    if as_json:
        print(render(planning.as_json(made)))
    else:
        planning.show(made)
    if made.problems:
        raise LoadError("\n".join(made.problems))


def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    from model_compose.config import Config

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _complain(error: Exception, *, with_traceback: bool) -> None:
    """Says what went wrong in one sentence. Tracebacks, also those of our own bugs, come only with -v."""
    if with_traceback:
        import traceback

        traceback.print_exception(error)
    known = isinstance(error, ComposeError)
    print(
        f"❌ {error}" if known else f"❌ unexpected {type(error).__name__}: {error} (-v shows where)", file=sys.stderr
    )


for command, example in (
    (init, "init chat --output chat.yml"),
    (up, "up -d -f my.yml"),
    (down, "down -f my.yml"),
    (run, "run --input 'Why is the sky blue?' --blend alpaca=0.5,pirate=1 --stream"),
    (ps, "ps --json"),
    (status, "status -f my.yml"),
    (logs, "logs -n 100 -f"),
    (validate, "validate -f base.yml -f production.yml"),
    (plan, "plan --memory cuda:0=16GB"),
    (schema, "schema > schema.json"),
    (export, "export --format merged --blend captain --output captain/"),
    (setup, "setup vllm"),
):  # fmt: skip
    app.command(epilog=f"Example: model-compose {example}")(command)
app.add_typer(adapters.app, name="adapters")
app.command("start", hidden=True)(up)
app.command("stop", hidden=True)(down)
