"""The web page: a form for each workflow, its text as it is made, and the calls that would do the same.

The page is static (assets/): plain ES modules without a build step. It asks this server alone, for what to draw
(`/page.json`) and for runs (`/runs`), which go through Compose.run in this process; the API's address is only shown.
What the page asks is in form.py, a run in runs.py, the calls in snippets.py, the login in auth.py.
"""

import hashlib
from html import escape

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_compose.compose import Compose
from model_compose.daemon import in_daemon_thread
from model_compose.request_log import ONGOING
from model_compose.server_options import DEFAULT_MAX_BODY, WebuiOptions
from model_compose.servers.answers import Health, shown
from model_compose.servers.guard import Guard, Hosts
from model_compose.servers.webui import form, runs
from model_compose.servers.webui.auth import ASSETS, ICON, Door
from model_compose.servers.wire import add_error_handlers, read_body, start_stream

POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
        "form-action 'none'", "frame-ancestors 'none'", "base-uri 'none'",
    )
)  # fmt: skip
"""Nothing but this server is ever asked, and a model's text can bring no script, style or picture of its own."""

ROUTINE = ("/assets/", "/state")
"""Paths that a browser asks for by itself, the state twice a second while models load."""


def create_page(compose: Compose, api_address: str | None) -> ASGIApp:
    """The page as an application of its own. With api_keys on the server, all of it is behind them."""
    server = compose.config.serving.server
    options = compose.config.serving.webui or WebuiOptions()
    app = SafeHeaders(_create_app(compose, api_address if server else None))
    door = Door(app, server.api_keys, form.title(compose)) if server and server.api_keys else app
    max_body = server.max_body_size if server else DEFAULT_MAX_BODY
    return Guard(door, Hosts(options.host, options.allowed_hosts), max_body, origins=None)


def _create_app(compose: Compose, api_address: str | None) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(app)
    app.mount("/assets", StaticFiles(directory=ASSETS))

    @app.get("/")
    async def index() -> HTMLResponse:
        page = (ASSETS / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("{{title}}", escape(form.title(compose))).replace("{{icon}}", ICON))

    @app.get("/page.json")
    async def description() -> JSONResponse:
        """What there is to ask, at this moment: clients may have loaded more adapters since the last time.

        key: tells this file from others whose pages the same address has had, as a browser keeps their runs beside its own.
        """
        workflows = form.shown_workflows(compose)
        described = await in_daemon_thread(lambda: [form.describe_workflow(compose, each) for each in workflows])
        key = hashlib.sha256(repr([str(file.resolve()) for file in compose.files]).encode()).hexdigest()[:16]
        return JSONResponse({"key": key, "api": api_address, "workflows": described})

    @app.get("/state")
    async def state() -> JSONResponse:
        """Whether the models are loaded, and how far they are."""
        return JSONResponse(shown(Health.of(compose)))

    @app.post("/runs")
    async def run(request: Request) -> Response:
        body = await read_body(runs.RunBody, request)
        return await start_stream(request, runs.beating(runs.events(compose, body, api_address)))

    return app


class SafeHeaders:
    """ASGI middleware: every answer says what the browser may do with it, and is asked for again before it is reused.

    It also keeps what a browser asks for by itself out of the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-cache"
            await send(message)

        ongoing = ONGOING.get()
        if ongoing is not None and scope["type"] == "http":
            ongoing.is_routine = scope["path"].startswith(ROUTINE)
        await self._app(scope, receive, with_headers)
