"""callback_url: told of every end, signed, tried again; never a way into a private network."""

import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from model_compose.engines.stepping.sequence import Sequence
from model_compose.errors import InputError
from model_compose.servers import callbacks
from model_compose.servers.callbacks import Callback
from tests.servers.test_http import PROMPT, is_problem, post
from tests.waiting import SECONDS, wait_until


@dataclass
class Receiver:
    """Somebody else's server: answers with the given statuses in turn, then with 200, and keeps what it was sent."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    received: list[tuple[Any, bytes]] = field(default_factory=list)

    def wait(self, count: int = 1) -> list[tuple[Any, dict[str, Any]]]:
        """Headers and JSON of the first `count` calls."""
        wait_until(lambda: len(self.received) >= count)
        return [(headers, json.loads(body)) for headers, body in self.received]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.received.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(state.statuses.pop(0) if state.statuses else 200)
            self.send_header("Location", f"{state.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://localhost:{server.server_port}/hook?token=1"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "FIRST_DELAY_SECONDS", 0.05)


def start(url: str, receiver: Receiver, **body: Any) -> dict[str, Any]:
    answer = post(url, {"input": PROMPT, "wait_for_completion": False, "callback_url": receiver.url} | body)
    assert answer.status_code == 200, answer.text
    started: dict[str, Any] = answer.json()
    return started


def test_a_completed_run_is_told_with_its_output_and_signed(wide: str, receiver: Receiver) -> None:
    started = start(wide, receiver, metadata={"a": 1}, callback_headers={"X-Mine": "yes"})
    headers, told = receiver.wait()[0]
    assert told.pop("event") == told["status"] == "completed"
    assert told == httpx.get(f"{wide}/api/tasks/{started['task_id']}").json()
    assert told["metadata"] == {"a": 1}
    assert headers["X-Mine"] == "yes"
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == httpx.URL(receiver.url).netloc.decode()
    digest = hmac.new(b"hush", receiver.received[0][1], hashlib.sha256).hexdigest()
    assert headers["X-Model-Compose-Signature"] == f"sha256={digest}"


def test_a_failed_run_is_told_too(wide: str, receiver: Receiver) -> None:
    start(wide, receiver, input={"prompt": "x" * 300})
    _, told = receiver.wait()[0]
    assert (told["event"], told["error"]["code"]) == ("failed", "invalid_request")


def test_a_cancelled_run_is_told_too(wide: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    take, cancelled = Sequence.take, threading.Event()

    def hold(sequence: Sequence, *drawn: Any) -> None:
        cancelled.wait(SECONDS)
        take(sequence, *drawn)

    monkeypatch.setattr(Sequence, "take", hold)
    started = start(wide, receiver)
    httpx.post(f"{wide}/api/tasks/{started['task_id']}/cancel")
    cancelled.set()
    _, told = receiver.wait()[0]
    assert (told["event"], told["task_id"]) == ("cancelled", started["task_id"])


def test_a_receiver_in_trouble_is_tried_again(wide: str, receiver: Receiver) -> None:
    receiver.statuses += [500, 429]
    start(wide, receiver)
    bodies = [body for _, body in receiver.wait(3)]
    assert bodies[0] == bodies[1] == bodies[2]


def test_in_the_end_it_is_given_up(wide: str, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses += [503] * 10
    start(wide, receiver)
    wait_until(lambda: "given up" in caplog.text)
    assert len(receiver.received) == callbacks.ATTEMPTS


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 404])
def test_neither_redirects_nor_refusals_are_followed(
    wide: str, receiver: Receiver, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After the run has been told of: what would come later comes before the end of the next run's."""
    caplog.set_level("INFO")
    receiver.statuses += [status, 503]
    start(wide, receiver)
    wait_until(lambda: f"callback answered {status}" in caplog.text)
    start(wide, receiver)
    receiver.wait(3)  # the second run's, and again after a pause
    tasks = [json.loads(body)["task_id"] for _, body in receiver.received]
    assert tasks[1] == tasks[2] != tasks[0]


