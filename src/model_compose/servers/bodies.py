"""How requests' bodies arrive: not too slowly, not too large, and not at all once nobody reads them any more."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_compose.errors import ComposeError, PayloadTooLarge, SlowBody
from model_compose.servers.wire import error_response

BODY_SECONDS = 20.0
BYTES_PER_SECOND = 4096
"""A body may take BODY_SECONDS, and a second more for each BYTES_PER_SECOND that have arrived."""
LINGER_SECONDS = 1.0
LINGER_BYTES = 4 << 20
"""What is still read of a body after its answer. A client that is sending would otherwise meet a reset connection in the
place of the answer."""

DISCONNECT: Message = {"type": "http.disconnect"}


class Bodies:
    """ASGI middleware: ends slow bodies with a 408, and the connection where the answer came before the body's end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and has_body(scope):
            body = _Arriving(scope, receive, send)
            return await self._app(scope, body.receive, body.send)
        return await self._app(scope, receive, send)


class _Arriving:
    """One body on its way in, and the answer on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self._whole = self._answered = self._late = False

    async def receive(self) -> Message:
        if self._late:
            return DISCONNECT
        if self._whole:  # what comes now is that the client leaves
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            self._late = True
            if not self._answered:
                allowed = f"{BODY_SECONDS:.0f} s, and a second for each {BYTES_PER_SECOND} bytes"
                await refuse(self._scope, self._send, SlowBody(f"the request body came too slowly; it has {allowed}"))
            return DISCONNECT

    async def _next(self) -> Message:
        message = await self._receive()
        self._deadline += len(message.get("body", b"")) / BYTES_PER_SECOND
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._late and not self._answered:
            return  # the 408 was the answer
        if message["type"] == "http.response.start":
            self._answered = True
            if not self._whole:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif not self._whole and not message.get("more_body", False):
            await self._send({**message, "more_body": True})  # all of the answer, though not yet its end
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        """Reads on for a moment and a few bytes."""
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and not self._whole:
                    left -= len((await self._next()).get("body", b""))


class Bounded:
    """One body that may have `most` bytes. A longer one is answered with 413, and the application is told that its client
    left."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._left, self._most = most, most
        self._answered = self._refused = False

    def check_length(self) -> None:
        """Raises PayloadTooLarge where the headers say it already."""
        length = Headers(scope=self._scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._most:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._refused:
            return DISCONNECT
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left >= 0:
            return message
        self._refused = True
        if not self._answered:
            await refuse(self._scope, self._send, self._too_large())
        return DISCONNECT

    async def send(self, message: Message) -> None:
        if self._refused and not self._answered:
            return
        self._answered = True
        await self._send(message)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request body is larger than {self._most} bytes (max_body_size)")


async def refuse(scope: Scope, send: Send, error: ComposeError) -> None:
    """Answers with the error, in the form of the face that was called."""
    response = error_response(Request(scope), error)
    response.headers["Connection"] = "close"

    async def nothing() -> Message:
        return DISCONNECT

    await response(scope, nothing, send)


def has_body(scope: Scope) -> bool:
    """Whether the headers announce a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
