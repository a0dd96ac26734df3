"""Bounds on connections: how many there may be, and how long each may take. Knows nothing of the requests on them.

When there are too many, the one that has been idle for longest is closed, so open sockets without requests keep nobody out.
When all are busy, a few more are let in, which may ask only for the health.
"""

import asyncio
import ipaddress
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

HEADER_SECONDS = 10
"""From a connection's opening, or a later request's first byte, to the end of the request's headers."""
IDLE_SECONDS = 30
"""Between two requests. Longer than the 5 s after which httpx and the openai package close a connection. With a shorter
time, they would sometimes send a request just as we close the connection."""
WRITE_SECONDS = 30
"""How long a client may read nothing of its answer once all buffers in between are full."""

MOST_FILES = 1 << 16
MOST_CONNECTIONS = 4096
SPARE = 16
"""Connections beyond the limit, which get the health, or the answer that there are too many."""


class Seldom:
    """Logs a warning at most once a second. The next one says how many were left out."""

    def __init__(self) -> None:
        self._last, self._left_out = float("-inf"), 0

    def warn(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now - self._last < 1.0:
            self._left_out += 1
            return
        more = f" ({self._left_out} more of these since)" if self._left_out else ""
        self._last, self._left_out = now, 0
        log.warning(message + "%s", *arguments, more)


@dataclass(frozen=True)
class Limits:
    """most: connections at the same time. of_client: connections from one address. at_once: how many asyncio accepts in a
    row, before it serves any of them."""

    most: int
    of_client: int
    at_once: int

    @classmethod
    def of_files(cls, files: int, most: int | None = None, of_client: int | None = None) -> "Limits":
        """What fits into `files` open files beside the program's own files. most and of_client: limits from the YAML."""
        at_once = max(1, min(64, files // 64))
        own = max(48, files // 16)
        # asyncio may accept three more rounds before it tells us of the first round's connections.
        room = max(1, files - own - SPARE - 4 * at_once)
        most = min(most or MOST_CONNECTIONS, room)
        return cls(most, min(of_client or max(1, most // 2), most), at_once)


def raise_file_limit() -> int:
    """Raises the limit on open files to the hard one, or to MOST_FILES. Returns how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_FILES
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return min(soft, MOST_FILES)


class Connections:
    """The open connections of all ports. Dicts without values serve as lists: they keep the order and remove fast."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._clients: dict[Connection, str] = {}
        self._counts: Counter[str] = Counter()
        self._idle: dict[Connection, None] = {}
        self._idle_of: dict[str, dict[Connection, None]] = {}
        self._spare: dict[Connection, None] = {}
        self._seldom = Seldom()

    def protocol(self) -> Callable[..., "Connection"]:
        """The factory of uvicorn's connections."""
        return partial(Connection, self)

    def add(self, connection: "Connection", client: str) -> bool:
        """Takes a connection in; closes an idle one if it must. False: the connection may only ask for the health."""
        if self._counts[client] >= self.limits.of_client:
            full = f"{client} has {self.limits.of_client} connections (max_connections_per_client)"
            room = self._close_idle(self._idle_of.get(client, {}), full)
        elif len(self._clients) >= self.limits.most:
            full = f"there are {self.limits.most} connections (max_connections, or what the limit on open files leaves)"
            room = self._close_idle(self._idle, full)
        else:
            room = True
        if room:
            self._clients[connection] = client
            self._counts[client] += 1
            self.rest(connection)
            return True
        self._seldom.warn("%s, all of them busy: a new one may ask for the health alone", full)
        self._spare[connection] = None
        if len(self._spare) > SPARE:
            self._drop(next(iter(self._spare)))
        return False

    def rest(self, connection: "Connection") -> None:
        """The connection has no request now."""
        if client := self._clients.get(connection):
            self._idle[connection] = None
            self._idle_of.setdefault(client, {})[connection] = None

    def work(self, connection: "Connection") -> None:
        """The connection has a request now."""
        if client := self._clients.get(connection):
            self._idle.pop(connection, None)
            idle = self._idle_of.get(client, {})
            idle.pop(connection, None)
            if not idle:
                self._idle_of.pop(client, None)

    def remove(self, connection: "Connection") -> None:
        """The connection is closed, or will be at once."""
        self.work(connection)
        self._spare.pop(connection, None)
        if client := self._clients.pop(connection, None):
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]

    def _close_idle(self, idle: "dict[Connection, None]", why: str) -> bool:
        """Closes the connection that has been idle for longest. Returns whether there was one."""
        longest = next(iter(idle), None)
        if longest is None:
            return False
        self._seldom.warn("%s: the longest idle one is closed", why)
        self._drop(longest)
        return True

    def _drop(self, connection: "Connection") -> None:
        self.remove(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """uvicorn's connection, with a place among the others and with time limits."""

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = connections
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = self.client[0] if self.client else "unknown"
        admitted = self._all.add(self, network_of(peer))
        self.app_state = {**self.app_state, "peer": peer, "crowded": not admitted}
        self._start("headers", HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._busy:
            self._start("headers", HEADER_SECONDS)

    def handle_events(self) -> None:
        super().handle_events()
        if self._busy:
            self._all.work(self)
            self._stop("headers")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unread:
            self._watch()
        elif not self._busy:
            self._all.rest(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._busy:
            self._stop("reading")

    def timeout_keep_alive_handler(self) -> None:
        if self._unread:  # not idle: the client is still reading
            self.timeout_keep_alive_task = self.loop.call_later(IDLE_SECONDS, self.timeout_keep_alive_handler)
        else:
            self.transport.abort()

    @property
    def _unread(self) -> int:
        """Bytes that were written and that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def _watch(self) -> None:
        """Watches whether the client reads: nothing is written meanwhile, so `_unread` falls with each byte read."""
        if "reading" not in self._timers:
            self._timers["reading"] = self.loop.call_later(WRITE_SECONDS, self._look, self._unread)

    def _look(self, before: int) -> None:
        del self._timers["reading"]
        if not self._unread:
            if not self._busy:
                self._all.rest(self)
        elif self._unread < before:
            self._watch()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self._stop("headers")
        self._stop("reading")
        super().connection_lost(exc)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start(self, what: str, seconds: float) -> None:
        """Gives the client so many seconds for this, unless a timer runs for it already."""
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()


def network_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 network of an IPv6 address, which belongs to one owner."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.ip_network((parsed, 64), strict=False))
        parsed = parsed.ipv4_mapped
    return str(parsed)


def report_failed_accepts(loop: asyncio.AbstractEventLoop) -> None:
    """Logs a short warning instead of asyncio's traceback for each connection that cannot be accepted for lack of files."""
    seldom = Seldom()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" in context["message"]:
            seldom.warn("a connection cannot be accepted: %s", getattr(context.get("exception"), "strerror", ""))
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
