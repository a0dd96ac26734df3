"""The OpenAPI document: what each route takes and answers, a page that lists the routes, and the root, which links to all
of it."""

from collections.abc import Collection, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from model_compose.servers.answers import ANSWERS, Index, OpenAIError, Problem, RunState, shown
from model_compose.servers.wire import PROBLEM_TYPE, STREAM_TYPE

Responses = dict[int | str, dict[str, Any]]
REFERENCE = "#/components/schemas/{model}"


_MEANINGS = {
    400: "The request is wrong; the fields are named",
    401: "An API key is needed",
    403: "A web page of another site sent this, or the file does not allow it",
    404: "Nothing has this name",
    408: "The body arrived too slowly",
    409: "Not possible in this state, or cancelled",
    413: "The body is too large",
    421: "The Host header is not a name of this server (allowed_hosts)",
    429: "Too many requests wait already; Retry-After says when to try again",
    500: "The run failed",
    503: "Still loading, shutting down, or out of connections",
}

RUN_STREAM = (
    'event: delta\ndata: {"path": "generated", "text": "Hel"}\n\n'
    'event: done\ndata: {"task_id": "…", "status": "completed", "workflow_id": "…", "output": {"generated": "Hello"}}\n\n'
)
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
"""One event of a stream. OpenAPI 3.1 cannot describe the items of a stream; tools read the schema as one event's."""
OPENAI_STREAM = 'data: {"id": "…", "object": "…", "choices": [{"index": 0, "text": "Hel"}]}\n\ndata: [DONE]\n\n'


def problems(*statuses: int) -> Responses:
    """The errors of a route under base_path."""
    return {status: _error(status, PROBLEM_TYPE, Problem) for status in statuses}


def openai_errors(*statuses: int) -> Responses:
    """The errors of a route under /v1."""
    return {status: _error(status, "application/json", OpenAIError) for status in statuses}


def answers(model: type[BaseModel], stream: str | None = None) -> dict[str, Any]:
    """An answer that is this model. A run may also answer with its bare output (output_only). stream: an example of the
    events."""
    schema = _ref(model) if model is not RunState else {"anyOf": [_ref(model), {"description": "the bare output"}]}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content[STREAM_TYPE] = {"schema": _EVENT, "example": stream}
    return {"description": "The answer", "content": content}


def text_answer(example: str) -> dict[str, Any]:
    """An answer that is a sentence."""
    return {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}, "example": example}}}


def body_schema(model: type[BaseModel], *kinds: str) -> dict[str, Any]:
    """An OpenAPI request body that takes the model in each of these content types."""
    return {"required": True, "content": {kind: {"schema": _ref(model)} for kind in kinds}}


def add_documents(app: FastAPI, *, bodies: Collection[type[BaseModel]], open_path: str, with_keys: bool) -> None:
    """Adds /openapi.json and /docs. bodies: the models that `body_schema` refers to. open_path: the one without a key."""
    document: dict[str, Any] = {}

    def describe() -> dict[str, Any]:
        if not document:
            document.update(_describe(app, bodies, open_path, with_keys=with_keys))
        return document

    app.openapi = describe  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """The routes on one page that needs nothing from elsewhere; Swagger's own page loads scripts from a CDN."""
        return HTMLResponse(_page(describe()))


def add_index(app: FastAPI, links: Mapping[str, str]) -> None:
    """Adds /. links: paths of this server, or addresses of others."""

    @app.get("/", tags=["index"], responses={200: {"model": Index}})
    async def index() -> JSONResponse:
        """What is served here, and where."""
        return JSONResponse(shown(Index(name=app.title, version=app.version, links=dict(links))))


def _describe(app: FastAPI, bodies: Collection[type[BaseModel]], open_path: str, *, with_keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    models: Any = [(model, "validation") for model in (*ANSWERS, *bodies)]
    schemas.update(models_json_schema(models, ref_template=REFERENCE)[1]["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which this server never sends
        schemas.pop(unused, None)
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            everywhere = [421, *([408] if "requestBody" in operation else [])]
            if path != open_path:
                everywhere.append(503)
            if with_keys and path != open_path:
                operation["security"] = [{"key": []}]
                everywhere += [401, 429]
            errors = openai_errors if path.startswith("/v1/") else problems
            for status, described in errors(*everywhere).items():
                operation["responses"].setdefault(str(status), described)
    return document


def _error(status: int, kind: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"description": _MEANINGS[status], "content": {kind: {"schema": _ref(model)}}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"
content="width=device-width"><title>model-compose</title><style>
:root{color-scheme:light dark} body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
code{font-family:ui-monospace,monospace} h2{font-size:1.05rem;margin:2rem 0 0} td{padding:.1rem 1.2rem .1rem 0;
vertical-align:top} p{margin:.3rem 0}</style>"""


def _page(document: dict[str, Any]) -> str:
    parts = [
        _HEAD,
        f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
        '<p>Every route; the whole description for programs is in <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += [
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>",
                "<table>",
                *_rows(document, operation),
                "</table>",
            ]
    return "\n".join(parts)


def _rows(document: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    """A row for each parameter and for each field of the body."""
    fields = {item["name"]: item for item in operation.get("parameters", ())}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        name = content["schema"]["$ref"].rpartition("/")[2]
        fields |= document["components"]["schemas"][name]["properties"]
    return [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in fields.items()
    ]
