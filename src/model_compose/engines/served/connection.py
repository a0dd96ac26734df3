"""An HTTP client for a server that runs a model for us, at a URL or behind a Unix socket."""

from pathlib import Path

import httpx

CONNECT_SECONDS = 10.0
_UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class Connection:
    """A server at `url`, or behind a Unix socket. Requests have no time limit, only connecting has."""

    def __init__(self, url: str, *, socket: Path | None = None, api_key: str | None = None) -> None:
        self.url = url
        self.client = httpx.AsyncClient(
            base_url=url,
            transport=None if socket is None else httpx.AsyncHTTPTransport(uds=str(socket), limits=_UNLIMITED),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=_UNLIMITED,
        )

    async def is_ready(self) -> bool:
        """Whether the server answers that it is healthy."""
        try:
            return (await self.client.get("/health")).is_success
        except httpx.TransportError:
            return False

    async def close(self) -> None:
        await self.client.aclose()


def error_of(response: httpx.Response) -> str:
    """The error message in a response whose body has been read; else its status and the beginning of the body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}: {response.text[:200]}"
