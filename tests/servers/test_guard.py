"""The door: names, keys, bodies that are too large, other sites' pages."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from model_compose.compose import Compose
from model_compose.config import Config
from model_compose.errors import ConfigError
from model_compose.loading import load
from model_compose.server_options import HttpServerOptions, WebuiOptions
from model_compose.servers import access, connections, guard
from tests.conftest import serving
from tests.servers.test_http import PROMPT, is_problem, post
from tests.servers.test_openai import client_of, complete

KEY = {"Authorization": "Bearer first-key"}
ROUTES = [
    ("GET", "/api/workflows"), ("GET", "/api/workflows/__workflow__/schema"), ("POST", "/api/workflows/runs"),
    ("GET", "/api/tasks/1"), ("POST", "/api/tasks/1/cancel"), ("GET", "/v1/models"), ("GET", "/v1/models/default"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("GET", "/docs"), ("GET", "/openapi.json"),
    ("GET", "/"), ("GET", "/nowhere"), ("GET", "/api/health/"), ("GET", "/API/HEALTH"),
]  # fmt: skip


# Keys.


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_needs_a_key(locked: str, method: str, path: str) -> None:
    response = httpx.request(method, locked + path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    if path.startswith("/v1"):
        assert response.json()["error"]["type"] == "authentication_error"
    else:
        is_problem(response, 401)
    assert httpx.request(method, locked + path, headers=KEY).status_code != 401


def test_health_is_open(locked: str) -> None:
    assert httpx.get(f"{locked}/api/health").json()["status"] == "loading"


@pytest.mark.parametrize(
    "header",
    ["", "first-key", "Bearer", "Bearer wrong", "Basic first-key", "Bearer first-key2", "Bearer first-ke",
     "Bearer first-key second-key", "Bearer \u00e9"],
)  # fmt: skip
def test_wrong_keys_and_schemes_are_refused(locked: str, header: str) -> None:
    response = httpx.get(f"{locked}/api/workflows", headers=[(b"Authorization", header.encode("latin-1"))])
    is_problem(response, 401)
    assert "first-key" not in response.text


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second-key", "BEARER  first-key"])
def test_each_listed_key_opens(locked: str, header: str) -> None:
    assert httpx.get(f"{locked}/api/workflows", headers={"Authorization": header}).status_code == 200


def test_the_openai_client_sends_its_key(locked: str) -> None:
    with client_of(locked, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with client_of(locked, "first-key") as client, pytest.raises(openai.InternalServerError, match="still loading"):
        complete(client)


@pytest.mark.parametrize("keys", [[], [""], "", [None], [5], ["with space"], ["schlüssel"], ["a\nb"]])
def test_keys_that_could_never_match_are_an_error(keys: Any) -> None:
    with pytest.raises(ValueError, match="api_keys"):
        HttpServerOptions(api_keys=keys)


def test_a_key_whose_variable_is_not_set_keeps_the_server_from_starting(project: Path) -> None:
    path = project.with_name("unset.yml")
    text = project.read_text(encoding="utf-8").replace("port: 0,", 'port: 0, api_keys: ["${env.NO_SUCH_KEY}"],')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"NO_SUCH_KEY is not set.*refuses to start"):
        load([path], {})
    config: Config = load([path], {"NO_SUCH_KEY": "k1,k2"}).config
    assert config.serving.server is not None
    assert "k1" not in repr(config)


@pytest.mark.parametrize("path", ["/v1", "v1/", "/v1/x"])
def test_base_path_leaves_v1_alone(path: str) -> None:
    with pytest.raises(ValueError, match="/v1"):
        HttpServerOptions(base_path=path)


# Guessing.


async def test_wrong_keys_are_answered_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    """However many connections they come on, while right keys from the same address need not wait."""
    async with door() as client:
        started = time.monotonic()
        guesses = [asyncio.create_task(ask(client, f"guess-{number}")) for number in range(5)]
        await asyncio.sleep(0)
        assert await ask(client, "first-key") == 200
        assert not any(guess.done() for guess in guesses)
        assert await asyncio.gather(*guesses) == 5 * [401]
        assert time.monotonic() - started >= 5 * guard.GUESS_SECONDS
    assert caplog.text.count("a wrong API key from 127.0.0.1") == 5
    assert "guess-" not in caplog.text


async def test_no_key_at_all_is_no_guess(caplog: pytest.LogCaptureFixture) -> None:
    async with door() as client:
        for header in ({}, {"Authorization": "Basic first-key"}):
            assert (await client.get("/api/workflows", headers=header)).status_code == 401
    assert "wrong" not in caplog.text


async def test_who_has_guessed_too_often_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a right key would be known by its quick answer. A key that this address had used before stays good, and other
    addresses are not concerned."""
    monkeypatch.setattr(guard, "MOST_DEBT_SECONDS", 2 * guard.GUESS_SECONDS)
    async with door() as client, door(client, "127.0.0.2") as other:
        assert await ask(client, "second-key") == 200
        guesses = [asyncio.create_task(ask(client, f"guess-{number}")) for number in range(4)]
        await asyncio.sleep(0.01)
        refused = await client.get("/api/workflows", headers={"Authorization": "Bearer first-key"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert await ask(client, "second-key") == 200
        assert await ask(other, "first-key") == 200
        assert sorted(await asyncio.gather(*guesses)) == [401, 401, 401, 429]
        assert await ask(client, "first-key") == 200


async def test_what_a_proxy_says_of_its_client_makes_no_new_guesser() -> None:
    """X-Forwarded-For may be the guesser's own invention; the connection's address is not."""
    scope = {"client": ("203.0.113.7", 0), "state": {"peer": "127.0.0.1"}}
    assert access.peer_of(scope) == "127.0.0.1"
    assert access.client_of(scope) == "203.0.113.7 (by 127.0.0.1)"


async def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "KEPT_CLIENTS", 10)
    keys = guard.Keys([SecretStr("k")])
    for number in range(50):
        await keys.check_key("k", {"client": (f"10.0.0.{number}", 0)})
    assert len(keys._clients) == 10


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True), ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True), ("10.0.0.1", "10.0.0.2", False), ("unknown", "unknown", True),
    ],
)  # fmt: skip
def test_an_ipv6_network_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (connections.network_of(one) == connections.network_of(other)) == same


