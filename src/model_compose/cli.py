"""The command line: parsing and printing only. stdout carries results, stderr everything else."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from model_compose import __version__
from model_compose.errors import ComposeError, ConfigError, InputError

if TYPE_CHECKING:
    from model_compose.loading import Loaded
    from model_compose.progress import Report

app = typer.Typer(
    name="model-compose", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None,
    help="Serve a base language model with several weighted LoRA adapters, blended exactly, from one YAML file.",
)  # fmt: skip

Files = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", metavar="FILE", help="YAML file; repeatable, later ones win (model-compose.yml)"),
]
EnvFiles = Annotated[
    list[Path] | None, typer.Option("--env-file", metavar="FILE", help="File of NAME=VALUE lines (.env); repeatable")
]
EnvPairs = Annotated[
    list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="One variable; repeatable")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More in the log, and tracebacks")]

_global_files: list[Path] = []


def main() -> NoReturn:
    """Exit codes: 0, 1 (failed), 2 (usage), 130 (interrupted)."""
    code = 0
    try:
        app()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # tracebacks, even of our own bugs, only with -v
        _complain(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
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
    _global_files[:] = files or []


@app.command()
def up(
    files: Files = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Serve in the background once healthy")] = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """Load the models and serve until stopped."""
    loaded = _load(files, env_files, env)
    if detach:
        _detach(loaded)
    else:
        _log_to_stderr(verbose)
        _serve(loaded)


@app.command()
def down(files: Files = None) -> None:
    """Stop the service of this file."""
    from model_compose.loading import find_files
    from model_compose.running import find

    found = find_files(_all_files(files))
    record = find(found)
    if record is None:
        print(f"{found[0].name} is not up", file=sys.stderr)
        return
    os.kill(record.pid, signal.SIGTERM)
    _wait_until(lambda: find(found) is None, seconds=60)
    print("stopped", file=sys.stderr)


@app.command()
def run(
    workflow: Annotated[str | None, typer.Argument(help="The workflow's id; the default one if left out")] = None,
    input: Annotated[str, typer.Option("--input", "-i", metavar="JSON|@FILE|-", help="The input")] = "{}",
    blend: Annotated[
        str | None, typer.Option("--blend", "-b", metavar="NAME|JSON", help="A blend's name, or weights")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", "-s", help="Print the text as it is made")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result here instead of stdout")
    ] = None,
    files: Files = None,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """Run a workflow once, on the running service of this file if there is one."""
    from model_compose.oneshot import run_here, run_there
    from model_compose.running import find

    value, mix = _json(_input_text(input), "--input"), _blend(blend)
    loaded = _load(files, env_files, env)
    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output: there is no folder {output.parent}")
    _log_to_stderr(verbose, level=logging.WARNING)
    show = _print_delta if stream and output is None else None
    record = find(loaded.files)
    if record is not None and record.ready and record.api is not None:
        result = run_there(record, loaded, value, workflow, mix, show)
    else:
        with _progress() as report:
            result = asyncio.run(run_here(loaded, value, workflow, mix, show, report))
    if show is not None:
        print()
    else:
        _write(_render(result), output)


@app.command()
def validate(files: Files = None, env_files: EnvFiles = None, env: EnvPairs = None) -> None:
    """Check the file without loading any model."""
    config = _load(files, env_files, env).config
    server = config.serving.server
    counts = f"{len(config.all_components)} component(s), {len(config.all_workflows)} workflow(s)"
    print(f"✅ Configuration is valid (controller: {server.type if server else 'none'}, {counts})")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    from model_compose.config import Config

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    print(json.dumps(document, indent=2, ensure_ascii=False))


app.command("start", hidden=True)(up)
app.command("stop", hidden=True)(down)


def _all_files(files: list[Path] | None) -> list[Path]:
    return [*_global_files, *(files or [])]


def _load(files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> "Loaded":
    from model_compose.loading import environment, find_files, load

    found = find_files(_all_files(files))
    return load(found, environment(env_files or (), env or ()))


def _serve(loaded: "Loaded") -> None:
    from model_compose.compose import Compose
    from model_compose.running import hold
    from model_compose.servers.serve import Addresses, serve

    with hold(loaded.files) as running, _progress() as report:
        compose = Compose(loaded)
        server = loaded.config.serving.server
        base_path = server.base_path if server else ""

        def announce(addresses: Addresses) -> None:
            running.update(api=addresses.api, page=addresses.page, base_path=base_path)
            for name, url in (("API", addresses.api and addresses.api + base_path), ("page", addresses.page)):
                if url:
                    print(f"{name:<5} {url}", file=sys.stderr)

        def ready() -> None:
            running.update(ready=True)
            print("ready", file=sys.stderr)

        asyncio.run(serve(compose, report, announce, ready))


def _detach(loaded: "Loaded") -> None:
    """Starts this command again in the background, and reports its address once it is healthy."""
    from model_compose.running import find, log_file

    if (record := find(loaded.files)) is not None:
        raise ConfigError(f"{loaded.files[0].name} is up already (process {record.pid}); `model-compose down` ends it")
    log = log_file(loaded.files)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [part for part in sys.argv[1:] if part not in ("-d", "--detach")]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "model_compose", *arguments],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    try:
        while (record := find(loaded.files)) is None or not record.ready:
            if child.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
                raise ConfigError(f"the service ended while starting; the end of {log}:\n{tail}")
            time.sleep(0.2)
    except KeyboardInterrupt:
        child.terminate()
        raise
    print(f"up as process {record.pid}, log in {log}", file=sys.stderr)
    for url in filter(None, (record.api and record.api + record.base_path, record.page)):
        print(url)


def _wait_until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise ConfigError(f"the service did not stop within {seconds:g} s")
        time.sleep(0.1)


def _input_text(given: str) -> str:
    """@file and - (standard input) besides the text itself."""
    if given == "-":
        return sys.stdin.read()
    if given.startswith("@"):
        try:
            return Path(given[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--input: {given[1:]} cannot be read ({error.strerror})") from None
    return given


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f'{option} is not valid JSON: {error}; example: \'{{"prompt": "Hello"}}\'') from None


def _blend(given: str | None) -> Any:
    """A name as it is; anything that starts like JSON as JSON."""
    return _json(given, "--blend") if given and given.lstrip()[:1] in "{[" else given


def _render(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        if text:
            print(text)
        return
    temporary = output.with_name(f".{output.name}.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(output)


def _print_delta(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _complain(error: Exception) -> None:
    if "-v" in sys.argv or "--verbose" in sys.argv:
        import traceback

        traceback.print_exception(error)
    known = isinstance(error, ComposeError)
    print(
        f"❌ {error}" if known else f"❌ unexpected {type(error).__name__}: {error} (-v shows where)", file=sys.stderr
    )


def _log_to_stderr(verbose: bool, level: int = logging.INFO) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-8s %(message)s", stream=sys.stderr)
    logging.getLogger("model_compose").setLevel(logging.DEBUG if verbose else level)


@contextmanager
def _progress() -> Iterator["Report"]:
    """Bars on a terminal's stderr; nothing when piped."""
    from model_compose.progress import Progress, silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[count]}"))
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def report(progress: Progress) -> None:
        if progress.what not in tasks:
            tasks[progress.what] = bars.add_task(progress.what, total=progress.total, count="")
        count = _count(progress)
        bars.update(tasks[progress.what], completed=progress.done, total=progress.total, count=count)

    with bars:
        yield report


def _count(progress: Any) -> str:
    if progress.unit != "B":
        return f"{progress.done}/{progress.total or '?'}"
    total = f" of {progress.total / 1e6:.0f}" if progress.total else ""
    return f"{progress.done / 1e6:.0f}{total} MB"
