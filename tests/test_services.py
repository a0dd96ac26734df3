"""`ps`, `status` and `logs`: what they say of services that are up, loading, gone, silent or not ours."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from model_compose.commands.services import NOT_READY, NOT_UP
from model_compose.loading import load
from model_compose.running import Running, find, hold, log_file, make_state_dir, state_dir
from model_compose.terminal import duration_text
from tests import tiny
from tests.conftest import serving
from tests.test_cli import as_running, called, interrupted, start, state
from tests.waiting import SECONDS, wait_until

__all__ = ["state"]

KEY = "s3cret"
KEYED = tiny.YAML.replace("base_path: /api", 'base_path: /api, api_keys: ["${env.KEY}"]')


@contextmanager
def held(path: Path, env: dict[str, str] | None = None, log: Path | None = None) -> Iterator[Running]:
    """Within the block a service of the file is loading."""
    loaded = load([path], env or {})
    with hold(loaded.files, loaded.config, log) as running:
        yield running


def write(folder: Path, text: str = tiny.YAML, name: str = "model-compose.yml") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


UP = "up a while"


def uptimes(text: str) -> str:
    """The text with UP for each uptime, which depends on the machine."""
    return re.sub(r"up \d+ s\b", UP, text)


# ps


def test_ps_where_nothing_is_up(tmp_path: Path) -> None:
    said = "nothing is up; `model-compose up -d` starts the service of a file\n"
    assert called("ps", cwd=tmp_path) == (0, "", said)
    assert called("ps", "--json", cwd=tmp_path) == (0, "[]\n", "")


def test_ps_lists_every_service_from_any_folder(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", name="other.yml")
    named = write(tmp_path / "three", tiny.YAML.replace("controller:", "controller:\n  name: writers"))
    with as_running(one, "http://127.0.0.1:9"), held(two) as loading, held(named):
        loading.update(page="http://127.0.0.1:8")
        code, out, err = called("ps", cwd=tmp_path)
        assert (code, err) == (0, "")
        first, second, third = sorted(uptimes(out).strip().split("\n\n"))
        assert first.splitlines() == [
            f"one: ready, {UP}, process {os.getpid()}",
            f"  file      {one}",
            "  API       http://127.0.0.1:9/api",
            "  model     default: ./base · default · alpaca 0.7 · pirate 0.8",
        ]
        assert second.startswith(f"two/other.yml: loading, {UP}, process ")
        assert "  page      http://127.0.0.1:8\n" in second
        assert third.startswith("writers: loading")
        documents = json.loads(called("ps", "--json", cwd=tmp_path)[1])
        assert [(each["name"], each["state"], each["api"]) for each in sorted(documents, key=lambda d: d["name"])] == [
            ("one", "ready", "http://127.0.0.1:9/api"), ("two/other.yml", "loading", None), ("writers", "loading", None),
        ]  # fmt: skip
        assert documents[0]["models"][0]["blends"][1] == {"name": "strong", "weights": {"alpaca": 2.0}, "method": None}


def test_ps_says_where_a_record_cannot_be_read_and_lists_the_others(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    with held(one), held(two):
        (path,) = state_dir().glob("one-*.json")
        path.write_text("{")
        code, out, err = called("ps", cwd=tmp_path)
        assert (code, err) == (0, f"⚠ a service is up whose record cannot be read: {path}\n")
        assert out.startswith("two: loading")


def test_the_record_of_an_older_version_is_listed(tmp_path: Path) -> None:
    with held(write(tmp_path / "one")):
        (path,) = state_dir().glob("*.json")
        path.write_text(
            json.dumps({"pid": 77, "config": "x", "api": None, "page": None, "base_path": "", "ready": True})
        )
        assert called("ps", cwd=tmp_path) == (0, "process 77: ready, process 77\n", "")
        assert json.loads(called("ps", "--json", cwd=tmp_path)[1])[0]["uptime_seconds"] is None


# status


def status(*arguments: str, cwd: Path) -> tuple[int, Any, str]:
    code, out, err = called("status", "--json", *arguments, cwd=cwd)
    return code, json.loads(out), err


def test_status_of_a_ready_service(project: Path, server: str) -> None:
    cwd = project.parent
    with as_running(project, server):
        before = status(cwd=cwd)[1]["models"][0]["tokens"]
        assert called("run", "-i", "Once", cwd=cwd)[0] == 0
        code, document, err = status(cwd=cwd)
        assert (code, err, document["state"], document["api"]) == (0, "", "ready", f"{server}/api")
        (model,) = document["models"]
        assert (model["id"], model["base"], model["driver"]) == ("default", "./base", "huggingface")
        assert model["tokens"] == before + 12
        assert (model["running"], model["waiting"], model["kv_cache_usage"]) == (0, 0, 0.0)
        assert model["tokens_per_second"] > 0
        code, out, err = called("status", "-f", str(project), cwd=cwd.parent)
        assert (code, err) == (0, "")
        assert uptimes(out).startswith(f"{cwd.name}: ready, {UP}, process {os.getpid()}\n")
        for line in (
            "default: ./base (huggingface)", "  adapters  alpaca, pirate", "  blend     default · alpaca 0.7 · pirate 0.8",
            "  blend     strong · alpaca 2", "  blend     plain · base model alone", "  requests  0 running, 0 waiting, ",
            "  KV cache  0% of ", "  speed     ",
        ):  # fmt: skip
            assert f"\n{line}" in out


def test_status_where_nothing_is_up(tmp_path: Path) -> None:
    path = write(tmp_path / "one")
    assert called("status", cwd=path.parent) == (NOT_UP, "", "model-compose.yml is not up\n")
    assert status(cwd=path.parent) == (NOT_UP, {"state": "down", "files": [str(path)]}, "")
    code, out, err = called("status", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("❌ no model-compose.yml or model-compose.yaml in ")


def test_status_while_the_models_load(tmp_path: Path) -> None:
    path = write(tmp_path / "one")
    with held(path):
        code, document, err = status(cwd=path.parent)  # before its API listens
        assert (code, document["state"], err) == (NOT_READY, "loading", "")
    with serving(path, load_models=False) as url, held(path) as running:
        running.update(api=url, base_path="/api")
        code, document, err = status(cwd=path.parent)
        assert (code, document["state"], document["progress"], err) == (NOT_READY, "loading", "starting", "")
        code, out, err = called("status", cwd=path.parent)
        assert (code, err) == (NOT_READY, "")
        assert uptimes(out).startswith(f"one: loading, starting, {UP}, process ")


def test_status_of_a_service_that_does_not_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with as_running(path, url):
            code, document, err = status(cwd=path.parent)
    assert (code, document["state"]) == (NOT_READY, "not answering")
    assert err.startswith(f"⚠ {url} does not answer (")


def test_status_with_and_without_the_services_key(tmp_path: Path, project: Path) -> None:
    path = write(tmp_path / "one", KEYED.replace("./", f"{project.parent}/"))
    with serving(path, env={"KEY": KEY}) as url, held(path, {"KEY": KEY}) as running:
        running.update(api=url, base_path="/api", ready=True)
        code, document, err = status("-e", f"KEY={KEY}", cwd=path.parent)
        assert (code, err) == (0, "")
        assert document["models"][0]["running"] == 0
        for other in (("-e", "KEY=other"), ()):
            code, document, err = status(*other, cwd=path.parent)
            assert (code, document["state"]) == (0, "ready")
            assert "running" not in document["models"][0]
            assert err == "⚠ the service wants an API key, and this file with these variables has none that it takes\n"


def test_status_says_the_services_own_reason(tmp_path: Path, project: Path) -> None:
    crowded = tiny.YAML.replace("base_path: /api", "base_path: /api, max_connections: 1").replace(
        "./", f"{project.parent}/"
    )
    path = write(tmp_path / "one", crowded)
    with serving(path) as url, held(path) as running, socket.create_connection(address_of(url)) as other:
        running.update(api=url, base_path="/api", ready=True)
        other.sendall(b"POST /api/workflows/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")  # is busy
        code, document, err = status(cwd=path.parent)
    assert (code, document["state"]) == (0, "ready")
    assert err.startswith("⚠ the service does not show its metrics: ")
    assert "connections" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (7500, "2 h 5 min"), (90000, "1 d 1 h"),
     (172800, "2 d"), (-5, "0 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# logs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log that a background service of one/model-compose.yml has left."""
    path = write(tmp_path / "one")
    make_state_dir()
    log = log_file((path,))
    log.write_text("one\ntwo\nthree\n")
    return log


