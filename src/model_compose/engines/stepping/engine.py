"""What engines that compute sequences in this process have in common: requests become sequences, adapters come and go.

A driver derives from SteppingEngine, opens its model, and calls `_begin`.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model_compose.daemon import Lane, in_daemon_thread
from model_compose.engines.adapters import check_loaded, fetch_adapter
from model_compose.engines.options import AdapterOptions
from model_compose.engines.prompts import Prompts, check_logit_bias
from model_compose.engines.stepping.low_rank import LowRank
from model_compose.errors import ComposeError, NotReady
from model_compose.generation import Chunk, Request, Sampling, Usage
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Report
from model_compose.room import Room

if TYPE_CHECKING:
    from model_compose.engines.stepping.grammar import Constraint, Grammars
    from model_compose.engines.stepping.loop import Loop
    from model_compose.engines.stepping.scheduler import Scheduler
    from model_compose.engines.stepping.sequence import Sequence

# This must be set before torch loads GNU's OpenMP. Its threads wait for each other by spinning for milliseconds. If
# another process wants the core, each of the hundreds of waits in a step then costs such a time slice. So we let them
# sleep after 0.1 ms.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


@dataclass(frozen=True)
class Running:
    """A driver's model and what belongs to it.

    identity: of the base. adapters: gives all loaded adapters by key. attach: adds an adapter under a key; it runs in
    the engine's thread, gets no options for an adapter that was made here, and raises AdapterError.
    """

    prompts: Prompts
    vocabulary: int
    eos: tuple[int, ...]
    identity: str
    grammars: "Grammars"
    scheduler: "Scheduler"
    adapters: Callable[[], Mapping[str, LoraAdapter]]
    attach: Callable[[LoraAdapter, str, AdapterOptions | None], None]


class SteppingEngine:
    """Tokenizes prompts, gives sequences to the engine's thread, and turns their chunks into one stream for each
    request.
    """

    def __init__(self, blends: Blends, base_dir: Path, *, rows: int, queue: int) -> None:
        """rows: how many sequences run at once. queue: how many more may wait."""
        self._base_dir, self.room = base_dir, Room(rows, queue)
        self._running: Running | None = None
        self._loop: Loop | None = None
        self._formats = Lane("response formats")
        self._low_rank: LowRank
        self._keys = {name: name for name in blends.adapters}
        """The key of each adapter.

        An adapter that is loaded again gets a new key, since running requests keep the old one.
        """

    def _begin(self, running: Running) -> None:
        from model_compose.engines.stepping.loop import Loop

        self._running, self._loop = running, Loop(running.scheduler)
        self._low_rank = LowRank(
            self._loop, running.adapters, lambda adapter: running.attach(adapter, adapter.name, None),
            running.scheduler.retire,
        )  # fmt: skip

    def _check(self, request: Request) -> None:
        """Raises InputError for a request that this driver cannot run."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        from model_compose.engines.stepping.loop import Mailbox

        running, loop = self._running, self._loop  # `close` sets both to None, maybe while this runs
        if running is None or loop is None:
            raise NotReady("the model is not loaded")
        check_logit_bias(request, running.vocabulary)
        self._check(request)
        start, unfinished = time.perf_counter(), request.sampling.num_return_sequences
        with self.room.hold(unfinished, request.place):  # before any work
            mailbox = Mailbox()
            sequences = await self._sequences(running, request, mailbox.put)
            loop.add(sequences)
            try:
                while unfinished:
                    chunk = await mailbox.get()
                    unfinished -= chunk.finish is not None
                    if unfinished:
                        yield chunk
                made = sum(sequence.generated for sequence in sequences)
                first = sequences[0]
                prompt_tokens = len(first.tokens) - first.generated
                usage = Usage(prompt_tokens, made, time.perf_counter() - start, first.reused)
                yield replace(chunk, usage=usage)
            finally:
                for sequence in sequences:
                    sequence.done = True  # the engine's thread drops it before the next step

    async def _sequences(
        self, running: Running, request: Request, emit: Callable[[Chunk | ComposeError], None]
    ) -> "list[Sequence]":
        """Tokenizes the prompt and makes one sequence for each text of the request. Raises InputError."""
        from model_compose.engines.stepping.sequence import Prompt, Sequence

        tokens = await running.prompts.read(request)
        constraints = await self._constraints(running.grammars, request.sampling)
        # Do not await from here on until the engine's thread has the sequences: an adapter of the blend could be
        # unloaded meanwhile. Only a blend by svd waits, for the adapter that it is made into.
        identity = self.identity(request.blend)
        blend = replace(request.blend, weights={self._keys[name]: w for name, w in request.blend.active.items()})
        if blend.low_rank:
            blend = await self._low_rank.blend(identity, blend)
        prompt = Prompt(tokens, blend, identity, request.sampling, running.prompts.context)
        return [
            Sequence(prompt, index, running.eos, running.prompts.tokenizer, constraint, emit)
            for index, constraint in enumerate(constraints)
        ]

    async def _constraints(self, grammars: "Grammars", sampling: Sampling) -> "list[Constraint | None]":
        """The constraints by the response_format, one for each text. Raises InputError."""
        format, texts = sampling.response_format, sampling.num_return_sequences
        if format is None:
            return [None] * texts
        return await self._formats.run(lambda: [grammars.start(format) for _ in range(texts)])

    def identity(self, blend: Blend) -> str:
        if self._running is None:
            raise NotReady("the model is not loaded")
        check_loaded(blend, self._keys)
        adapters = self._running.adapters()
        return blend.identity(
            self._running.identity, {name: adapters[self._keys[name]].digest for name in blend.active}
        )

    @property
    def has_chat_template(self) -> bool:
        return self._running is not None and bool(self._running.prompts.tokenizer.chat_template)

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        running, loop, name = self._running, self._loop, options.name
        if running is None or loop is None:
            raise NotReady("the model is not loaded")
        assert name is not None
        key = name
        while key in running.adapters():
            key += "'"
        adapter = await in_daemon_thread(lambda: fetch_adapter(name, options, self._base_dir, report))
        await asyncio.wrap_future(loop.call(lambda: running.attach(adapter, key, options)))
        old = self._keys.get(name)
        self._keys[name] = key  # before the old one is retired: new requests take the new one
        await self._retire(old)

    async def unload_adapter(self, name: str) -> None:
        await self._retire(self._keys.pop(name, None))

    async def _retire(self, key: str | None) -> None:
        running, loop = self._running, self._loop
        if key is not None and running is not None and loop is not None:
            await asyncio.wrap_future(loop.call(lambda: running.scheduler.retire(key)))

    async def close(self) -> None:
        self._formats.close()
        if self._running is not None:
            self._running.prompts.close()
        if self._loop is not None:
            await in_daemon_thread(self._loop.close)
        self._loop = self._running = None