# What may be called.


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost:9/", "http://[::1]/", "http://10.0.0.1/", "http://192.168.1.1/",
        "http://172.16.0.1/", "http://169.254.169.254/latest/meta-data", "http://0.0.0.0/", "http://[::]/",
        "http://[::ffff:127.0.0.1]/", "http://[fe80::1]/", "http://[fc00::1]/", "http://100.64.0.1/", "http://2130706433/",
        "http://0x7f.1/", "http://224.0.0.1/", "https://user:password@127.0.0.1/", "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b::808:808]/", "http://[64:ff9b:1::7f00:1]/", "http://[2002:7f00:1::]/", "http://[::127.0.0.1]/",
        "http://[::8.8.8.8]/", "http://[::ffff:0:7f00:1]/", "http://192.0.0.1/", "http://192.0.0.192/", "http://192.88.99.1/",
        "http://[2001:0:7f00:1::1]/", "http://[fec0::1]/", "http://[3fff::1]/", "http://[ff02::1]/", "http://240.0.0.1/",
    ],
)  # fmt: skip
def test_private_addresses_are_refused_however_they_are_written(server: str, url: str) -> None:
    document = is_problem(post(server, {"input": PROMPT, "wait_for_completion": False, "callback_url": url}), 400)
    assert document["errors"][0]["field"] == "callback_url"
    assert "is not a public address" in document["detail"]


@pytest.mark.parametrize("url", ["http://8.8.8.8/", "http://[2606:4700:4700::1111]/", "https://192.0.1.1:8443/hook"])
async def test_public_addresses_may_be_called(url: str) -> None:
    await Callback(url).check()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://example.com/", "http://"), ("file:///etc/passwd", "http://"), ("/hook", "http://"), ("", "http://"),
        ("http://", "http://"), ("http://example.invalid/", "resolved"), ("http://example.com:99999/", "port"),
        ("http://\u0000/", "not a URL"), ("http://[::1/", "not a URL"), ("http://" + "a" * 70000, "at most 8192"),
        ("http://" + "a" * 300 + ".com", "callback_url"),
    ],
)  # fmt: skip
def test_what_is_no_web_address_is_refused(server: str, url: str, words: str) -> None:
    document = is_problem(post(server, {"input": PROMPT, "wait_for_completion": False, "callback_url": url}), 400)
    assert document["errors"][0]["field"] == "callback_url"
    assert words in document["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "internal"}, {"content-LENGTH": "5"}, {"Transfer-Encoding": "chunked"}, {"a b": "c"}, {"": "c"},
        {"X": "a\r\nY: b"}, {"X": "é"}, {"X-Model-Compose-Signature": "forged"},
    ],
)  # fmt: skip
def test_headers_that_would_break_or_forge_the_message_are_refused(wide: str, headers: dict[str, str]) -> None:
    body = {"callback_url": "http://localhost:9/", "callback_headers": headers, "wait_for_completion": False}
    document = is_problem(post(wide, {"input": PROMPT, **body}), 400)
    assert document["errors"][0]["field"] == "callback_headers"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """A stand-in for the system's: what each name leads to, one answer after the other; the last one stays."""
    answers: dict[str, list[list[str]]] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in answers:
            return resolve(host, port, *arguments, **more)
        found = answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port or 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@pytest.mark.parametrize("found", [["127.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["93.184.215.14", "10.0.0.1"]])
def test_a_name_that_leads_to_a_private_address_is_refused(
    server: str, resolver: dict[str, list[list[str]]], found: list[str]
) -> None:
    resolver["inside.example"] = [found]
    body = {"input": PROMPT, "wait_for_completion": False, "callback_url": "http://inside.example/"}
    document = is_problem(post(server, body), 400)
    assert f"leads to {found[-1]}, which is not a public address" in document["detail"]


async def test_a_name_that_changes_between_check_and_use_is_refused_then(
    resolver: dict[str, list[list[str]]],
) -> None:
    resolver["rebind.example"] = [["93.184.215.14"], ["127.0.0.1"]]
    callback = Callback("http://rebind.example/")
    await callback.check()
    with pytest.raises(InputError, match=r"leads to 127\.0\.0\.1"):
        await callback._post(b"{}", {})


def test_the_address_that_was_checked_is_the_one_that_is_called(
    wide: str, receiver: Receiver, resolver: dict[str, list[list[str]]]
) -> None:
    """The name leads to the receiver for the two checks only; who asked once more would be led astray."""
    resolver["rebind.example"] = [["127.0.0.1"], ["127.0.0.1"], ["127.0.0.99"]]
    receiver.url = receiver.url.replace("localhost", "rebind.example")
    start(wide, receiver)
    headers, _ = receiver.wait()[0]
    assert headers["Host"] == httpx.URL(receiver.url).netloc.decode()
    assert resolver["rebind.example"] == [["127.0.0.99"]]
