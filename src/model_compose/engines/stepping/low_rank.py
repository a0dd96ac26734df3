"""Blends by a method of low rank (svd) on engines that mix adapters themselves: each becomes one adapter on first use.

The engine gives two functions that run in its thread: one loads an adapter, one retires it once no sequence uses it.
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
"""If there are more of these adapters, the least recently used is retired."""


class LowRank:
    """Used in the event loop only. adapters: gives the loaded adapters by the names that the given blends use."""

    def __init__(
        self, loop: "Loop", adapters: Callable[[], Mapping[str, LoraAdapter]], load: Callable[[LoraAdapter], None],
        retire: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._loop, self._adapters, self._load, self._retire = loop, adapters, load, retire
        self._names: OrderedDict[str, str] = OrderedDict()
        self._made = count()
        self._one_at_a_time = asyncio.Lock()

    async def blend(self, identity: str, blend: Blend) -> Blend:
        """The blend as one adapter at weight 1.

        The caller must not await until a sequence uses it, or it may be retired.
        """
        async with self._one_at_a_time:
            if identity not in self._names:
                adapter = await in_daemon_thread(lambda: stack(blend, self._adapters()))
                # No adapter of the file has ':' in its name. The number distinguishes it from one that is being
                # retired.
                adapter = replace(adapter, name=f"{identity}:{next(self._made)}")
                await asyncio.wrap_future(self._loop.call(lambda: self._load(adapter)))
                self._names[identity] = adapter.name
            self._names.move_to_end(identity)
            while len(self._names) > KEPT:
                _, oldest = self._names.popitem(last=False)
                await asyncio.wrap_future(self._loop.call(lambda name=oldest: self._retire(name)))  # type: ignore[misc]
            return Blend({self._names[identity]: 1.0})
