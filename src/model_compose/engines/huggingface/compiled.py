"""Blends by a method of low rank (svd), as adapters of the model: made on first use, kept by the blend's identity."""

import asyncio
from collections import OrderedDict
from dataclasses import replace
from itertools import count

from model_compose.engines.huggingface.batch import Batch
from model_compose.engines.huggingface.loop import Loop
from model_compose.lora.blend import Blend, stack
from model_compose.lora.layers import LoraModel

KEPT = 8
"""Beyond so many, the least recently used leaves as soon as no sequence uses it."""


class Compiled:
    """Belongs to the event loop; the model is changed in the engine's thread alone."""

    def __init__(self, lora: LoraModel, batch: Batch, loop: Loop) -> None:
        self._lora, self._batch, self._loop = lora, batch, loop
        self._names: OrderedDict[str, str] = OrderedDict()
        self._made = count()
        self._one_at_a_time = asyncio.Lock()

    async def blend(self, identity: str, blend: Blend) -> Blend:
        """The same function as one adapter at weight 1. It stays for a caller who adds the sequence before its next await.

        blend: of the adapters as the model knows them.
        """
        async with self._one_at_a_time:
            if identity not in self._names:
                adapter = await asyncio.to_thread(stack, blend, self._lora.adapters)
                # No adapter of the file has a ':' in its name; the number tells it from one that is about to leave.
                adapter = replace(adapter, name=f"{identity}:{next(self._made)}")
                await asyncio.wrap_future(self._loop.call(lambda: self._lora.load(adapter)))
                self._names[identity] = adapter.name
            self._names.move_to_end(identity)
            while len(self._names) > KEPT:
                _, oldest = self._names.popitem(last=False)
                await asyncio.wrap_future(self._loop.call(lambda name=oldest: self._batch.retire(name)))  # type: ignore[misc]
            return Blend({self._names[identity]: 1.0})
