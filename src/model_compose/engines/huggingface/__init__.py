"""The embedded engine: transformers in this process, any blend for any request. `driver: huggingface`."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ByteSize, Field

from model_compose.daemon import in_daemon_thread
from model_compose.engines import AdapterOptions, ModelOptions, Stats
from model_compose.engines.low_rank import LowRank
from model_compose.engines.parts import check_logit_bias, fetch_adapter, refuse_common, tokenize
from model_compose.errors import Conflict, InputError, LoadError, NotReady, Overloaded
from model_compose.generation import Chunk, Request, ResponseFormat
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Progress, Report
from model_compose.schema import Options

# Before torch loads GNU's OpenMP: its threads wait for each other by spinning for milliseconds. Where another process wants
# the core, each of a step's hundreds of waits then costs such a time slice. After 0.1 ms they sleep instead.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from model_compose.engines.huggingface.batch import Batch
    from model_compose.engines.huggingface.cache import KVCache
    from model_compose.engines.huggingface.grammar import Grammars
    from model_compose.engines.huggingface.loop import Loop
    from model_compose.engines.huggingface.model import Loaded


class HuggingfaceOptions(Options):
    """`options` of the embedded engine."""

    trust_remote_code: bool = Field(default=False, description="Run Python code that the model's repository brings")
    max_batch_size: int = Field(default=16, ge=1, description="Sequences that share a step; further ones wait")
    max_context: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; the model's own context if unset"
    )
    kv_cache: ByteSize | None = Field(
        default=None, ge=1, description="Memory for keys and values, such as 2GiB; a part of what is free if unset"
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 429")
    prefix_cache: bool = Field(default=True, description="Keep keys and values for prompts that start alike")
    max_adapters_on_device: int | None = Field(
        default=None, ge=1, description="Adapters in the device's memory at once; the others stay in main memory"
    )
    fold: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="Add a blend into the weights, which then costs nothing per token. auto: in float32, while all "
        "running requests use the same, and a blend by a method of full rank whenever it is asked for; always: the "
        "default blend, and no other is taken",
    )


class HuggingfaceEngine:
    """Tokenizes, hands sequences to its thread, and turns what comes back into one stream a request."""

    Options: ClassVar[type[Options]] = HuggingfaceOptions

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        assert isinstance(options.options, HuggingfaceOptions)
        self._options, self._own = options, options.options
        self._blends, self._base_dir = blends, base_dir
        self._loaded: Loaded | None = None
        self._batch: Batch | None = None
        self._loop: Loop | None = None
        self._low_rank: LowRank
        self._cache: KVCache | None = None
        self._grammars: Grammars
        self._context = 0
        self._keys = {name: name for name in blends.adapters}
        """What the model calls the adapter of a name. One that is loaded again gets another key, as running requests
        finish on the old one."""

    @classmethod
    def refuse(cls, options: ModelOptions) -> None:
        refuse_common(options)
        assert isinstance(options.options, HuggingfaceOptions)
        if options.allow_runtime_adapters and options.options.fold == "always":
            raise ValueError(
                "fold: always cannot be with 'allow_runtime_adapters': a folded model takes no others; leave fold out"
            )
        if options.quantization is not None and options.options.fold == "always":
            raise ValueError(
                "fold: always cannot be with 'quantization': a quantised base is never folded; leave fold out"
            )
        _refuse_full_rank(options, options.options.fold)

    async def open(self, report: Report) -> None:
        from model_compose.engines.huggingface.loop import Loop

        loaded, batch = await in_daemon_thread(lambda: self._load(report))
        self._loaded, self._batch, self._loop = loaded, batch, Loop(batch)
        self._low_rank = LowRank(self._loop, lambda: loaded.lora.adapters, loaded.lora.load, batch.retire)

    def _load(self, report: Report) -> tuple["Loaded", "Batch"]:
        import torch

        from model_compose.engines.huggingface.batch import Batch
        from model_compose.engines.huggingface.free import free_memory
        from model_compose.engines.huggingface.grammar import Grammars
        from model_compose.engines.huggingface.memory import open_cache
        from model_compose.engines.huggingface.model import load

        own = self._own
        loaded = load(
            self._options, self._base_dir, report, trust_remote_code=own.trust_remote_code,
            max_adapters=own.max_adapters_on_device,
        )  # fmt: skip
        for blend in self._blends.full_rank:
            _fold_ahead(loaded, blend, report)
        # In fewer bits a fold would round small deltas away. It takes a second copy of the weights that it touches.
        auto = own.fold == "auto" and loaded.dtype == torch.float32 and self._options.quantization is None
        free = free_memory(loaded.device)
        auto = auto and (free is None or 2 * loaded.lora.fold_bytes(self._blends.default) < free)
        if (own.fold == "always" or auto) and self._blends.default.active:
            loaded.lora.fold(self._blends.default)
        cache, self._context = open_cache(loaded.forward.layers, loaded.device, loaded.context, own)
        self._cache = cache
        self._grammars = Grammars(loaded.tokenizer, loaded.vocabulary, loaded.eos)
        if loaded.eos:  # reads the vocabulary, which would hold up all other threads later
            self._grammars.start(ResponseFormat("json_object"))
        return loaded, Batch(
            loaded.lora, loaded.forward, cache, max_rows=own.max_batch_size, prefix_cache=own.prefix_cache,
            auto_fold=auto, max_adapters=own.max_adapters_on_device,
        )  # fmt: skip

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        from model_compose.engines.huggingface.loop import Mailbox, stream
        from model_compose.engines.huggingface.sequence import Prompt, Sequence

        loaded, loop = self._loaded, self._loop  # both are None once closed, which may happen while this runs
        if loaded is None or loop is None:
            raise NotReady("the model is not loaded")
        self._check(request, loaded)
        self._check_room(loop)  # before any work
        start = time.perf_counter()
        tokens = await asyncio.to_thread(tokenize, loaded.tokenizer, self._context, request)
        format = request.sampling.response_format
        texts = range(request.sampling.num_return_sequences)
        constraints = [await asyncio.to_thread(self._grammars.start, format) if format else None for _ in texts]
        # Nothing is awaited from here until the thread has the sequences, but for the adapter that an svd is made into: one
        # that is unloaded in between would be gone from under them.
        mailbox = Mailbox()
        identity = self.identity(request.blend)
        blend = await self._known(request.blend, identity)  # the last await before the sequences are in the loop
        prompt = Prompt(tokens, blend, identity, request.sampling, self._context)
        sequences = [
            Sequence(prompt, index, loaded.eos, loaded.tokenizer, constraint, mailbox.put)
            for index, constraint in enumerate(constraints)
        ]
        self._check_room(loop)  # others may have come meanwhile
        async with aclosing(stream(loop, mailbox, sequences, len(tokens), start)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _known(self, blend: Blend, identity: str) -> Blend:
        """The blend of adapters as the model calls them; what svd makes of it is one."""
        blend = replace(blend, weights={self._keys[name]: weight for name, weight in blend.active.items()})
        return await self._low_rank.blend(identity, blend) if blend.low_rank else blend

    def identity(self, blend: Blend) -> str:
        if self._loaded is None:
            raise NotReady("the model is not loaded")
        if gone := [name for name in blend.active if name not in self._keys]:
            raise InputError(f"the adapter '{gone[0]}' has been unloaded meanwhile", field="blend")
        adapters = self._loaded.lora.adapters
        digests = {name: adapters[self._keys[name]].digest for name in blend.active}
        return blend.identity(self._loaded.identity, digests)

    def stats(self) -> Stats | None:
        loaded, batch, loop, cache = self._loaded, self._batch, self._loop, self._cache
        if loaded is None or batch is None or loop is None or cache is None:
            return None
        present = loop.running  # a tuple, and numbers: the engine's thread may go on meanwhile
        done = sum(sequence.done for sequence in present)
        running = sum(sequence.row is not None and not sequence.done for sequence in present)
        prefixes = batch.prefixes
        return Stats(
            running=running,
            waiting=max(0, loop.load - done - running),
            kv_cache_used=cache.spent - (prefixes.size if prefixes else 0),  # prefixes give way
            kv_cache_total=cache.budget,
            prefix_queries=prefixes.queries if prefixes else 0,
            prefix_hits=prefixes.hits if prefixes else 0,
            preemptions=batch.preemptions,
            adapters=len(loaded.lora.names),
        )

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        from model_compose.engines.huggingface.model import placement

        loaded, loop = self._loaded, self._loop
        if loaded is None or loop is None:
            raise NotReady("the model is not loaded")
        assert options.name is not None
        if self._own.fold == "always":
            raise Conflict(
                "this model has its default blend folded in (options.fold: always) and takes no other adapter"
            )
        key = options.name
        while key in loaded.lora.adapters:
            key += "'"
        name = options.name
        adapter = await in_daemon_thread(lambda: fetch_adapter(name, options, self._base_dir, report))
        where = placement(options)
        await asyncio.wrap_future(loop.call(lambda: loaded.lora.load(adapter, where, key=key)))
        old = self._keys.get(name)
        self._keys[name] = key  # before the old one goes: whoever starts now takes the new one
        await self._retire(old)

    async def unload_adapter(self, name: str) -> None:
        await self._retire(self._keys.pop(name, None))

    async def _retire(self, key: str | None) -> None:
        loop, batch = self._loop, self._batch
        if key is not None and loop is not None and batch is not None:
            await asyncio.wrap_future(loop.call(lambda: batch.retire(key)))

    async def close(self) -> None:
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        self._loop = self._batch = self._cache = self._loaded = None

    def _check_room(self, loop: "Loop") -> None:
        """Raises Overloaded."""
        if loop.load >= self._own.max_batch_size + self._own.max_queue:
            raise Overloaded(
                f"{loop.load} texts run or wait already (max_batch_size {self._own.max_batch_size}, max_queue "
                f"{self._own.max_queue}); try again in a moment"
            )

    def _check(self, request: Request, loaded: "Loaded") -> None:
        """Raises InputError for what this model cannot do."""
        check_logit_bias(request, loaded.vocabulary)
        if request.blend.full_rank and not any(request.blend.equals(blend) for blend in self._blends.full_rank):
            raise InputError(
                f"the blend {request.blend.described} has full rank and runs folded into the weights only, in a copy that "
                "is made when the model loads; put it under the file's 'blends'",
                field="blend",
            )
        if self._own.fold == "always" and not request.blend.equals(self._blends.default):
            raise InputError(
                "this model has its default blend folded in (options.fold: always) and takes no other; leave 'blend' out, "
                "or set fold: never",
                field="blend",
            )


def _refuse_full_rank(options: ModelOptions, fold: str) -> None:
    """A blend of full rank runs folded, in a copy of the weights. Raises ValueError where it cannot."""
    blends = options.to_blends().full_rank
    if not blends:
        return
    which = f"the blend {blends[0].described} has full rank and runs folded into the weights only"
    if len(blends) > 1:
        raise ValueError(
            f"the blends {' and '.join(blend.described for blend in blends)} have full rank and run folded into a copy of "
            "the weights, and a component holds one such copy; keep one of them, use method: svd, or give the others a "
            "component of their own"
        )
    if options.quantization is not None:
        raise ValueError(f"{which}, and a quantised base is never folded; use method: svd, or leave quantization out")
    if fold == "always":
        raise ValueError(f"{which}, but fold: always takes the default blend alone; use method: svd, or set fold: auto")
    if fold == "never":
        raise ValueError(f"{which}, and fold is never; use method: svd, or set fold: auto")


def _fold_ahead(loaded: "Loaded", blend: Blend, report: Report) -> None:
    """Makes the weights of a blend of full rank and lays them aside, so that a request for it only swaps them in.

    Raises LoadError.
    """
    from model_compose.engines.huggingface.memory import size_text

    lora, which = loaded.lora, f"the blend {blend.described}"
    if not lora.can_fold(blend):
        raise LoadError(f"{which} runs folded only, and this base is quantised, which is never folded; use method: svd")
    report(Progress(f"folding {which}", 0, 1, "blends"))
    try:
        lora.fold(blend)
    except (RuntimeError, MemoryError) as error:  # torch says by a RuntimeError that memory is short
        size = size_text(lora.fold_bytes(blend))
        raise LoadError(
            f"no memory for {which}, whose weights take {size} besides the base's; use method: svd"
        ) from error
    lora.unfold(keep=True)
    report(Progress(f"folding {which}", 1, 1, "blends"))
