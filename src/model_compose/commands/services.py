"""`model-compose ps` and `status`: which services of this user are up, and what one of them is doing."""

import shlex
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from model_compose.commands.options import AsJson, EnvFiles, EnvPairs, Files, all_files, load_files
from model_compose.errors import AddressInUse, ComposeError, ConfigError
from model_compose.nodes import FILE_NAMES

if TYPE_CHECKING:
    import httpx

    from model_compose.running import Model, Record

NOT_UP, NOT_READY = 3, 4
"""Exit codes of `status`. 3 is also what `systemctl status` has for a service that is not running."""
PATIENCE_SECONDS = 5.0
"""How long `status` waits for an answer. A service answers at once unless its machine is overloaded."""
PREFIX = "model_compose:"


def ps(as_json: AsJson = False) -> None:
    """List the services of this user that are up on this machine."""
    from model_compose.running import held
    from model_compose.terminal import render

    found = list(held())
    for path, record in found:
        if record is None:
            print(f"⚠ a service is up whose record cannot be read: {path}", file=sys.stderr)
    records = [record for _, record in found if record is not None]
    if as_json:
        print(render([_document(record) for record in records]))
    elif records:
        print("\n\n".join("\n".join([*_head(record, _state(record)), *_model_lines(record)]) for record in records))
    else:
        print("nothing is up; `model-compose up -d` starts the service of a file", file=sys.stderr)


def status(
    files: Files = None,
    as_json: AsJson = False,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
) -> None:
    """Show what the service of this file is doing.

    Exit codes: 0 ready; 3 not up; 4 up but not ready, which is loading, shutting down or not answering; 1 other errors.
    """
    from model_compose.running import find
    from model_compose.terminal import render

    found = files_or_what_is_up(all_files(files))
    record = find(found)
    if record is None:
        if as_json:
            print(render({"state": "down", "files": list(map(str, found))}))
        else:
            print("\n".join([f"{found[0].name} is not up", *what_is_up()]), file=sys.stderr)
        raise typer.Exit(NOT_UP)
    seen = _look(record, files, env_files, env)
    if as_json:
        print(render(_document(record, seen)))
    else:
        print("\n".join(_status_lines(record, seen)))
    for problem in seen.problems:
        print(f"⚠ {problem}", file=sys.stderr)
    if seen.state != "ready":
        raise typer.Exit(NOT_READY)


def what_is_up() -> list[str]:
    """The command that ends each service of this user, after a line that says so. Empty if nothing is up."""
    from model_compose.running import find_all

    lines = []
    for record in find_all():
        where = _api(record) or record.page or "still starting"
        lines.append(f"  {_ending(record)}  # {where}")
    return ["these are up; each line ends one:", *lines] if lines else []


def _ending(record: "Record") -> str:
    """The command that ends this service."""
    ends = ["kill", str(record.pid)]  # where the files are gone, or another version wrote the record
    if record.files and all(Path(file).is_file() for file in record.files):
        ends = ["model-compose", "down", *(part for file in record.files for part in ("-f", file))]
    return shlex.join(ends)


def port_in_use(port: int) -> AddressInUse | None:
    """The error for a port on which another service of this user listens, with the command that ends it. Else None."""
    from model_compose.running import find_all

    for record in find_all():
        if any(urlsplit(url).port == port for url in (record.api, record.page) if url):
            whose = f"the service of {record.files[0]}" if record.files else f"process {record.pid}"
            return AddressInUse(
                f"port {port} is in use by {whose}; stop it with `{_ending(record)}`, or set another port in the file",
                port=port,
            )
    return None


def files_or_what_is_up(given: Collection[Path]) -> tuple[Path, ...]:
    """The files that are meant. Raises ConfigError, which lists what is up, where there are none."""
    from model_compose.loading import find_files

    try:
        return find_files(given)
    except ConfigError as error:
        raise ConfigError(str(error), *(what_is_up() or ["nothing is up"])) from None


# What a service answers.


@dataclass(frozen=True)
class Load:
    """What the metrics tell of one model. None where its engine does not tell.

    tokens_per_second: of one text while it is made, on average over all completed requests.
    """

    running: int | None
    waiting: int | None
    kv_cache_usage: float | None
    kv_cache_bytes: int | None
    requests: int
    tokens: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Seen:
    """What a service said of itself. progress: how far it has loaded. loads: by the models' ids."""

    state: str
    progress: str | None
    loads: Mapping[str, Load]
    problems: Collection[str]