@asynccontextmanager
async def door(beside: httpx.AsyncClient | None = None, address: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    """A client at this address of an empty room behind two keys; `beside`: of the same room."""
    app: Any = beside._transport.app if beside else None  # type: ignore[attr-defined]

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    keys = guard.Keys([SecretStr("first-key"), SecretStr("second-key")])
    app = app or guard.Guard(inside, guard.Hosts("127.0.0.1"), 1000, keys)
    transport = httpx.ASGITransport(app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        yield client


async def ask(client: httpx.AsyncClient, key: str) -> int:
    return (await client.get("/api/workflows", headers={"Authorization": f"Bearer {key}"})).status_code


# Names.


def test_a_name_that_leads_here_by_rebinding_is_refused(server: str) -> None:
    for method, path in ROUTES:
        response = httpx.request(method, server + path, headers={"Host": "evil.test"})
        assert response.status_code == 421, path
        assert "'evil.test'" in response.text
        assert "'allowed_hosts'" in response.text
    assert httpx.get(f"{server}/api/health", headers={"Host": "evil.test"}).status_code == 421
    adapter = {"lora_name": "x", "lora_path": "./alpaca"}
    loaded = httpx.post(f"{server}/v1/load_lora_adapter", json=adapter, headers={"Host": "evil.test:80"})
    assert (loaded.status_code, loaded.json()["error"]["code"]) == (421, "misdirected_request")


@pytest.mark.parametrize(
    ("bound", "local", "host", "known"),
    [
        # Loopback: its addresses and names, whatever the port.
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:9999", True),
        ("127.0.0.1", "127.0.0.1", "localhost:8080", True),
        ("127.0.0.1", "127.0.0.1", "LOCALHOST.", True),
        ("127.0.0.1", "127.0.0.1", "app.localhost", True),
        ("127.0.0.1", "127.0.0.1", "[::1]:8080", True),
        ("localhost", "127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", "[::1]", True),
        ("::1", "::1", "localhost", True),
        ("127.0.0.1", "127.0.0.1", "evil.test", False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1.evil.test", False),
        ("127.0.0.1", "127.0.0.1", "localhost.evil.test", False),
        ("127.0.0.1", "127.0.0.1", "notlocalhost", False),
        ("127.0.0.1", "127.0.0.1", "8.8.8.8", False),
        ("127.0.0.1", "127.0.0.1", "2130706433", False),
        ("127.0.0.1", "127.0.0.1", "", False),
        ("127.0.0.1", "127.0.0.1", "user@127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80:80", False),
        ("127.0.0.1", "127.0.0.1", "[::1", False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1, evil.test", False),
        # One interface: its address, the name in the file, the machine's name.
        ("10.1.2.3", "10.1.2.3", "10.1.2.3:8080", True),
        ("10.1.2.3", "10.1.2.3", "10.1.2.4", False),
        ("gpu.example", "10.1.2.3", "GPU.example:8080", True),
        ("gpu.example", "10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", socket.gethostname(), True),
        ("fd00::1", "fd00::1", "[fd00:0::1]", True),
        ("fe80::1%eth0", "fe80::1", "[fe80::1]", True),
        # All interfaces: any address, as a name is what rebinding needs. Kubernetes' probes and docker's ports come so.
        ("0.0.0.0", "172.17.0.2", "203.0.113.9:80", True),
        ("0.0.0.0", "172.17.0.2", "localhost:8080", True),
        ("0.0.0.0", "172.17.0.2", socket.gethostname().upper(), True),
        ("::", "::1", "[2001:db8::1]", True),
        ("::", "::ffff:10.0.0.1", "10.0.0.1", True),
        ("0.0.0.0", "172.17.0.2", "evil.test", False),
    ],
)  # fmt: skip
def test_a_server_knows_its_own_names(bound: str, local: str, host: str, known: bool) -> None:
    assert guard.Hosts(bound).known(host, local) == known


@pytest.mark.parametrize(
    ("allowed", "host", "known"),
    [
        ("chat.example.com", "chat.example.com:443", True), ("Chat.Example.com.", "chat.example.COM", True),
        ("chat.example.com", "example.com", False), ("chat.example.com", "x.chat.example.com", False),
        ("*.example.com", "a.b.example.com", True), ("*.example.com", "example.com", False),
        ("*.example.com", "evilexample.com", False), ("*", "anything.test", True), ("a.test, b.test", "b.test", True),
        ("203.0.113.9", "203.0.113.9", True),
    ],
)  # fmt: skip
def test_the_file_may_allow_more_names(allowed: str, host: str, known: bool) -> None:
    options = HttpServerOptions(allowed_hosts=allowed)  # type: ignore[arg-type]
    assert guard.Hosts("127.0.0.1", options.allowed_hosts).known(host, "127.0.0.1") == known


@pytest.mark.parametrize("wrong", ["https://chat.example.com", "chat.example.com:443", "a/b", [""], [5], ["*.*"]])
def test_what_could_never_be_a_name_is_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        HttpServerOptions(allowed_hosts=wrong)
    with pytest.raises(ValueError, match="allowed_hosts"):
        WebuiOptions(allowed_hosts=wrong)


def test_who_names_no_host_is_no_browser(server: str) -> None:
    port = int(server.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /api/health HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")


# The page.


@pytest.fixture(scope="module")
def with_page(project: Path) -> Path:
    path = project.with_name("page.yml")
    webui = "controller:\n  webui: {port: 0, allowed_hosts: chat.example.com}\n"
    path.write_text(project.read_text(encoding="utf-8").replace("controller:\n", webui), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
async def page(with_page: Path) -> AsyncIterator[httpx.AsyncClient]:
    from model_compose.servers.webui import create_page

    transport = httpx.ASGITransport(create_page(Compose(load([with_page])), None))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8081") as client:
        yield client


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_is_reached_by_its_names_only(page: httpx.AsyncClient) -> None:
    assert (await page.get("/page.json")).status_code == 200
    assert (await page.get("/page.json", headers={"Host": "chat.example.com"})).status_code == 200
    assert (await page.get("/page.json", headers={"Host": "evil.test"})).status_code == 421


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_names_no_option_that_it_lacks(page: httpx.AsyncClient) -> None:
    document = is_problem(await page.post("/runs", data={}, headers={"Origin": "https://evil.example"}), 403)
    assert "https://evil.example" in document["detail"]
    assert (
        "call the API instead, or, if a proxy stands before this server, let it pass on the Host header"
        in document["detail"]
    )
    assert "origins" not in document["detail"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("chunked", [True, False])
async def test_the_page_takes_no_large_bodies(page: httpx.AsyncClient, chunked: bool) -> None:
    pieces = [b'{"data": ["', *60 * [b"x" * 1_000_000], b'"]}']

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    response = await page.post("/runs", content=stream() if chunked else b"".join(pieces))
    assert response.status_code == 413
    assert "max_body_size" in response.json()["detail"]


# Large bodies.


@pytest.mark.parametrize("path", ["/api/workflows/runs", "/v1/completions"])
@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
@pytest.mark.parametrize("chunked", [True, False])
def test_large_bodies_are_413_also_without_a_length(small: str, path: str, kind: str, chunked: bool) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="input"\r\n\r\n' if "multipart" in kind else b'{"input": "'
    body = head + b"x" * 2000

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    response = httpx.post(small + path, content=pieces() if chunked else body, headers={"Content-Type": kind})
    assert response.status_code == 413, response.text
    assert "1000 bytes" in response.text
    assert response.headers["content-type"] in ("application/problem+json", "application/json")


async def test_the_bodies_of_running_requests_are_bounded_together() -> None:
    go_on = asyncio.Event()
    read: list[int] = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        read.append(len(body))
        await go_on.wait()
        await PlainTextResponse("done")(scope, receive, send)

    transport = httpx.ASGITransport(guard.Guard(waits, guard.Hosts("127.0.0.1"), 1000), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        calls = [asyncio.create_task(client.post("/", content=b"x" * 1000)) for _ in range(20)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        refused = [call.result() for call in calls if call.done()]
        assert all(answer.status_code == 429 for answer in refused)
        assert "32 times max_body_size" in refused[0].text
        assert (await client.post("/", content=b"x")).status_code == 429
        others = httpx.ASGITransport(transport.app, client=("127.0.0.2", 1))
        async with httpx.AsyncClient(transport=others, base_url="http://127.0.0.1") as other:
            calls.append(asyncio.create_task(other.post("/", content=b"x" * 1000)))
            while len(read) < 17:
                await asyncio.sleep(0)
            go_on.set()
            answers = await asyncio.gather(*calls)
        assert sorted(answer.status_code for answer in answers) == [200] * 17 + [429] * 4
        assert read == [1000] * 17
        assert (await client.post("/", content=b"x" * 1000)).status_code == 200


def test_a_body_within_the_limit_is_fine(small: str) -> None:
    assert post(small, {"input": {"prompt": "x" * 900}}).status_code == 503  # the models of this server never load


@pytest.fixture(scope="module")
def small(project: Path) -> Iterator[str]:
    path = project.with_name("small.yml")
    path.write_text(project.read_text(encoding="utf-8").replace("port: 0,", "port: 0, max_body_size: 1000,"))
    with serving(path, load_models=False) as url:
        yield url


# Pages of other sites.


def test_cors_is_off_by_default(server: str) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{server}/api/workflows/runs", headers=asked)
    assert preflight.status_code in (403, 405)
    answer = httpx.get(f"{server}/api/health", headers=asked)
    assert not any(name.startswith("access-control") for name in [*preflight.headers, *answer.headers])


def test_listed_origins_may_call_also_where_keys_are_set(locked: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{locked}/v1/completions"
    preflight = httpx.options(url, headers=asked | {"Origin": "https://a.example"})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in preflight.headers
    refused = httpx.post(url, headers={"Origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"  # so that its page can read why
    other = httpx.options(url, headers=asked | {"Origin": "https://b.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


def test_a_form_that_another_sites_page_sends_is_refused(server: str) -> None:
    """A browser sends forms and plain text to any address without asking first, this machine's among them."""
    url = f"{server}/api/workflows/runs"
    for origin in ("https://evil.example", "null"):
        document = is_problem(httpx.post(url, data={"input[prompt]": "a"}, headers={"Origin": origin}), 403)
        assert origin in document["detail"]
        plain = {"Origin": origin, "Content-Type": "text/plain"}
        assert httpx.post(f"{server}/v1/completions", content=b"{}", headers=plain).status_code == 403
        is_problem(httpx.post(f"{server}/api/tasks/1/cancel", headers={"Origin": origin}), 403)
    assert httpx.post(url, data={"input[prompt]": "a"}, headers={"Origin": server}).status_code == 200
    assert post(server, {"input": PROMPT}, headers={"Origin": "https://evil.example"}).status_code == 200  # see CORS
