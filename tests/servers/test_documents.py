"""The OpenAPI document: valid, complete, and what the server really does; and the page made of it."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from model_compose import __version__
from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.server_options import HttpServerOptions
from model_compose.servers.http import create_app
from tests import tiny
from tests.conftest import serving
from tests.servers.test_guard import KEY

OPERATIONS = [
    ("get", "/"),
    ("get", "/api/health"),
    ("get", "/api/workflows"),
    ("get", "/api/workflows/{workflow_id}/schema"),
    ("post", "/api/workflows/runs"),
    ("get", "/api/tasks/{task_id}"),
    ("post", "/api/tasks/{task_id}/cancel"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/load_lora_adapter"),
    ("post", "/v1/unload_lora_adapter"),
    ("get", "/metrics"),
]


@pytest.fixture(scope="module")
def document(server: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server}/openapi.json").json()
    return found


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for item in node.values() for found in references(item)]
    return [found for item in node for found in references(item)] if isinstance(node, list) else []


def test_every_route_is_described(document: dict[str, Any]) -> None:
    routes = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert sorted(routes) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", ["server", "wide", "locked"])
def test_the_document_is_valid(name: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(name)
    validate(httpx.get(f"{url}/openapi.json", headers=KEY).json(), cls=OpenAPIV31SpecValidator)


# The root.


def test_the_root_links_to_what_is_served(server: str) -> None:
    index = httpx.get(server)
    assert index.headers["content-type"] == "application/json"
    said = index.json()
    assert (said["name"], said["version"]) == ("model-compose", __version__)
    assert set(said["links"]) == {"docs", "openapi", "health", "workflows", "models", "metrics"}
    for link in said["links"].values():
        assert httpx.get(server + link).status_code == 200, link


def test_the_root_follows_the_base_path(tmp_path: Path) -> None:
    yaml = tiny.YAML.replace("base_path: /api", "base_path: /deep/down")
    path = tiny.save_project(tmp_path, yaml)
    with serving(path, load_models=False) as url:
        links = httpx.get(url).json()["links"]
        assert links["workflows"] == "/deep/down/workflows"
        assert httpx.get(url + links["health"]).json()["status"] == "loading"


async def test_the_root_links_to_the_page_where_there_is_one(project: Path) -> None:
    compose = Compose(load([project]))
    app = create_app(compose, HttpServerOptions(), page="http://127.0.0.1:8081")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080") as client:
        assert (await client.get("/")).json()["links"]["page"] == "http://127.0.0.1:8081"
    await compose.close()


def test_every_reference_leads_somewhere_and_nothing_is_422(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in references(document)} <= set(schemas)
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            assert operation["description"]


def test_a_run_is_described_with_its_bodies_its_stream_and_its_errors(document: dict[str, Any]) -> None:
    run = document["paths"]["/api/workflows/runs"]["post"]
    kinds = {"application/json", "multipart/form-data", "application/x-www-form-urlencoded"}
    assert set(run["requestBody"]["content"]) == kinds
    assert set(run["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "event: delta" in run["responses"]["200"]["content"]["text/event-stream"]["example"]
    refusals = {"400", "403", "404", "408", "409", "413", "421", "429", "500", "503"}
    assert set(run["responses"]) == {"200", *refusals}
    for status in ("400", "404", "500"):
        assert set(run["responses"][status]["content"]) == {"application/problem+json"}
    body = document["components"]["schemas"]["RunBody"]["properties"]
    assert {"workflow_id", "input", "blend", "stream", "callback_url"} <= set(body)


def test_completions_are_described_with_lora(document: dict[str, Any]) -> None:
    for path, model in (("completions", "CompletionBody"), ("chat/completions", "ChatBody")):
        operation = document["paths"][f"/v1/{path}"]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{model}")
        assert "lora" in document["components"]["schemas"][model]["properties"]
        assert "text/event-stream" in operation["responses"]["200"]["content"]
        assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/OpenAIError")


def test_keys_are_described_where_they_are_set(document: dict[str, Any], locked: str) -> None:
    assert "securitySchemes" not in document["components"]
    with_keys = httpx.get(f"{locked}/openapi.json", headers=KEY).json()
    for path, methods in with_keys["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == ("401" in operation["responses"]) == (path != "/api/health")


def test_the_page_lists_the_routes_and_needs_nothing_from_elsewhere(server: str, document: dict[str, Any]) -> None:
    page = httpx.get(f"{server}/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path in document["paths"]:
        assert path in page.text
    assert "blend" in page.text
    assert not re.search(r"<script|<link|src=|https?://", page.text)
