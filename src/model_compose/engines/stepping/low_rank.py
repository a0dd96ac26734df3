"""Blends by a method of low rank (svd) on engines that mix adapters themselves: each is made into one adapter on first use.

An engine gives two functions that run in its thread; it retires an adapter once no sequence uses it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from model_compose.daemon import in_daemon_thread
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, stack

if TYPE_CHECKING:
    from model_compose.engines.stepping.loop import Loop

KEPT = 8
"""Beyond so many, the least recently used leaves as soon as no sequence uses it."""


class LowRank:
    """Belongs to the event loop. adapters: those that are loaded, by the names that blends have when they come here."""

    def __init__(
        self, loop: "Loop", adapters: Callable[[], Mapping[str, LoraAdapter]], load: Callable[[LoraAdapter], None],
        retire: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._loop, self._adapters, self._load, self._retire = loop, adapters, load, retire
        self._names: OrderedDict[str, str] = OrderedDict()
        self._made = count()
        self._one_at_a_time = asyncio.Lock()

    async def blend(self, identity: str, blend: Blend) -> Blend:
        """The same function as one adapter at weight 1, which stays for a caller who awaits nothing until it is in use."""
        async with self._one_at_a_time:
            if identity not in self._names:
                adapter = await in_daemon_thread(lambda: stack(blend, self._adapters()))
                # No adapter of the file has a ':' in its name; the number tells it from one that is about to leave.
                adapter = replace(adapter, name=f"{identity}:{next(self._made)}")
                await asyncio.wrap_future(self._loop.call(lambda: self._load(adapter)))
                self._names[identity] = adapter.name
            self._names.move_to_end(identity)
            while len(self._names) > KEPT:
                _, oldest = self._names.popitem(last=False)
                await asyncio.wrap_future(self._loop.call(lambda name=oldest: self._retire(name)))  # type: ignore[misc]
            return Blend({self._names[identity]: 1.0})
