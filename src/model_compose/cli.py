"""The command line: parsing and printing only. stdout carries results, stderr everything else."""

import asyncio
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from model_compose import __version__
from model_compose.commands import adapters
from model_compose.commands.export import export
from model_compose.commands.options import (
    BLEND_FORMS,
    EnvFiles,
    EnvPairs,
    Files,
    Verbose,
    all_files,
    global_files,
    load_files,
    log_to_stderr,
    parse_blend,
)
from model_compose.commands.setup import setup
from model_compose.errors import ComposeError, ConfigError, Conflict, InputError, LoadError
from model_compose.progress import Progress, silent
from model_compose.request_log import REQUEST_FORMAT

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile
    from model_compose.progress import Report
    from model_compose.running import Record

INTERRUPTED = 130
STOP_SECONDS = 60
POLL_SECONDS = 0.2

app = typer.Typer(
    name="model-compose", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None,
    help="Serve a base language model with several weighted LoRA adapters, blended exactly, from one YAML file.",
)  # fmt: skip


def main() -> NoReturn:
    """Exit codes: 0, 1 (failed), 2 (usage), 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = 0
    interrupts: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        interrupts.append(number)  # torch's C code may turn the exception into another one
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        code = 1
    except Exception as error:  # tracebacks, even of our own bugs, only with -v
        code = INTERRUPTED if interrupts else 1
        if not interrupts:
            _complain(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            print(f"❌ the output cannot be written ({error.strerror})", file=sys.stderr)
    # Not sys.exit: download threads of an interrupted load would be waited for.
    os._exit(code)


@app.callback(invoke_without_command=True)
def options(
    files: Files = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    if version:
        print(f"model-compose {__version__}")
        raise typer.Exit
    global_files[:] = files or []


@app.command()
def up(
    files: Files = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Serve in the background once healthy")] = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
    log: Annotated[Path | None, typer.Option(hidden=True, help="Where --detach sends the output")] = None,
) -> None:
    """Load the models and serve until stopped."""
    from model_compose.preflight import check_files

    loaded = load_files(files, env_files, env)
    controller = loaded.config.serving
    if controller.server is None and controller.webui is None:
        raise ConfigError(
            f"{loaded.files[0].name}: the controller has neither adapter nor webui, so nothing would be served; add "
            "adapter: {type: http-server}"
        )
    check_files(loaded)  # before it says where it listens, or starts a process
    if detach:
        options = [("--file", loaded.files), ("--env-file", env_files or ())]
        arguments = [str(part) for name, values in options for value in values for part in (name, value)]
        pairs = dict(pair.split("=", 1) for pair in env or ())
        _detach(loaded, [*arguments, *(["--verbose"] if verbose else [])], pairs)
    else:
        log_to_stderr(verbose, format=REQUEST_FORMAT, kept_in=log)
        _serve(loaded)


@app.command()
def down(files: Files = None) -> None:
    """Stop the service of this file. Where there is no file, say what is up."""
    from model_compose.loading import find_files
    from model_compose.running import find

    try:
        found = find_files(all_files(files))
    except ConfigError as error:
        raise ConfigError(str(error), *(_what_is_up() or ["nothing is up"])) from None
    record = find(found)
    if record is None:
        print("\n".join([f"{found[0].name} is not up", *_what_is_up()]), file=sys.stderr)
        return
    with suppress(ProcessLookupError):  # ended just now
        os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while find(found) is not None:
        if time.monotonic() > deadline:
            raise Conflict(
                f"the service (process {record.pid}) is still finishing its requests after {STOP_SECONDS} s; wait for it, "
                f"or end it with `kill -9 {record.pid}`"
            )
        time.sleep(0.1)
    print("stopped", file=sys.stderr)


@app.command()
def run(
    workflow: Annotated[
        str | None, typer.Argument(metavar="[WORKFLOW]", help="Its id; the default workflow if left out")
    ] = None,
    input: Annotated[str, typer.Option("--input", "-i", metavar="JSON|TEXT|@FILE|-", help="The input")] = "{}",
    blend: Annotated[
        str | None, typer.Option("--blend", "-b", metavar=BLEND_FORMS, help="A blend's name, or weights")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Print the text as it is made")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result here instead of stdout")
    ] = None,
    files: Files = None,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """Run a workflow once, here or on the running service."""
    from model_compose.commands.inputs import example, read_input, read_text
    from model_compose.oneshot import run_here, run_there
    from model_compose.terminal import Printer, bars, render, write

    text, mix = read_text(input), parse_blend(blend)
    loaded = load_files(files, env_files, env)
    value = read_input(text, loaded, workflow)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(
            f"--output: {output} is a folder" if output.is_dir() else f"--output: no folder {output.parent}"
        )
    log_to_stderr(verbose, level=logging.WARNING)
    printer = Printer() if stream and output is None else None
    try:
        if record := _service(loaded):
            result, notes = run_there(record, loaded, value, workflow, mix, printer)
        else:
            result, notes = asyncio.run(run_here(loaded, value, workflow, mix, printer, bars()))
    except BaseException as error:
        if printer is not None:
            printer.end_line()
        missing = [each for each in getattr(error, "fields", ()) if each.field.startswith("input")]
        if value == {} and missing:
            raise InputError(f"{error}; for example {example(loaded, workflow)}") from None
        raise
    if printer is not None:
        printer.finish(result)
    else:
        write(render(result), output)
    for note in notes:
        print(f"⚠ {note}", file=sys.stderr)


@app.command()
def validate(files: Files = None, env_files: EnvFiles = None, env: EnvPairs = None) -> None:
    """Check the file, and the models and adapters on this machine that it names, without loading them."""
    from model_compose.preflight import check_files

    loaded = load_files(files, env_files, env)
    check_files(loaded)
    config = loaded.config
    server = config.serving.server
    counts = f"{len(config.all_components)} component(s), {len(config.all_workflows)} workflow(s)"
    print(f"✅ Configuration is valid (controller: {server.type if server else 'none'}, {counts})")


@app.command()
def plan(
    files: Files = None,
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", "-m", metavar="[DEVICE=]SIZE", help="Pretend 16GB, or cuda:0=16GB; repeatable"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes")] = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """Say what the models need, before fetching any weights."""
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


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    from model_compose.config import Config

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    print(json.dumps(document, indent=2, ensure_ascii=False))


app.add_typer(adapters.app, name="adapters")
app.command()(export)
app.command()(setup)
app.command("start", hidden=True)(up)
app.command("stop", hidden=True)(down)


def _service(loaded: "ComposeFile") -> "Record | None":
    """The running service of this file, once it is ready; None where there is none that would give the same answer."""
    from model_compose.running import find, fingerprint

    waiting = False
    while (record := find(loaded.files)) is not None and not record.ready:
        if not waiting:
            print("waiting for the running service to load its models", file=sys.stderr)
        waiting = True
        time.sleep(POLL_SECONDS)
    if record is None or record.api is None:
        return None
    if record.config != fingerprint(loaded.config):
        print(
            "the running service was started from another version of this file (or of its variables), so the models are "
            "loaded here; `model-compose down`, then `up`, renews it",
            file=sys.stderr,
        )
        return None
    return record


def _what_is_up() -> list[str]:
    """What ends each service of this user, after a line that says so; empty where nothing is up."""
    from model_compose.running import find_all

    lines = []
    for record in find_all():
        ends = ["kill", str(record.pid)]  # where the files are gone, or another version wrote the record
        if record.files and all(Path(file).is_file() for file in record.files):
            ends = ["model-compose", "down", *(part for file in record.files for part in ("-f", file))]
        where = record.api + record.base_path if record.api else record.page or "still starting"
        lines.append(f"  {shlex.join(ends)}  # {where}")
    return ["these are up; each line ends one:", *lines] if lines else []


def _serve(loaded: "ComposeFile") -> None:
    from model_compose.compose import Compose
    from model_compose.running import hold
    from model_compose.servers.serve import Addresses, serve
    from model_compose.terminal import bars

    with hold(loaded.files, loaded.config) as running, ExitStack() as loading:
        report = loading.enter_context(bars())
        compose = Compose(loaded)
        server = loaded.config.serving.server
        base_path = server.base_path if server else ""

        def announce(addresses: Addresses) -> None:
            running.update(api=addresses.api, page=addresses.page, base_path=base_path)
            for name, url in (("API", addresses.api and addresses.api + base_path), ("page", addresses.page)):
                if url:
                    print(f"{name:<5} {url}", file=sys.stderr)

        def ready() -> None:
            loading.close()
            running.update(ready=True)
            print("ready", file=sys.stderr)

        asyncio.run(serve(compose, report, announce, ready))


def _detach(loaded: "ComposeFile", arguments: list[str], pairs: dict[str, str]) -> None:
    """Starts `up` with these arguments in the background, and reports its address once it is healthy.

    pairs: what -e gave; it goes into the child's environment, since everybody may read a process's arguments.
    """
    from model_compose.running import already_up, find, log_file, private
    from model_compose.terminal import bars

    if (record := find(loaded.files)) is not None:
        raise already_up(loaded.files, record)
    log = log_file(loaded.files)
    with open(log, "ab", opener=private) as sink:
        before = sink.tell()
        child = subprocess.Popen(
            # -P: a torch.py here is not torch
            [sys.executable, "-P", "-m", "model_compose", "up", "--log", str(log), *arguments],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, env={**os.environ, **pairs},
        )  # fmt: skip
    try:
        with bars() as report:
            while (record := find(loaded.files)) is None or record.pid != child.pid or not record.ready:
                if child.poll() is not None:
                    raise LoadError(_why_it_ended(log, before))
                if report is not silent and record is not None and record.api is not None:
                    _report_health(f"{record.api}{record.base_path}/health", report)
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        child.terminate()
        raise
    print(f"up as process {record.pid}, log in {log}", file=sys.stderr)
    for url in filter(None, (record.api and record.api + record.base_path, record.page)):
        print(url)


def _why_it_ended(log: Path, before: int) -> str:
    """The child's own complaint, else the end of its log. before: bytes of earlier starts, unless they were put aside."""
    content = log.read_bytes()
    text = content[before if before <= len(content) else 0 :].decode(errors="replace").strip()
    _, mark, complaint = text.rpartition("❌ ")
    reason = complaint if mark else "\n".join(text.splitlines()[-5:])
    return f"{reason}\n(the service did not start; its log: {log})"


def _report_health(url: str, report: "Report") -> None:
    """The loading service's progress, as this terminal's bar."""
    import httpx

    with suppress(httpx.HTTPError, ValueError):
        progress = httpx.get(url, trust_env=False).json().get("progress")
        if progress:
            report(Progress(**progress))


def _complain(error: Exception) -> None:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        import traceback

        traceback.print_exception(error)
    known = isinstance(error, ComposeError)
    print(
        f"❌ {error}" if known else f"❌ unexpected {type(error).__name__}: {error} (-v shows where)", file=sys.stderr
    )
