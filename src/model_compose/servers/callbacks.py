"""callback_url: one POST when a task ends. It goes to public addresses only, unless the file allows others, and follows no
redirects."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
from pydantic import SecretStr

from model_compose.daemon import in_daemon_thread
from model_compose.errors import ComposeError, InputError
from model_compose.servers.tasks import Task

log = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_DELAY_SECONDS = 0.5
TIMEOUT_SECONDS = 10.0
SIGNATURE_HEADER = "X-Model-Compose-Signature"
OWN_HEADERS = frozenset(
    ["connection", "content-length", "content-type", "host", "transfer-encoding", SIGNATURE_HEADER.lower()]
)
"""Headers that the caller cannot set: those that HTTP needs, and the signature."""

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24", "192.88.99.0/24",  # protocol assignments; relays to 2002::/16
        "2001::/23", "2002::/16", "3fff::/20",  # Teredo and other protocols; 6to4, which holds an IPv4 address; examples
    )
)  # fmt: skip
"""Networks that are not public. Some versions of Python have is_global true for some of them."""


@dataclass(frozen=True)
class Callback:
    """Where to report a task's end. The body is signed with HMAC-SHA256 if there is a secret."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    allow_private: bool = False
    secret: SecretStr | None = None

    async def check(self) -> None:
        """Raises InputError for a callback that could never be sent."""
        for name, value in self.headers.items():
            if not re.fullmatch(r"[-!#$%&'*+.^_`|~\w]+", name, re.ASCII) or name.lower() in OWN_HEADERS:
                raise InputError(f"callback_headers: '{name}' cannot be set", field="callback_headers")
            if not (value.isascii() and value.isprintable()):
                raise InputError(
                    f"callback_headers: the value of '{name}' must be printable ASCII", field="callback_headers"
                )
        await self._resolve()

    async def send_when_done(self, task: Task) -> None:
        """Waits for the task's end and reports it. Tries again if the other side cannot take it."""
        with suppress(ComposeError):
            await task.wait()
        body = json.dumps({**task.state(), "event": task.status}, ensure_ascii=False).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        if self.secret:
            digest = hmac.new(self.secret.get_secret_value().encode(), body, hashlib.sha256).hexdigest()
            headers[SIGNATURE_HEADER] = f"sha256={digest}"
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(FIRST_DELAY_SECONDS * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    status = await self._post(body, headers)
            except (httpx.HTTPError, InputError, TimeoutError) as error:
                log.warning("[task-%s] callback attempt %d: %s", task.id, attempt + 1, type(error).__name__)
                continue
            if status < 500 and status != 429:
                log.info("[task-%s] callback answered %d", task.id, status)
                return
        log.error("[task-%s] callback given up after %d attempts", task.id, ATTEMPTS)

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> int:
        """The answer's status; its body is not read. Connects to the address that was checked, so that the host name
        cannot lead elsewhere between check and use."""
        url = httpx.URL(self.url)
        pinned = url.copy_with(host=await self._resolve())
        all_headers = {**headers, "Host": url.netloc.decode()}
        async with (
            httpx.AsyncClient(follow_redirects=False, timeout=TIMEOUT_SECONDS, trust_env=False) as client,
            client.stream(
                "POST", pinned, content=body, headers=all_headers, extensions={"sni_hostname": url.host}
            ) as response,
        ):
            return response.status_code

    async def _resolve(self) -> str:
        """The address to connect to. Raises InputError for a URL that is not http(s), or leads to an address that is not
        public."""
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise _wrong(f"is not a URL: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise _wrong("must start with http:// or https://")
        if url.port is not None and not 0 < url.port < 65536:
            raise _wrong(f"has the port {url.port}; ports end at 65535")
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                # In a thread of its own: names that do not resolve would occupy all threads of asyncio's shared pool.
                found = await in_daemon_thread(lambda: socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            raise _wrong(f"names the host '{url.host}', which cannot be resolved") from None
        addresses = [str(address[0]) for *_, address in found]
        if not self.allow_private and (hidden := next((one for one in addresses if not _is_public(one)), None)):
            raise _wrong(f"leads to {hidden}, which is not a public address (callback_private_hosts allows it)")
        return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6 and parsed not in GLOBAL_UNICAST:
        return False  # among these are IPv4 addresses in IPv6 form: mapped, compatible, translated (NAT64)
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in SPECIAL)


def _wrong(what: str) -> InputError:
    return InputError(f"callback_url {what}", field="callback_url")
