"""The page's login. With api_keys, a person types a key into a form once; the browser then holds a session.

The session's cookie carries a random token, never the key. This module knows nothing about the page itself.
"""

import secrets
import time
from collections.abc import Collection
from html import escape
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from model_compose.errors import ComposeError
from model_compose.servers.guard import Keys

SESSION_SECONDS = 12 * 3600.0
ASSETS = Path(__file__).parent / "assets"
MAX_FORM_BYTES = 8192


class Door:
    """ASGI middleware. It lets in a request with a session cookie or `Authorization: Bearer <key>`, and sends every other
    one to the login form."""

    def __init__(self, app: ASGIApp, keys: Collection[SecretStr], title: str = "model-compose") -> None:
        self._app, self._title = app, title
        self._keys = Keys(keys)
        self._sessions: dict[str, float] = {}
        # Cookies are shared by all ports of a host: a name of its own keeps two pages from signing each other out.
        self._cookie = f"model_compose_{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websockets
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope, receive)
        if request.url.path.removeprefix(scope.get("root_path", "")) == "/login":
            return await (await self._login(request))(scope, receive, send)
        if not self._is_signed_in(request):
            try:
                await self._keys.check(request)
            except ComposeError as refusal:
                return await self._turn_away(request, refusal)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _is_signed_in(self, request: Request) -> bool:
        token = request.cookies.get(self._cookie, "")
        now = time.monotonic()
        self._sessions = {token: ends for token, ends in self._sessions.items() if ends > now}
        return token in self._sessions

    def _turn_away(self, request: Request, refusal: ComposeError) -> Response:
        if refusal.status != 401:
            return PlainTextResponse(str(refusal), refusal.status)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{request.scope.get('root_path', '')}/login", 303)
        return PlainTextResponse("an API key is needed; sign in at /login", 401, {"WWW-Authenticate": "Bearer"})

    async def _login(self, request: Request) -> Response:
        home = f"{request.scope.get('root_path', '')}/"
        if request.method == "GET":
            return RedirectResponse(home, 303) if self._is_signed_in(request) else self._form()
        if request.method != "POST":
            return PlainTextResponse("method not allowed", 405, {"Allow": "GET, POST"})
        if not _from_here(request):
            return self._form("The form was sent from another site. Please sign in here.", 403)
        try:
            await self._keys.check_key(await _key_in(request), request.scope)
        except ComposeError as refusal:
            return self._form("This key is not known here." if refusal.status == 401 else str(refusal), refusal.status)
        token = secrets.token_urlsafe(32)
        self._sessions[token] = time.monotonic() + SESSION_SECONDS
        response = RedirectResponse(home, 303)
        response.set_cookie(
            self._cookie, token, httponly=True, samesite="strict", secure=request.url.scheme == "https", path=home
        )
        return response

    def _form(self, message: str = "", status: int = 200) -> Response:
        shown = f'<p class="error" role="alert">{escape(message)}</p>' if message else ""
        page = (
            (ASSETS / "login.html")
            .read_text(encoding="utf-8")
            .replace("{{style}}", (ASSETS / "page.css").read_text(encoding="utf-8"))
            .replace("{{title}}", escape(self._title))
            .replace("{{message}}", shown)
            .replace("{{icon}}", ICON)
        )
        return HTMLResponse(page, status, {"Cache-Control": "no-store", "Content-Security-Policy": _POLICY})


def _from_here(request: Request) -> bool:
    """Whether our own page sent the form. Browsers name the sending site in the Origin header. A client that sends no
    Origin is not a browser, so no other site can have made it send the form."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _key_in(request: Request) -> str:
    """The key in the posted form; "" if there is none, and for a body that is too large or is no form."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            return ""
    try:
        return parse_qs(body.decode(), max_num_fields=4).get("key", [""])[0]
    except ValueError:
        return ""


ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'>"
    "<circle cx='12' cy='16' r='11' fill='%234f46e5'/><circle cx='21' cy='16' r='10' fill='%23a5b4fc' fill-opacity='.85'/>"
    '</svg>">'
)
"""Two overlapping circles, for two adapters. The icon is inline, so that the browser sends no request for it."""

_POLICY = "; ".join(
    (
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "form-action 'self'",
        "frame-ancestors 'none'", "base-uri 'none'",
    )
)  # fmt: skip
