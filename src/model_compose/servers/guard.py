"""Who may use a server: by which host name, with which key, from which web pages, and with how large bodies."""

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from model_compose.errors import ComposeError, Crowded, Forbidden, Misdirected, Overloaded, Unauthorized
from model_compose.servers.access import client_of, peer_of
from model_compose.servers.bodies import Allowance, Bounded
from model_compose.servers.connections import network_of
from model_compose.servers.wire import content_type, error_response

log = logging.getLogger(__name__)

GUESS_SECONDS = 0.5
"""How long the answer to a wrong key takes: a person does not notice it, but trying all keys takes ages."""
MOST_DEBT_SECONDS = 60.0
"""A client whose wrong keys add up to a longer wait is refused before its key is compared."""
KEPT_CLIENTS = 4096


class Guard:
    """ASGI middleware: Host, API keys, requests that a foreign web page forges, and the limit on request bodies."""

    def __init__(
        self, app: ASGIApp, hosts: "Hosts", max_body: int,
        keys: "Keys | None" = None, open_paths: Iterable[str] = (), origins: Collection[str] | None = (),
    ) -> None:  # fmt: skip
        """origins: the web pages of other addresses that may call; None where the file cannot list any."""
        self._app, self._hosts, self._allowance = app, hosts, Allowance(max_body)
        self._keys, self._open, self._origins = keys, frozenset(open_paths), origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        request = Request(scope)
        body = Bounded(scope, receive, send, self._allowance)
        try:
            await self._check(request)
            body.check_length()
        except ComposeError as refusal:
            return await error_response(request, refusal)(scope, receive, send)
        try:
            return await self._app(scope, body.receive, body.send)
        finally:
            body.leave()

    async def _check(self, request: Request) -> None:
        """Raises the refusal."""
        is_open = request.scope["path"] in self._open
        if request.scope.get("state", {}).get("crowded") and not is_open:
            raise Crowded("all connections that this server may have are busy; try again in a moment")
        self._hosts.check(request)
        if self._keys is None:
            self._check_origin(request)
        elif not is_open:
            await self._keys.check(request)

    def _check_origin(self, request: Request) -> None:
        """Refuses requests that a page of any site could have made a browser send. Requests for which the browser must ask
        first (by a preflight) are left to CORS."""
        origin = request.headers.get("origin")
        if origin is None or request.method == "GET" or content_type(request) == "application/json":
            return
        here = urlsplit(origin).netloc == request.headers.get("host")
        if here:
            return
        if self._origins is None:
            raise Forbidden(
                f"this request comes from a web page of {origin}, but this server takes forms from its own pages alone; "
                "call the API instead, or, if a proxy stands before this server, let it pass on the Host header"
            )
        if origin not in self._origins and "*" not in self._origins:
            raise Forbidden(
                f"this request comes from a web page of {origin}; list that under 'origins', or send application/json"
            )


# Host. When the name evil.example suddenly leads to this machine (DNS rebinding), a page from there may read our answers,
# which come from its own site as far as the browser knows. Its requests still say `Host: evil.example`.


@dataclass(frozen=True)
class Hosts:
    """The host names and addresses of a server. bound: the host that it listens on, as the YAML has it."""

    bound: str
    allowed: tuple[str, ...] = ()

    def check(self, request: Request) -> None:
        """Raises Misdirected."""
        given = request.headers.get("host")
        local = (request.scope.get("server") or ("",))[0]
        if given is not None and not self.known(given, local):  # every browser sends a Host
            raise Misdirected(
                f"this server is not known as '{given}'; if it should be, list the name in 'allowed_hosts' beside 'host' "
                'in the file (ports do not matter; "*" allows every name)'
            )

    def known(self, header: str, local: str) -> bool:
        """header: a Host header. local: the address of this machine at which its connection ended."""
        match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::\d*)?", header.strip())
        if match is None:
            return "*" in self.allowed
        name = (match[1] or match[2]).lower().removesuffix(".")
        return self._is_own(name, local) or any(_matches(name, pattern) for pattern in self.allowed)

    def _is_own(self, name: str, local: str) -> bool:
        address = _address(name)
        if address is None:
            bound_name = self.bound.lower().removesuffix(".")
            return name.endswith(".localhost") or name in ("localhost", bound_name, *_own_names())
        bound, here = _address(self.bound), _address(local)
        if bound is not None and bound.is_unspecified:  # a container does not know the address that it has outside
            return True
        return address in (bound, here) or (address.is_loopback and (here is None or here.is_loopback))


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _own_names() -> tuple[str, ...]:
    """The machine's name, and the first part of it."""
    name = socket.gethostname().lower().removesuffix(".")
    return name, name.partition(".")[0]


def _matches(name: str, pattern: str) -> bool:
    """pattern: a name, `*.name` for all names below it, or `*`."""
    return pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))


# Keys.


@dataclass
class _Client:
    """What is remembered of an address. free_at: when all of its wrong keys will have been answered. proven: the numbers of
    the right keys that it has used."""

    free_at: float = 0.0
    proven: set[int] = field(default_factory=set)


class Keys:
    """The API keys of a server, and the price of guessing: a client's wrong keys are answered one after the other, however
    many connections it uses.

    A client whose wait exceeds MOST_DEBT_SECONDS is refused before its key is compared; otherwise a right key would be
    recognised by its fast answer. Right keys that the client has used before still work.
    """

    def __init__(self, keys: Collection[SecretStr]) -> None:
        self._keys = [key.get_secret_value().encode() for key in keys]
        self._clients: dict[str, _Client] = {}

    async def check(self, request: Request) -> None:
        """Checks the Authorization header. Raises Unauthorized, Overloaded."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized("an API key is needed: send the header 'Authorization: Bearer <key>'")
        await self.check_key(given.strip(), request.scope)

    async def check_key(self, given: str, scope: Scope) -> None:
        """Raises Unauthorized, Overloaded. Compares with all keys, in constant time."""
        client = self._client(network_of(peer_of(scope)))
        right = {at for at, key in enumerate(self._keys) if hmac.compare_digest(given.encode(), key)}
        now = time.monotonic()
        wait = client.free_at - now
        if wait > MOST_DEBT_SECONDS and not right & client.proven:
            raise Overloaded("too many wrong API keys came from your address; try again in a minute")
        if right:
            client.proven |= right
            return
        log.warning("a wrong API key from %s", client_of(scope))
        client.free_at = max(now, client.free_at) + GUESS_SECONDS
        await asyncio.sleep(client.free_at - now)
        raise Unauthorized("this API key is not known here")

    def _client(self, address: str) -> _Client:
        """What is remembered of this address. The addresses that came longest ago are forgotten."""
        client = self._clients.pop(address, None) or _Client()
        self._clients[address] = client
        if len(self._clients) > KEPT_CLIENTS:
            del self._clients[next(iter(self._clients))]
        return client