def test_logs_prints_the_last_lines_also_of_the_part_that_was_put_aside(log: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    assert called("logs", cwd=one) == (0, "one\ntwo\nthree\n", "")
    log.with_name(f"{log.name}.1").write_text("minus one\nzero\n")
    assert called("logs", cwd=one) == (0, "minus one\nzero\none\ntwo\nthree\n", "")
    for lines, expected in (
        (4, "zero\none\ntwo\nthree\n"),
        (1, "three\n"),
        (0, ""),
        (99, "minus one\nzero\none\ntwo\nthree\n"),
    ):
        assert called("logs", "-n", str(lines), cwd=one) == (0, expected, "")


def test_the_file_may_be_named_in_each_way(log: Path, tmp_path: Path) -> None:
    name = "one/model-compose.yml"
    for arguments in (("logs", name), ("logs", "--file", name), ("-f", name, "logs")):
        assert called(*arguments, "-n", "1", cwd=tmp_path) == (0, "three\n", "")


def test_logs_says_why_there_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "one")
    assert called("logs", cwd=path.parent) == (1, "", "❌ model-compose.yml has no log yet; only `up -d` keeps one\n")
    with held(path):
        code, out, err = called("logs", cwd=path.parent)
        assert (code, out) == (1, "")
        assert err.startswith(
            f"❌ model-compose.yml is up as process {os.getpid()} in a terminal, which shows its log; "
        )


