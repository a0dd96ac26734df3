"""The door: keys, bodies that are too large, other sites' pages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from model_compose.config import Config
from model_compose.errors import ConfigError
from model_compose.loading import load
from model_compose.servers import HttpServerOptions
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
