"""The page's door: with api_keys, everything behind it needs a key, typed once into a form and then held as a session.

The cookie carries a random token, never the key. Knows nothing of what lies behind the door.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from html import escape
from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from model_compose.servers.wire import has_key

SESSION_SECONDS = 12 * 3600.0
MAX_FORM_BYTES = 8192
PAUSE_SECONDS = 0.5
"""After a wrong key: too short to notice for a person, too long for guessing."""


class Door:
    """ASGI middleware: a session cookie or `Authorization: Bearer <key>`, else the login form."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr], title: str = "model-compose") -> None:
        self._app, self._title = app, title
        self._keys = [key.get_secret_value().encode() for key in keys]
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
        if not self._may_enter(request):
            return await self._turn_away(request)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _may_enter(self, request: Request) -> bool:
        cookies = SimpleCookie(request.headers.get("cookie", ""))
        token = cookies[self._cookie].value if self._cookie in cookies else ""
        now = time.monotonic()
        self._sessions = {token: ends for token, ends in self._sessions.items() if ends > now}
        return token in self._sessions or has_key(request.headers.get("authorization"), self._keys)

    def _turn_away(self, request: Request) -> Response:
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{request.scope.get('root_path', '')}/login", 303)
        return PlainTextResponse("an API key is needed; sign in at /login", 401, {"WWW-Authenticate": "Bearer"})

    async def _login(self, request: Request) -> Response:
        home = f"{request.scope.get('root_path', '')}/"
        if request.method == "GET":
            return RedirectResponse(home, 303) if self._may_enter(request) else self._form()
        if request.method != "POST":
            return PlainTextResponse("method not allowed", 405, {"Allow": "GET, POST"})
        if not _from_here(request):
            return self._form("The form was sent from another site. Please sign in here.", 403)
        if not has_key(f"Bearer {await _key_in(request)}", self._keys):
            await asyncio.sleep(PAUSE_SECONDS)
            return self._form("This key is not known here.", 401)
        token = secrets.token_urlsafe(32)
        self._sessions[token] = time.monotonic() + SESSION_SECONDS
        response = RedirectResponse(home, 303)
        response.set_cookie(
            self._cookie, token, httponly=True, samesite="strict", secure=request.url.scheme == "https", path=home
        )
        return response

    def _form(self, message: str = "", status: int = 200) -> Response:
        shown = f'<p role="alert">{escape(message)}</p>' if message else ""
        page = _FORM.replace("{{title}}", escape(self._title)).replace("{{message}}", shown)
        return HTMLResponse(page, status, {"Cache-Control": "no-store", "Content-Security-Policy": _POLICY})


def _from_here(request: Request) -> bool:
    """Whether a form was sent by our own page. Browsers say so by Origin; what is no browser cannot be tricked."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _key_in(request: Request) -> str:
    """The key in the posted form; "" for none and for a body that no form of ours would send."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            return ""
    try:
        return parse_qs(body.decode(), max_num_fields=4).get("key", [""])[0]
    except ValueError:
        return ""


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

_FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in – {{title}}</title>
<style>
:root { color-scheme: light dark; --back: #f7f7f8; --card: #fff; --ink: #18181b; --soft: #63636e; --line: #d9d9e0; --accent: #4f46e5; --bad: #b42318 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f0f12; --card: #18181c; --ink: #f4f4f5; --soft: #a1a1ad; --line: #34343d; --accent: #6366f1; --bad: #fda29b }
}
* { box-sizing: border-box }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 24px; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
form { width: 100%; max-width: 360px; padding: 32px; background: var(--card); border: 1px solid var(--line); border-radius: 14px }
h1 { margin: 0 0 4px; font-size: 20px; line-height: 1.3; overflow-wrap: anywhere }
.hint { margin: 0 0 24px; color: var(--soft); font-size: 14px }
label { display: block; margin-bottom: 6px; font-size: 14px; font-weight: 600 }
input { width: 100%; padding: 10px 12px; font: inherit; color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: 8px }
button { width: 100%; margin-top: 16px; padding: 10px 12px; font: inherit; font-weight: 600; color: #fff; background: var(--accent);
  border: 0; border-radius: 8px; cursor: pointer }
input:focus-visible, button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
[role=alert] { margin: 12px 0 0; color: var(--bad); font-size: 14px }
</style>
</head>
<body>
<form method="post" action="login">
  <h1>{{title}}</h1>
  <p class="hint">This page is behind an API key.</p>
  <label for="key">API key</label>
  <input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
  {{message}}
  <button>Sign in</button>
</form>
</body>
</html>
"""
