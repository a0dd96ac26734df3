"""callback_url: one POST when a task ends. Only to public addresses unless the file allows others, never redirected."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import httpx
from pydantic import SecretStr

from model_compose.errors import ComposeError, InputError
from model_compose.servers.tasks import Task

log = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_DELAY_SECONDS = 0.5
TIMEOUT_SECONDS = 10.0
SIGNATURE_HEADER = "X-Model-Compose-Signature"

_followers: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class Callback:
    """Where to tell of a task's end. The body is signed with HMAC-SHA256 when there is a secret."""

    url: str
    headers: Mapping[str, str]
    allow_private: bool = False
    secret: SecretStr | None = None

    def follow(self, task: Task) -> None:
        """Sends the callback once the task has ended."""
        follower = asyncio.create_task(self._send_when_done(task))
        _followers.add(follower)  # asyncio keeps only weak references
        follower.add_done_callback(_followers.discard)

    async def _send_when_done(self, task: Task) -> None:
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
                response = await self._post(body, headers)
            except (httpx.HTTPError, InputError) as error:
                log.warning("[task-%s] callback attempt %d: %s", task.id, attempt + 1, type(error).__name__)
                continue
            if response.status_code < 500 and response.status_code != 429:
                log.info("[task-%s] callback answered %d", task.id, response.status_code)
                return
        log.error("[task-%s] callback given up after %d attempts", task.id, ATTEMPTS)

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """Connects to the very address that was checked, so that a name cannot change between check and use."""
        url = httpx.URL(self.url)
        pinned = url.copy_with(host=await resolve(self.url, allow_private=self.allow_private))
        async with httpx.AsyncClient(follow_redirects=False, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            host = {"Host": url.netloc.decode()}
            return await client.post(
                pinned, content=body, headers={**headers, **host}, extensions={"sni_hostname": url.host}
            )


async def resolve(url: str, *, allow_private: bool) -> str:
    """The address to connect to. Raises InputError for a URL that is not http(s), or leads to a private, loopback or
    reserved address."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"callback_url is not a URL: {error}", field="callback_url") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("callback_url must start with http:// or https://", field="callback_url")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parsed.host, parsed.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"callback_url: the host '{parsed.host}' cannot be resolved", field="callback_url") from None
    addresses = [str(address[0]) for *_, address in found]
    for address in addresses:
        if not allow_private and not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise InputError(
                f"callback_url leads to {address}, which is not a public address (callback_private_hosts allows it)",
                field="callback_url",
            )
    return addresses[0]