def next_line(process: Any) -> str:
    line: str = process.stdout.readline()
    return line


def append(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


def test_following_survives_rotation_restart_and_emptying_and_ends_cleanly(log: Path, tmp_path: Path) -> None:
    with start("logs", "-f", "one/model-compose.yml", "-n", "1", cwd=tmp_path) as process:
        assert next_line(process) == "three\n"
        append(log, "four\nfi")
        assert next_line(process) == "four\n"
        append(log, "ve\n")
        assert next_line(process) == "five\n"
        aside = log.with_name(f"{log.name}.1")
        with log.open(
            "a", encoding="utf-8"
        ) as before:  # as a library's output that goes to the old file a moment longer
            log.rename(aside)
            before.write("six\n")
        log.write_text("seven\n")
        assert [next_line(process), next_line(process)] == ["six\n", "seven\n"]
        log.rename(aside)
        log.write_text("eight\n")
        assert next_line(process) == "eight\n"
        log.write_text("9\n")  # emptied, and shorter than before
        assert next_line(process) == "9\n"
        assert interrupted(process) == (0, "")


def test_following_ends_when_its_reader_leaves(log: Path, tmp_path: Path) -> None:
    with start("logs", "-f", cwd=tmp_path / "one") as process:
        assert next_line(process) == "one\n"
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        assert process.wait(SECONDS) == 0


@pytest.mark.slow
def test_logs_of_a_service_in_the_background(project: Path) -> None:
    """`up -d`, `ps`, `status`, `logs -f` and `down`, as processes."""
    path = project.parent / "background.yml"
    path.write_text(tiny.YAML, encoding="utf-8")
    with start("up", "-d", "-f", path.name, cwd=project.parent) as process:
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
    try:
        (document,) = json.loads(called("ps", "--json", cwd=project.parent)[1])
        assert document["log"] == str(log_file((path,)))
        assert document["state"] == "ready"
        code, seen, _ = status("-f", path.name, cwd=project.parent)
        assert (code, seen["models"][0]["running"]) == (0, 0)
        with start("logs", "-f", path.name, cwd=project.parent) as following:
            wait_until(lambda: "GET /metrics 200" in next_line(following), "the status in the log")
            assert called("down", "-f", path.name, cwd=project.parent) == (0, "", "stopped\n")
            wait_until(lambda: "shutting down" in next_line(following), "the end in the log")
            assert interrupted(following) == (0, "")
    finally:
        if (found := find((path,))) is not None:
            os.kill(found.pid, signal.SIGKILL)
