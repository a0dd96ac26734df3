"""Bounds on requests' bodies: how slowly they may arrive, how large they may be, and how long they are read after the
answer."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_compose.errors import ComposeError, Overloaded, PayloadTooLarge, SlowBody
from model_compose.servers.access import peer_of
from model_compose.servers.connections import network_of
from model_compose.servers.wire import error_response

BODY_SECONDS = 20.0
BYTES_PER_SECOND = 4096
"""A body must arrive within BODY_SECONDS. Every BYTES_PER_SECOND bytes that arrive extend the deadline by a second, to at
most BODY_SECONDS from then."""
LINGER_SECONDS = 1.0
LINGER_BYTES = 4 << 20
"""How long, and how much of, a body is read after its answer. Without that, a client that is still sending would get a
connection reset instead of the answer."""

SMALL_BYTES = 64 << 10
SMALL_SECONDS = 0.05
"""An answer that does not need the body waits this long for a body that is announced to be small. The connection can serve
another request only if the body has been read."""

DISCONNECT: Message = {"type": "http.disconnect"}


class Bodies:
    """ASGI middleware: ends slow bodies with a 408, and closes the connection if the answer came before the body's end.

    The application answers the 408 itself, so that its answer has what all its answers have, such as headers for CORS.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            return await self._app(scope, receive, send)
        body = _Arriving(scope, receive, send)
        try:
            return await self._app(scope, body.receive, body.send)
        except SlowBody as error:  # the application does not know this error
            return await refuse(scope, body.send, error)


class _Arriving:
    """One body on its way in, and the answer on its way out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self._whole = self._answered = self._late = False

    async def receive(self) -> Message:
        """The next piece of the body. Raises SlowBody, once, if it does not come in time and there is no answer yet."""
        if self._late:
            return DISCONNECT
        if self._whole:  # the next message says that the client has left
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            self._late = True
            if self._answered:
                return DISCONNECT
            rate = f"less than {BYTES_PER_SECOND} bytes/s over {BODY_SECONDS:.0f} s"
            raise SlowBody(f"the request body came too slowly: {rate}") from None

    async def _next(self) -> Message:
        message = await self._receive()
        earned = len(message.get("body", b"")) / BYTES_PER_SECOND
        self._deadline = min(self._deadline + earned, asyncio.get_running_loop().time() + BODY_SECONDS)
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answered = True
            if not self._late:
                await self._finish()
            if not self._whole:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif not self._whole and not message.get("more_body", False):
            await self._send({**message, "more_body": True})  # the whole answer, but not its end yet
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _finish(self) -> None:
        """Reads the rest of a small body that the application did not read."""
        headers = Headers(scope=self._scope)
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > SMALL_BYTES or "expect" in headers:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(SMALL_SECONDS):
                while not self._whole:
                    await self._next()

    async def _linger(self) -> None:
        """Reads on for LINGER_SECONDS or LINGER_BYTES."""
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and not self._whole:
                    left -= len((await self._next()).get("body", b""))


BODIES = 32
"""The bodies of all running requests together may be as large as this many bodies of the largest size; those of one client
half of that."""


@dataclass
class Allowance:
    """How large bodies may be, in bytes. of_body: a single one. taken: by the running requests, for each client."""

    of_body: int
    taken: Counter[str] = field(default_factory=Counter)

    @property
    def of_all(self) -> int:
        return BODIES * self.of_body

    def is_exceeded(self, client: str) -> bool:
        return self.taken[client] > self.of_all // 2 or self.taken.total() > self.of_all


class Bounded:
    """One body within the allowance. If it exceeds that, the answer is 413 or 429, and the application sees that the client
    has left."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, allowance: Allowance) -> None:
        self._scope, self._receive, self._send, self._allowance = scope, receive, send, allowance
        self._client = network_of(peer_of(scope))
        self._taken = 0
        self._answered = self._refused = False

    def check_length(self) -> None:
        """Raises PayloadTooLarge if the headers announce too large a body."""
        length = Headers(scope=self._scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._allowance.of_body:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._refused:
            return DISCONNECT
        message = await self._receive()
        arrived = len(message.get("body", b""))
        self._taken += arrived
        self._allowance.taken[self._client] += arrived
        error = self._refusal() if arrived else None
        if error is None:
            return message
        self._refused = True
        if not self._answered:
            await refuse(self._scope, self._send, error)
        return DISCONNECT

    async def send(self, message: Message) -> None:
        if self._refused and not self._answered:
            return
        self._answered = True
        await self._send(message)

    def leave(self) -> None:
        """Called at the end of the request: its body no longer counts."""
        self._allowance.taken[self._client] -= self._taken
        if not self._allowance.taken[self._client]:
            del self._allowance.taken[self._client]

    def _refusal(self) -> ComposeError | None:
        if self._taken > self._allowance.of_body:
            return self._too_large()
        if self._allowance.is_exceeded(self._client):
            return Overloaded(
                f"the bodies of running requests have reached {self._allowance.of_all} bytes ({BODIES} times "
                "max_body_size), or those of your address half of that; try again in a moment"
            )
        return None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the request body is larger than {self._allowance.of_body} bytes (max_body_size)")


async def refuse(scope: Scope, send: Send, error: ComposeError) -> None:
    """Answers with the error, in the form of the API that was called."""
    response = error_response(Request(scope), error)
    response.headers["Connection"] = "close"

    async def nothing() -> Message:
        return DISCONNECT

    await response(scope, nothing, send)


def has_body(scope: Scope) -> bool:
    """Whether the headers announce a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
