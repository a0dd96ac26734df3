"""Keeps blends as stacked adapters, for engines that take only one LoRA per request: writes them to disk, has the engine
load them, and evicts the least recently used.

All that it knows of the engine is two functions, which load and unload a PEFT folder.
"""

import asyncio
import itertools
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from model_compose.daemon import in_daemon_thread
from model_compose.lora.adapter import LoraAdapter, write_adapter
from model_compose.lora.blend import Blend, stack


@dataclass
class Entry:
    """One stacked adapter. name: its name in the engine. users: the number of requests that use it or wait for it."""

    name: str
    folder: Path
    loading: "asyncio.Task[None]"
    users: int = 0


class Compiled:
    """The stacked adapters that an engine has loaded, at most `limit`. For a new one, the least recently used is unloaded.
    Adapters in use stay; if all are in use, a new one waits.

    folder: an empty folder, whose name is unique among all clients of the engine. load(name, folder), unload(name): the
    engine's functions; they may raise.
    """

    def __init__(
        self, folder: Path, limit: int, load: Callable[[str, Path], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._folder, self._limit, self._load, self._unload = folder, limit, load, unload
        self._entries: dict[str, Entry] = {}  # the least recently used first
        self._in_use = asyncio.Semaphore(limit)  # held once for each entry with users
        self._numbers = itertools.count()

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters in the engine, the least recently used first."""
        return [entry.name for entry in self._entries.values()]

    @asynccontextmanager
    async def use(self, identity: str, blend: Blend, adapters: Mapping[str, LoraAdapter]) -> AsyncGenerator[str]:
        """Yield the name of the blend's stacked adapter, which stays loaded within the block. identity: the blend's digest.

        Raises the errors of `load`; the next use then tries again.
        """
        entry = self._entries.get(identity)
        if entry is None or not entry.users:
            await self._in_use.acquire()
            entry = self._entries.get(identity)
            if entry is not None and entry.users:  # another request loaded it meanwhile
                self._in_use.release()
        if entry is None:
            entry = self._add(identity, blend, adapters)
        self._entries[identity] = self._entries.pop(identity)
        entry.users += 1
        try:
            await asyncio.shield(entry.loading)  # other requests may be waiting for it too
            yield entry.name
        finally:
            entry.users -= 1
            if not entry.users:
                self._in_use.release()

    def clear(self) -> None:
        """Forget all adapters, because the engine has lost them (it was restarted)."""
        for identity in list(self._entries):
            self.forget(identity)

    def forget(self, identity: str) -> None:
        """Forget one adapter, because the engine has lost it. The next use loads it again."""
        if entry := self._entries.pop(identity, None):
            shutil.rmtree(entry.folder, ignore_errors=True)

    def _add(self, identity: str, blend: Blend, adapters: Mapping[str, LoraAdapter]) -> Entry:
        evicted = None
        if len(self._entries) >= self._limit:
            # One of them has no users: this use holds one of the `limit` places of _in_use.
            evicted = self._entries.pop(next(key for key, entry in self._entries.items() if not entry.users))
        folder = self._folder / f"{identity}-{next(self._numbers)}"
        name = f"{self._folder.name}-{identity}"
        loading = asyncio.create_task(self._compile(name, folder, blend, adapters, evicted))
        entry = self._entries[identity] = Entry(name, folder, loading)
        loading.add_done_callback(lambda task: self._drop_failed(identity, entry, task))
        return entry

    async def _compile(
        self, name: str, folder: Path, blend: Blend, adapters: Mapping[str, LoraAdapter], evicted: Entry | None
    ) -> None:
        if evicted is not None:
            await asyncio.wait([evicted.loading])
            if evicted.loading.exception() is None:
                await self._unload(evicted.name)
            shutil.rmtree(evicted.folder, ignore_errors=True)
        await in_daemon_thread(lambda: write_adapter(stack(blend, adapters), folder))
        await self._load(name, folder)

    def _drop_failed(self, identity: str, entry: Entry, task: "asyncio.Task[None]") -> None:
        if (task.cancelled() or task.exception() is not None) and self._entries.get(identity) is entry:
            del self._entries[identity]
            shutil.rmtree(entry.folder, ignore_errors=True)
