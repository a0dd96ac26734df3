"""What engines that step sequences in this process do alike: from a request to sequences, adapters that come and go.

A driver derives from SteppingEngine, opens what it runs on, and calls `_begin`.
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

# Before torch loads GNU's OpenMP: its threads wait for each other by spinning for milliseconds. Where another process wants
# the core, each of a step's hundreds of waits then costs such a time slice. After 0.1 ms they sleep instead.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


@dataclass(frozen=True)
class Running:
    """What a driver steps. identity: of the base. adapters: those that are held, by key. attach: one more, under a key, in
    the engine's thread; one that was made here has no options. Raises AdapterError.
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
    """Tokenizes, hands sequences to its thread, and turns what comes back into one stream a request."""

    def __init__(self, blends: Blends, base_dir: Path, *, rows: int, queue: int) -> None:
        """rows: sequences that run at once; queue: those that may wait besides."""
        self._base_dir, self.room = base_dir, Room(rows, queue)
        self._running: Running | None = None
        self._loop: Loop | None = None
        self._formats = Lane("response formats")
        self._low_rank: LowRank
        self._keys = {name: name for name in blends.adapters}
        """What an adapter is held under. One that is loaded again gets another key, as running requests finish on the old
        one."""

    def _begin(self, running: Running) -> None:
        from model_compose.engines.stepping.loop import Loop

        self._running, self._loop = running, Loop(running.scheduler)
        self._low_rank = LowRank(
            self._loop, running.adapters, lambda adapter: running.attach(adapter, adapter.name, None),
            running.scheduler.retire,
        )  # fmt: skip

    def _check(self, request: Request) -> None:
        """Raises InputError for what this driver cannot do."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        from model_compose.engines.stepping.loop import Mailbox

        running, loop = self._running, self._loop  # both are None once closed, which may happen while this runs
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
                    sequence.done = True  # the engine's thread drops it before its next step

    async def _sequences(
        self, running: Running, request: Request, emit: Callable[[Chunk | ComposeError], None]
    ) -> "list[Sequence]":
        """One sequence for each text of the request, with its prompt read. Raises InputError."""
        from model_compose.engines.stepping.sequence import Prompt, Sequence

        tokens = await running.prompts.read(request)
        constraints = await self._constraints(running.grammars, request.sampling)
        # From here until the engine's thread has the sequences, only the adapter that an svd is made into is awaited: an
        # adapter that the blend names could be unloaded meanwhile.
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
        """The response_format's, one for each text. Raises InputError."""
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
        self._keys[name] = key  # before the old one goes: whoever starts now takes the new one
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
