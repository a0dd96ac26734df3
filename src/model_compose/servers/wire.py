"""What /api and /v1 share: errors as documents, reading of bodies, streams, and work that ends when its client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from model_compose.daemon import in_daemon_thread
from model_compose.errors import (
    Cancelled,
    ComposeError,
    Crowded,
    FieldError,
    InputError,
    NotReady,
    Overloaded,
    Unauthorized,
)
from model_compose.expressions import strict_json
from model_compose.schema import field_of
from model_compose.servers.answers import OpenAIError, OpenAIFault, Problem, WrongField, shown

log = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

RETRY_AFTER_SECONDS = 5
LARGE_BODY = 256 << 10
"""In bytes. Parsing a smaller body takes at most a few milliseconds."""
MOST_ERRORS = 64
"""The most errors of one body that an answer names."""
PROBLEM_TYPE = "application/problem+json"
STREAM_TYPE = "text/event-stream"


# Errors.


def problem(error: ComposeError, task_id: str | None = None) -> dict[str, Any]:
    """An RFC 9457 problem document."""
    more: dict[str, Any] = {}
    if isinstance(error, InputError) and error.fields:
        more["errors"] = [WrongField(field=field.field, message=field.message) for field in error.fields]
    if task_id is not None:
        more["task_id"] = task_id
    return shown(Problem(type="about:blank", title=error.title, status=error.status, detail=str(error), **more))


def openai_error(error: ComposeError) -> dict[str, Any]:
    """The error object of OpenAI's API."""
    kinds = {
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
        503: "service_unavailable_error",
    }
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    param = error.fields[0].field if isinstance(error, InputError) and error.fields else None
    return shown(OpenAIError(error=OpenAIFault(message=str(error), type=kind, param=param, code=error.code)))


def error_response(request: Request, error: ComposeError, task_id: str | None = None) -> JSONResponse:
    """The error in the form of the API that was called: OpenAI's under /v1, else a problem document."""
    headers = {}
    if isinstance(error, Crowded | NotReady | Overloaded):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, Crowded):
        headers["Connection"] = "close"  # there may be room for the client's next connection
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    path = request.url.path
    if path == "/v1" or path.startswith("/v1/"):
        return JSONResponse(openai_error(error), error.status, headers)
    return JSONResponse(problem(error, task_id), error.status, headers, media_type=PROBLEM_TYPE)


def add_error_handlers(app: FastAPI) -> None:
    """Whatever fails in a route is answered in one of the two error forms. Tracebacks go only to the log."""

    async def compose_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ComposeError)
        return error_response(request, error)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        fields = [FieldError(".".join(map(str, item["loc"][1:])), item["msg"]) for item in error.errors()]
        return error_response(request, _wrong(fields))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = ComposeError(f"{request.method} {request.url.path}: {error.detail}")
        known.status, known.title = error.status_code, HTTPStatus(error.status_code).phrase
        response = error_response(request, known)
        response.headers.update(error.headers or {})
        return response

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads this: the client left before its body had arrived

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(request, ComposeError("the server failed; its log has the details"))

    app.add_exception_handler(ComposeError, compose_error)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, unexpected)


# Bodies.


def content_type(request: Request) -> str:
    """The media type without its parameters, "" without one."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_json(text: bytes) -> Any:
    """A JSON body. Raises InputError."""
    try:
        return strict_json(text)
    except ValueError as error:
        raise InputError(f"the request body is not valid JSON: {error}", field="body") from None


async def read_body(model: type[M], request: Request) -> M:
    """A JSON body as a model. A large body is parsed beside the event loop. Raises InputError."""
    body = await request.body()
    return await beside(lambda: parse_body(model, read_json(body)), len(body))


async def beside(work: Callable[[], T], size: int) -> T:
    """The result of `work` on `size` bytes. Many bytes are worked on in a thread, so that other requests need not wait."""
    return work() if size <= LARGE_BODY else await in_daemon_thread(work)


def parse_body(model: type[M], data: Any) -> M:
    """The body as a model. Raises InputError that names each wrong field once."""
    if not isinstance(data, dict):
        raise InputError("the request body must be an object", field="body")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for item in error.errors(include_url=False)[:MOST_ERRORS]:
            messages.setdefault(field_of(item, data) or "body", []).append(item["msg"].removeprefix("Value error, "))
        raise _wrong(
            [FieldError(name, ", or: ".join(dict.fromkeys(said))) for name, said in messages.items()]
        ) from None


def _wrong(fields: Collection[FieldError]) -> InputError:
    return InputError("; ".join(f"{field.field}: {field.message}" for field in fields), fields)


# Streams and leaving clients.


@asynccontextmanager
async def attended(request: Request) -> AsyncGenerator[None]:
    """Within the block, the task that runs it is cancelled as soon as the client leaves. Raises Cancelled then, when the
    block has ended. The block may not start before the request's body has been read."""
    working, left = asyncio.current_task(), False
    assert working is not None

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # Somebody else may have cancelled the task too, as a server does that cannot wait any more.
        if left and not working.uncancel():
            raise Cancelled("the client left") from None
        raise
    finally:
        watching.cancel()


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event with JSON data, or with an answer's model.

    Characters that some clients take for the end of a line are escaped.
    """
    head = f"event: {name}\n" if name else ""
    is_model = isinstance(data, BaseModel)
    text = data.model_dump_json(exclude_unset=True) if is_model else json.dumps(data, ensure_ascii=False)
    for character in "\u0085\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"{head}data: {text}\n\n"


async def start_stream(request: Request, events: AsyncGenerator[str]) -> "EventStream":
    """The answer that sends these events. Waits for the first, so that an error before it has its own status."""
    async with attended(request):
        first = await anext(events, "")
    return EventStream(first, events)


class EventStream(StreamingResponse):
    """Sends events as they come. When the client leaves, the generator is cancelled, which ends the computation."""

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        super().__init__(
            _prefixed(first, rest),
            media_type=STREAM_TYPE,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            with suppress(Cancelled):
                async with attended(Request(scope, receive)):
                    await self.stream_response(send)


async def _prefixed(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    yield first
    async for item in rest:
        yield item
