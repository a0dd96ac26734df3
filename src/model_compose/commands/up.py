"""`model-compose up` and `down`: a service in this terminal or in the background, and its end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model_compose.commands.options import (
    EnvFiles,
    EnvPairs,
    Files,
    Verbose,
    all_files,
    load_files,
    log_to_stderr,
)
from model_compose.commands.services import files_or_what_is_up, port_in_use, what_is_up
from model_compose.errors import AddressInUse, ConfigError, Conflict, LoadError
from model_compose.progress import Progress, silent
from model_compose.request_log import REQUEST_FORMAT

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile
    from model_compose.progress import Report

STOP_SECONDS = 60
POLL_SECONDS = 0.2


def up(
    files: Files = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Serve in the background, and return once the models are loaded")
    ] = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
    log: Annotated[Path | None, typer.Option(hidden=True, help="The file that --detach sends the output to")] = None,
) -> None:
    """Load the models and serve them until stopped."""
    from model_compose.preflight import check_files

    loaded = load_files(files, env_files, env)
    controller = loaded.config.serving
    if controller.server is None and controller.webui is None:
        raise ConfigError(
            f"{loaded.files[0].name}: the controller has neither adapter nor webui, so nothing would be served; add "
            "adapter: {type: http-server}"
        )
    check_files(loaded)  # before this says where it listens, or starts a process
    if detach:
        options = [("--file", loaded.files), ("--env-file", env_files or ())]
        arguments = [str(part) for name, values in options for value in values for part in (name, value)]
        pairs = dict(pair.split("=", 1) for pair in env or ())
        _detach(loaded, [*arguments, *(["--verbose"] if verbose else [])], pairs)
    else:
        log_to_stderr(verbose, format=REQUEST_FORMAT, kept_in=log)
        _serve(loaded, log)


def down(files: Files = None) -> None:
    """Stop the service of this file, after its running requests.

    Where there is no file, or no service of it, this lists what is up.
    """
    from model_compose.running import find

    found = files_or_what_is_up(all_files(files))
    record = find(found)
    if record is None:
        print("\n".join([f"{found[0].name} is not up", *what_is_up()]), file=sys.stderr)
        return
    with suppress(ProcessLookupError):  # it ended just now
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


def _serve(loaded: "ComposeFile", log: Path | None) -> None:
    """Serves in this process. log: see `running.hold`."""
    from model_compose.compose import Compose
    from model_compose.running import hold
    from model_compose.servers.serve import Addresses, serve
    from model_compose.terminal import bars

    with hold(loaded.files, loaded.config, log) as running, ExitStack() as loading:
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

        try:
            asyncio.run(serve(compose, report, announce, ready))
        except AddressInUse as error:
            ours = port_in_use(error.port) if error.port else None
            raise (ours or error) from None


def _detach(loaded: "ComposeFile", arguments: list[str], pairs: dict[str, str]) -> None:
    """Starts `up` with these arguments in the background, and prints its addresses once its models are loaded.

    pairs: the variables of -e. They go into the child's environment, since every user may read a process's arguments.
    """
    from model_compose.running import already_up, find, log_file, make_state_dir, private
    from model_compose.terminal import bars

    if (record := find(loaded.files)) is not None:
        raise already_up(loaded.files, record)
    make_state_dir()
    log = log_file(loaded.files)
    with open(log, "ab", opener=private) as sink:
        before = sink.tell()
        child = subprocess.Popen(
            # -P: Python does not import a torch.py that lies in this folder
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
    """The child's own complaint, else the end of its log.

    before: bytes that earlier starts left in the log. A log that is shorter was renamed meanwhile, and is all the child's.
    """
    content = log.read_bytes()
    text = content[before if before <= len(content) else 0 :].decode(errors="replace").strip()
    _, mark, complaint = text.rpartition("❌ ")
    reason = complaint if mark else "\n".join(text.splitlines()[-5:])
    return f"{reason}\n(the service did not start; its log: {log})"


def _report_health(url: str, report: "Report") -> None:
    """Shows how far the service has loaded, on this terminal's bar."""
    import httpx

    with suppress(httpx.HTTPError, ValueError):
        progress = httpx.get(url, trust_env=False).json().get("progress")
        if progress:
            report(Progress(**progress))