def _look(record: "Record", files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> Seen:
    """Asks the service for its health and its metrics. A service without an API is known by its record alone."""
    import httpx

    if record.api is None:
        return Seen(_state(record), None, {}, ())
    with httpx.Client(base_url=record.api, timeout=PATIENCE_SECONDS, trust_env=False) as client:
        try:
            health = client.get(f"{record.base_path}/health").json()
            answer = client.get("/metrics")
            if answer.status_code in (401, 403):
                key = _api_key(files, env_files, env)
                answer = client.get("/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        except (httpx.HTTPError, ValueError) as error:
            return Seen("not answering", None, {}, [f"{record.api} does not answer ({error or type(error).__name__})"])
    state = {"ok": "ready", "shutting_down": "shutting down"}.get(health.get("status"), "loading")
    progress = _progress_text(health["progress"]) if health.get("progress") else None
    if answer.status_code != 200:
        return Seen(state, progress, {}, [_why_no_metrics(answer)])
    return Seen(state, progress, _loads(answer.text), ())


def _why_no_metrics(answer: "httpx.Response") -> str:
    """The service's own reason, but for a missing key, which only the user of this file can mend."""
    if answer.status_code in (401, 403):
        return "the service wants an API key, and this file with these variables has none that it takes"
    try:
        reason = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        reason = f"it answers {answer.status_code}"
    return f"the service does not show its metrics: {reason}"


def _api_key(files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> str | None:
    """The file's first API key, if the file can be read with these variables."""
    with suppress(ComposeError):
        server = load_files(files, env_files, env).config.serving.server
        if server and server.api_keys:
            return server.api_keys[0].get_secret_value()
    return None


def _progress_text(progress: Mapping[str, Any]) -> str:
    done, total = progress["done"], progress["total"]
    return f"{progress['what']} ({done / total:.0%})" if total else str(progress["what"])


def _loads(metrics: str) -> dict[str, Load]:
    """Reads what Prometheus would read, by component."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name, component = sample.name.removeprefix(PREFIX), sample.labels.get("component")
            if component is not None and "le" not in sample.labels:
                of_component = sums.setdefault(component, {})
                of_component[name] = of_component.get(name, 0.0) + sample.value
    return {component: _load(values) for component, values in sums.items()}


def _load(values: Mapping[str, float]) -> Load:
    def count(name: str) -> int | None:
        return None if name not in values else int(values[name])

    seconds = values.get("time_per_output_token_seconds_sum", 0.0)
    return Load(
        count("num_requests_running"), count("num_requests_waiting"), values.get("kv_cache_usage_perc"),
        count("kv_cache_bytes"), count("request_success_total") or 0, count("generation_tokens_total") or 0,
        values["time_per_output_token_seconds_count"] / seconds if seconds else None,
    )  # fmt: skip


# How it is shown.


def _document(record: "Record", seen: Seen | None = None) -> dict[str, Any]:
    """A service as JSON."""
    models = [asdict(model) for model in record.models]
    if seen is not None:
        models = [{**model, **(asdict(load) if (load := seen.loads.get(model["id"])) else {})} for model in models]
    return {
        "name": _name(record),
        "state": seen.state if seen else _state(record),
        **({"progress": seen.progress} if seen and seen.progress else {}),
        "pid": record.pid,
        "files": list(record.files),
        "api": _api(record),
        "page": record.page,
        "log": record.log,
        "started": record.started or None,
        "uptime_seconds": round(_uptime(record), 1) if record.started else None,
        "models": models,
    }


def _head(record: "Record", state: str) -> list[str]:
    """The lines that `ps` and `status` share."""
    from model_compose.terminal import duration_text

    since = f", up {duration_text(_uptime(record))}" if record.started else ""
    facts: list[tuple[str, str | None]] = [("file", file) for file in record.files]
    facts += [("API", _api(record)), ("page", record.page), ("log", record.log)]
    return [f"{_name(record)}: {state}{since}, process {record.pid}", *_aligned(facts)]


def _model_lines(record: "Record") -> list[str]:
    from model_compose.terminal import mix_text

    shown = [f"{each.id}: {each.base} · {mix_text(each.blends[0])}" for each in record.models if each.blends]
    return _aligned([("model", line) for line in shown])


def _status_lines(record: "Record", seen: Seen) -> list[str]:
    lines = _head(record, f"{seen.state}, {seen.progress}" if seen.progress else seen.state)
    for model in record.models:
        lines += ["", f"{model.id}: {model.base} ({model.driver})", *_aligned(_facts(model, seen.loads.get(model.id)))]
    return lines


def _facts(model: "Model", load: Load | None) -> list[tuple[str, str | None]]:
    from model_compose.terminal import mix_text

    facts: list[tuple[str, str | None]] = [("adapters", ", ".join(model.adapters) or "none")]
    facts += [("blend", mix_text(mix)) for mix in model.blends]
    if load is None:
        return facts
    if load.running is not None:
        facts.append(("requests", f"{load.running} running, {load.waiting} waiting, {load.requests:,} completed"))
    if load.kv_cache_usage is not None and load.kv_cache_bytes is not None:
        facts.append(("KV cache", f"{load.kv_cache_usage:.0%} of {load.kv_cache_bytes / 1e6:,.0f} MB"))
    if load.tokens_per_second is not None:
        facts.append(("speed", f"{load.tokens_per_second:.1f} tokens/s for one text, {load.tokens:,} tokens so far"))
    return facts


def _aligned(facts: Collection[tuple[str, str | None]]) -> list[str]:
    """Labelled lines; facts without a value are left out."""
    return [f"  {label:<8}  {value}" for label, value in facts if value]


def _name(record: "Record") -> str:
    """The controller's name, else the folder's, with the file's own name where that is not the usual one."""
    if record.name:
        return record.name
    if not record.files:
        return f"process {record.pid}"
    path = Path(record.files[0])
    return path.parent.name if path.name in FILE_NAMES else f"{path.parent.name}/{path.name}"


def _state(record: "Record") -> str:
    return "ready" if record.ready else "loading"


def _api(record: "Record") -> str | None:
    return record.api and record.api + record.base_path


def _uptime(record: "Record") -> float:
    """In seconds."""
    return time.time() - record.started
