"""What both HTTP faces share: errors as documents, the guard at the door, streams that notice a leaving client."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_compose.errors import ComposeError, FieldError, InputError, NotReady, PayloadTooLarge, Unauthorized

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_SECONDS = 5


def problem(error: ComposeError, task_id: str | None = None) -> dict[str, Any]:
    """An RFC 9457 problem document."""
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
    }
    if isinstance(error, InputError) and error.fields:
        document["errors"] = [{"field": field.field, "message": field.message} for field in error.fields]
    if task_id is not None:
        document["task_id"] = task_id
    return document


def openai_error(error: ComposeError) -> dict[str, Any]:
    """The error object of OpenAI's API."""
    kinds = {401: "authentication_error", 404: "not_found_error", 503: "service_unavailable_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    param = error.fields[0].field if isinstance(error, InputError) and error.fields else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def error_response(request: Request, error: ComposeError, task_id: str | None = None) -> JSONResponse:
    """The error in the form of the face that was called."""
    headers = {}
    if isinstance(error, NotReady):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if is_openai(request.url.path):
        return JSONResponse(openai_error(error), error.status, headers)
    return JSONResponse(problem(error, task_id), error.status, headers, media_type="application/problem+json")


def is_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def add_error_handlers(app: FastAPI) -> None:
    """Every way in which a route can fail ends in one of the two error forms; tracebacks go to the log."""

    async def compose_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ComposeError)
        return error_response(request, error)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        fields = [FieldError(".".join(map(str, item["loc"][1:])), item["msg"]) for item in error.errors()]
        return error_response(request, InputError("; ".join(f"{f.field}: {f.message}" for f in fields), fields))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = ComposeError(f"{request.method} {request.url.path}: {error.detail}")
        known.status, known.title = error.status_code, str(error.detail)
        response = error_response(request, known)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(request, ComposeError("the server failed; its log has the details"))

    app.add_exception_handler(ComposeError, compose_error)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


class Guard:
    """ASGI middleware: API keys, compared in constant time, and the limit on request bodies."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr], open_paths: Iterable[str], max_body: int) -> None:
        self._app, self._open, self._max_body = app, frozenset(open_paths), max_body
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope)
        if (
            self._keys
            and scope["path"] not in self._open
            and not has_key(request.headers.get("authorization"), self._keys)
        ):
            missing = Unauthorized("an API key is needed: send the header 'Authorization: Bearer <key>'")
            return await error_response(request, missing)(scope, receive, send)
        too_large = PayloadTooLarge(f"the request body is larger than {self._max_body} bytes (max_body_size)")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            return await error_response(request, too_large)(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise too_large
            return message

        return await self._app(scope, counted, send)


def has_key(header: str | None, keys: Sequence[bytes]) -> bool:
    """Whether an Authorization header carries one of the keys. Compares with all of them, in constant time."""
    scheme, _, given = (header or "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


async def body_of(request: Request) -> Any:
    """The JSON body. Raises InputError."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request body is not valid JSON: {error}", field="body") from None


@asynccontextmanager
async def watching(request: Request, work: "asyncio.Task[Any]") -> AsyncIterator[None]:
    """Within the block, `work` is cancelled as soon as the client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def first_of(items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same items, after the first has been made: what fails before any text still gets its own status."""
    try:
        head = await anext(items)
    except StopAsyncIteration:
        return _chain([], items)
    return _chain([head], items)


async def _chain(head: list[T], rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    try:
        for item in head:
            yield item
        async for item in rest:
            yield item
    finally:
        await rest.aclose()


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event with JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Sends events as they come. When the client leaves, the generator is closed at once, and so ends the computation."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)
