"""What engines share whose model runs in a server: the process, the connection, their folder, and how all of it ends."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from model_compose.engines.options import ModelOptions
from model_compose.engines.prompts import Prompts
from model_compose.engines.served.child import Child
from model_compose.engines.served.connection import Connection
from model_compose.errors import ComposeError, NotReady, RunError
from model_compose.progress import Progress, Report
from model_compose.room import Room


class ServedEngine:
    """A driver's engine derives from this and adds what it says to its server.

    server: the server's name in messages. room: rows are the texts that run at once, queue those that may wait besides.
    """

    server: ClassVar[str]

    def __init__(self, options: ModelOptions, *, rows: int, queue: int) -> None:
        self.room = Room(rows, queue)
        self._options = options
        self._prompts: Prompts | None = None
        self._connection: Connection | None = None
        self._child: Child | None = None
        self._folder: Path | None = None
        """Files that this engine writes for its server, and the socket; `close` removes it."""
        self._closed = False

    @property
    def up(self) -> bool:
        """Whether the server answers, as far as we know."""
        return self._connection is not None and (self._child is None or self._child.ready)

    @property
    def has_chat_template(self) -> bool:
        return self._prompts is not None and bool(self._prompts.tokenizer.chat_template)

    async def _run_server(
        self, command: list[str], environment: Mapping[str, str], socket: Path, connection: Connection,
        before_start: Callable[[], None], report: Report, *, patience: float,
    ) -> None:  # fmt: skip
        """Starts the server's process and waits until it answers (see Child). Raises LoadError."""
        self._child = Child(
            self._options.public_name,
            command,
            environment,
            socket,
            connection.is_ready,
            before_start,
            patience=patience,
        )
        report(Progress(f"starting {self.server}", 0, 1, "servers"))
        await self._child.start()
        report(Progress(f"starting {self.server}", 1, 1, "servers"))

    def _broken(self) -> ComposeError:
        """The caller's error for a connection that broke while a text was generated."""
        if self._closed:
            return NotReady("the service is shutting down")
        again = "it is being started again" if self._child is not None else "is it still up?"
        return RunError(f"{self.server} ended while it was generating; {again}")

    async def close(self) -> None:
        self._closed = True
        if self._prompts is not None:
            self._prompts.close()
        if self._child is not None:
            await self._child.close()
        if self._connection is not None:
            await self._connection.close()
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        self._prompts = self._child = self._connection = self._folder = None
