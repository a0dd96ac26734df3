"""`up`: binds the ports, serves while the models load, and shuts everything down again."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from model_compose.compose import Compose
from model_compose.errors import AddressInUse
from model_compose.progress import Report, silent

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Addresses:
    """Where the faces are reached; None for a face that the file does not have."""

    api: str | None
    page: str | None


async def serve(
    compose: Compose,
    report: Report = silent,
    announce: Callable[[Addresses], None] = lambda _: None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGINT or SIGTERM; a second one does not wait for running requests. The ports answer at once; models
    load meanwhile.

    announce: told the addresses once they listen. on_ready: called once the models are loaded.
    Raises AddressInUse, and whatever loading raises.
    """
    controller = compose.config.serving
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    api = bind(controller.server.host, controller.server.port) if controller.server else None
    page = bind(controller.webui.host, controller.webui.port) if controller.webui else None
    _warn_if_open(compose)
    async with contextlib.AsyncExitStack() as faces:
        if api is not None and controller.server is not None:
            from model_compose.servers.http import create_app

            app = create_app(compose, controller.server, address(page))
            await faces.enter_async_context(listening(app, api))
        announce(Addresses(address(api), address(page)))
        loading = asyncio.create_task(compose.load(report))
        stopping = asyncio.create_task(stop.wait())
        try:
            if page is not None:
                # gradio takes seconds to import; the API's health already answers.
                create_page = await asyncio.to_thread(_page_factory)
                await faces.enter_async_context(listening(create_page(compose, address(api)), page))
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                on_ready()
                await stopping
            log.info("shutting down")
            stop.clear()  # a second signal ends the wait
            await _drain(compose, stop, controller.shutdown_timeout)
        finally:
            stopping.cancel()
            loading.cancel()
            await compose.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises AddressInUse."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY; without, each small answer waits 40 ms for the client's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is in use by another program; stop it (`model-compose down` if it is ours), or set "
                "another port in the file"
            ) from None
        raise AddressInUse(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def address(listener: socket.socket | None) -> str | None:
    """The URL of a listening socket."""
    if listener is None:
        return None
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `serve` has its own, for all faces together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """The app answers on the socket within the block."""
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(POLL_SECONDS / 10)
    if running.done():
        await running
    try:
        yield
    finally:
        server.should_exit = True
        await running


async def _drain(compose: Compose, stop: asyncio.Event, seconds: float) -> None:
    """Refuses new requests, and lets running ones go on for as long as the file allows; closing stops what is left."""
    compose.ready = False
    deadline = asyncio.get_running_loop().time() + seconds
    while compose.busy and not stop.is_set() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_SECONDS)


def _page_factory() -> Callable[[Compose, str | None], ASGIApp]:
    from model_compose.servers.webui import create_page

    return create_page


def _warn_if_open(compose: Compose) -> None:
    controller = compose.config.serving
    keys = controller.server.api_keys if controller.server else None
    for face in (controller.server, controller.webui):
        if face is not None and face.host not in LOOPBACK and not keys:
            log.warning("%s:%d is reachable from other machines without a key; set api_keys", face.host, face.port)
