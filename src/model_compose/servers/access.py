"""Logs one line for each request, and gives each request the id that all its log lines have."""

import logging
import random
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_compose.request_log import ONGOING, Ongoing

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-ID"
LEFT = 499
"""The status in the log line if the client left before there was an answer; nginx logs the same number."""


class Access:
    """ASGI middleware: takes X-Request-ID from the caller or makes one, sends it back, and logs the request at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        ongoing = Ongoing(_request_id(scope))
        status, complete = LEFT, False

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = ongoing.id
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        token = ONGOING.set(ongoing)
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            pass  # the client left before its body had arrived: nobody waits for an answer, and nothing failed
        finally:
            milliseconds = 1000 * (time.perf_counter() - started)
            left = "" if complete or status == LEFT else ", not read to the end"
            # raw_path is still percent-encoded, so it cannot contain a newline.
            path = scope.get("raw_path", b"").decode("ascii", "replace")
            log.log(
                logging.DEBUG if ongoing.is_routine and status < 400 else logging.INFO,
                "%s %s %s %d %.0f ms%s%s", client_of(scope), scope["method"], path, status, milliseconds,
                _generated(ongoing), left,
            )  # fmt: skip
            ONGOING.reset(token)


def client_of(scope: Scope) -> str:
    """The client's address for the log. If a proxy reported it, the proxy's address follows."""
    client = scope["client"][0] if scope.get("client") else "unknown"
    peer = peer_of(scope)
    return client if peer == client else f"{client} (by {peer})"


def peer_of(scope: Scope) -> str:
    """The address at the other end of the connection. X-Forwarded-For does not count here: a proxy may pass on whatever its
    client wrote there."""
    fallback = scope["client"][0] if scope.get("client") else "unknown"
    return str(scope.get("state", {}).get("peer", fallback))


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(REQUEST_ID, "")
    return given if re.fullmatch(r"[!-~]{1,128}", given) else f"{random.getrandbits(128):032x}"


def _generated(ongoing: Ongoing) -> str:
    if not ongoing.blends:
        return ""
    blends = ", ".join(dict.fromkeys(ongoing.blends))
    return f", {ongoing.prompt_tokens}+{ongoing.completion_tokens} tokens, blend {blends}"
