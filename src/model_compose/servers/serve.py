"""`up`: binds the ports, answers while the models load, and shuts everything down at the end."""

import asyncio
import contextlib
import errno
import gc
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
from model_compose.server_options import HttpServerOptions
from model_compose.servers.access import Access
from model_compose.servers.bodies import Bodies
from model_compose.servers.connections import (
    IDLE_SECONDS,
    Connections,
    Limits,
    raise_file_limit,
    report_failed_accepts,
)

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLL_SECONDS = 0.1
BACKLOG = 2048
"""The most connections that the kernel keeps until they are accepted."""


@dataclass(frozen=True)
class Addresses:
    """The addresses of the API and of the page; None for one that the file does not have."""

    api: str | None
    page: str | None


async def serve(
    compose: Compose,
    report: Report = silent,
    announce: Callable[[Addresses], None] = lambda _: None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP. After a second signal, running requests are not waited for; a third signal
    ends the process at once. The ports answer from the start, while the models load.

    announce: called with the addresses once they listen. on_ready: called once the models are loaded.
    Raises AddressInUse, and whatever loading raises.
    """
    controller = compose.config.serving
    ending = Ending()
    ending.listen()
    report_failed_accepts(asyncio.get_running_loop())
    api = bind(controller.server.host, controller.server.port) if controller.server else None
    page = bind(controller.webui.host, controller.webui.port) if controller.webui else None
    connections = connections_of(controller.server)
    _warn_if_open(compose)
    async with contextlib.AsyncExitStack() as faces:
        if api is not None and controller.server is not None:
            from model_compose.servers.http import create_app

            app = create_app(compose, controller.server, address(page))
            await faces.enter_async_context(listening(app, api, connections, ending))
        if page is not None:
            from model_compose.servers.webui import create_page

            await faces.enter_async_context(listening(create_page(compose, address(api)), page, connections, ending))
        announce(Addresses(address(api), address(page)))
        loading = asyncio.create_task(compose.load(report))
        stopping = asyncio.create_task(ending.begun.wait())
        try:
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                _spare_the_collector()
                on_ready()
                await stopping
            log.info("shutting down: running requests have %g s to end", controller.shutdown_timeout)
            await _drain(compose, ending, controller.shutdown_timeout)
        finally:
            stopping.cancel()
            loading.cancel()
            gc.unfreeze()
            await compose.close()


class Ending:
    """What signals ask for. begun: to end. hurried: to end without waiting for running requests.

    A terminal sends SIGHUP when it is closed. SIGHUP does not reload the file, because that would end the streams of every
    model that changed; `down` and `up` do it.
    """

    def __init__(self) -> None:
        self.begun, self.hurried = asyncio.Event(), asyncio.Event()
        self._signals: list[signal.Signals] = []

    def listen(self) -> None:
        """Takes over the signals, except those that this process was started to ignore, as nohup does."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._signals = [one for one in signals if signal.getsignal(one) != signal.SIG_IGN]
        for one in self._signals:
            asyncio.get_running_loop().add_signal_handler(one, self._signalled, one)

    def _signalled(self, number: signal.Signals) -> None:
        log.info("%s", number.name)
        if self.begun.is_set():
            self.hurried.set()
            for one in self._signals:
                asyncio.get_running_loop().remove_signal_handler(one)
        self.begun.set()


def connections_of(server: HttpServerOptions | None) -> Connections:
    """The connections of all ports: as many as the options say and the limit on open files allows."""
    most = (server.max_connections, server.max_connections_per_client) if server else (None, None)
    return Connections(Limits.of_files(raise_file_limit(), *most))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises AddressInUse."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY; without, each small answer waits 40 ms for the client's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is in use by another program; stop it, or set another port in the file",
                port=port,
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
    """uvicorn without its signal handlers: `serve` has its own, for the API and the page together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, listener: socket.socket, connections: Connections | None = None, ending: Ending | None = None
) -> AsyncIterator[None]:
    """Within the block, the app answers on the socket."""
    connections = connections or connections_of(None)
    server = _Server(
        uvicorn.Config(
            Access(Bodies(app)), http=connections.protocol(), ws="none",  # type: ignore[arg-type]
            log_config=None, access_log=False, lifespan="on", backlog=connections.limits.at_once,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=5,
        )
    )  # fmt: skip
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(POLL_SECONDS / 10)
    if running.done():
        await running
    listener.listen(BACKLOG)  # asyncio has shortened the kernel's queue to the number that it accepts in one go
    try:
        yield
    finally:
        server.should_exit = True
        hurrying = asyncio.create_task(_hurry(server, ending)) if ending else None
        await running
        if hurrying:
            hurrying.cancel()


async def _hurry(server: uvicorn.Server, ending: Ending) -> None:
    await ending.hurried.wait()
    server.force_exit = True


async def _drain(compose: Compose, ending: Ending, seconds: float) -> None:
    """Refuses new requests and waits for running ones, for as long as the file allows. `close` then stops the rest."""
    compose.ready, compose.progress = False, None
    deadline = asyncio.get_running_loop().time() + seconds
    while compose.busy and not ending.hurried.is_set() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if compose.busy:
        log.warning("%d running requests are ended", compose.busy)


def _spare_the_collector() -> None:
    """Makes full garbage collections skip all objects that exist now. torch and transformers alone have 400,000 objects;
    visiting them stops the whole process, health included, for 0.2 s."""
    gc.collect()
    gc.freeze()


def _warn_if_open(compose: Compose) -> None:
    controller = compose.config.serving
    keys = controller.server.api_keys if controller.server else None
    for face in (controller.server, controller.webui):
        if face is not None and face.host not in LOOPBACK and not keys:
            log.warning("%s:%d is reachable from other machines without a key; set api_keys", face.host, face.port)
