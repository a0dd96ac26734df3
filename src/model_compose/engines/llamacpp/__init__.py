"""llama.cpp in this process: a GGUF base, any blend for any request. `driver: llamacpp`.

llama.cpp computes logits. Prompts, sampling, response formats and text are the embedded engine's own code, so that both
drivers give the same answer to the same request.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ByteSize, Field

from model_compose.daemon import in_daemon_thread
from model_compose.engines import AdapterOptions, ModelOptions, Stats
from model_compose.engines.low_rank import LowRank
from model_compose.engines.parts import (
    check_logit_bias,
    fetch_adapter,
    fetch_adapters,
    load_tokenizer,
    refuse_common,
    refuse_full_rank,
    tokenize,
)
from model_compose.errors import LoadError, NotReady, Overloaded
from model_compose.generation import Chunk, Request, ResponseFormat
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Progress, Report
from model_compose.schema import Options
from model_compose.sources import HuggingfaceSource, describe, fetch

if TYPE_CHECKING:
    from model_compose.engines.huggingface.grammar import Grammars
    from model_compose.engines.huggingface.loop import Loop
    from model_compose.engines.llamacpp.base import Base
    from model_compose.engines.llamacpp.batch import Batch
    from model_compose.engines.llamacpp.llama import Llama, Settings

log = logging.getLogger(__name__)


class LlamacppOptions(Options):
    """`options` of the llama.cpp driver."""

    later: ClassVar[Mapping[str, Any]] = {"server": None}
    n_threads: int | None = Field(default=None, ge=1, description="As many as the machine has cores, if unset")
    max_batch_size: int = Field(
        default=8, ge=1, le=256, description="Texts that run at once; those of one blend share a step"
    )
    max_context: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; the model's own context if unset"
    )
    kv_cache: ByteSize | None = Field(
        default=None, ge=1, description="Memory for keys and values, shared by all texts; one whole context if unset"
    )
    n_batch: int = Field(default=512, ge=1, description="Tokens of a step: one of each text, the others of prompts")
    n_gpu_layers: int | None = Field(
        default=None, ge=0, description="Layers on the GPU, where there is one; all if unset"
    )
    flash_attn: bool | None = Field(
        default=None,
        description="llama.cpp decides if unset; not with precision: float32, which it would round to float16",
    )
    max_queue: int = Field(default=256, ge=0, description="Requests that may wait; one more is answered 429")


@dataclass(frozen=True)
class Loaded:
    """Everything that generation needs. context: the longest prompt plus text, in tokens; eos: ids that end a text."""

    llama: "Llama"
    base: "Base"
    identity: str
    tokenizer: Any
    grammars: "Grammars"
    context: int
    eos: tuple[int, ...]
    token_bytes: int
    """Of keys and values, for each token."""


class LlamacppEngine:
    """Tokenizes, hands sequences to its thread, and turns what comes back into one stream a request."""

    Options: ClassVar[type[Options]] = LlamacppOptions

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        assert isinstance(options.options, LlamacppOptions)
        self._options, self._own, self._base_dir = options, options.options, base_dir
        self._loaded: Loaded | None = None
        self._batch: Batch | None = None
        self._loop: Loop | None = None
        self._keys = {name: name for name in blends.adapters}
        """What llama.cpp's adapter of a name is called here. One that is loaded again gets another key, as running
        requests finish on the old one."""
        self._adapters: dict[str, LoraAdapter] = {}
        """By key."""
        self._low_rank: LowRank

    @classmethod
    def refuse(cls, options: ModelOptions) -> None:
        refuse_common(options)
        refuse_full_rank(options)
        own, source = options.options, options.model
        assert isinstance(own, LlamacppOptions)
        file = source.filename if isinstance(source, HuggingfaceSource) else source.path
        placed = any(a.device is not None or a.precision not in ("auto", "float32") for a in options.peft_adapters)
        key = "filename" if isinstance(source, HuggingfaceSource) else "path"
        refused = {
            "model": (
                not (file or "").endswith(".gguf"),
                f"it needs a GGUF file, and {describe(source)} is none; name one by '{key}', or use driver: huggingface",
            ),
            "precision": (
                options.precision == "bfloat16",
                "a GGUF file's weights stay as they are, and keys and values are float16 or float32; set these, or auto",
            ),
            "quantization": (
                options.quantization is not None,
                "a GGUF file's weights stay as they are; take a file of another quantisation",
            ),
            "device": (
                options.device not in ("auto", "cpu"),
                "llama.cpp chooses by itself what it was built for; set auto or cpu",
            ),
            "peft_adapters": (
                placed, "adapters compute in float32, where the base does; leave their device and precision out"
            ),
            "n_gpu_layers": (
                options.device == "cpu" and bool(own.n_gpu_layers), "device is cpu; leave one of them out"
            ),
            "n_batch": (
                own.n_batch < own.max_batch_size,
                f"it is smaller than max_batch_size ({own.max_batch_size}), and each text has a token in a step",
            ),
        }  # fmt: skip
        for name, (given, remedy) in refused.items():
            if given:
                raise ValueError(f"driver llamacpp cannot honour '{name}': {remedy}")

    async def open(self, report: Report) -> None:
        from model_compose.engines.huggingface.loop import Loop
        from model_compose.engines.llamacpp.batch import Batch

        loaded = await in_daemon_thread(lambda: self._load(report))
        batch = Batch(loaded.llama, max_rows=self._own.max_batch_size, tokens_per_step=self._own.n_batch)
        self._loaded, self._batch, self._loop = loaded, batch, Loop(batch)
        self._low_rank = LowRank(
            self._loop, lambda: self._adapters, lambda adapter: self._attach(loaded.llama, loaded.base, adapter),
            batch.retire,
        )  # fmt: skip

    def _load(self, report: Report) -> Loaded:
        from model_compose.engines.huggingface.grammar import Grammars
        from model_compose.engines.llamacpp.base import check_all, read_base
        from model_compose.engines.llamacpp.llama import Llama, import_llama_cpp

        import_llama_cpp()  # before anything is fetched
        adapters = fetch_adapters(self._options, self._base_dir, report)
        fetched = fetch(self._options.model, base_dir=self._base_dir, report=report)
        assert fetched.file is not None  # see refuse()
        base = read_base(fetched.folder / fetched.file)
        check_all(base, adapters)
        tokenizer = load_tokenizer(fetched, trust_remote_code=False)
        token_bytes = base.kv_bytes_per_token(4 if self._options.precision == "float32" else 2)
        context, cells = _room(self._options, base, token_bytes)
        llama = Llama(base.file, _settings(self._options, cells), report)
        try:
            for number, adapter in enumerate(adapters, 1):
                self._attach(llama, base, adapter)
                report(Progress("attaching adapters", number, len(adapters), "adapters"))
            eos = tuple(sorted({*llama.eos, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))
            grammars = Grammars(tokenizer, llama.vocabulary, eos)
            if eos:  # reads the vocabulary, which would hold up all other threads later
                grammars.start(ResponseFormat("json_object"))
        except BaseException:
            llama.close()
            raise
        return Loaded(llama, base, fetched.identity, tokenizer, grammars, context, eos, token_bytes)

    def _attach(self, llama: "Llama", base: "Base", adapter: LoraAdapter) -> None:
        """Converts the adapter and loads it; its name here is its key. Raises AdapterError."""
        from model_compose.lora.gguf import write_gguf

        with tempfile.TemporaryDirectory(prefix="model-compose-") as folder:
            file = Path(folder) / "adapter.gguf"
            write_gguf(adapter, base.architecture, file)
            llama.load_adapter(adapter.name, file)
        self._adapters[adapter.name] = adapter

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        from model_compose.engines.huggingface.loop import Mailbox, stream
        from model_compose.engines.huggingface.sequence import Prompt, Sequence

        loaded, loop = self._loaded, self._loop  # both are None once closed, which may happen while this runs
        if loaded is None or loop is None:
            raise NotReady("the model is not loaded")
        check_logit_bias(request, loaded.llama.vocabulary)
        self._check_room(loop)  # before any work
        start = time.perf_counter()
        tokens = await asyncio.to_thread(tokenize, loaded.tokenizer, loaded.context, request)
        format = request.sampling.response_format
        constraints = [
            await asyncio.to_thread(loaded.grammars.start, format) if format else None
            for _ in range(request.sampling.num_return_sequences)
        ]
        mailbox = Mailbox()
        identity = self.identity(request.blend)
        blend = replace(request.blend, weights={self._keys[name]: w for name, w in request.blend.active.items()})
        if blend.low_rank:
            blend = await self._low_rank.blend(identity, blend)
        prompt = Prompt(tokens, blend, identity, request.sampling, loaded.context)
        sequences = [
            Sequence(prompt, index, loaded.eos, loaded.tokenizer, constraint, mailbox.put)
            for index, constraint in enumerate(constraints)
        ]
        self._check_room(loop)  # others may have come meanwhile
        async with aclosing(stream(loop, mailbox, sequences, len(tokens), start)) as chunks:
            async for chunk in chunks:
                yield chunk

    def identity(self, blend: Blend) -> str:
        if self._loaded is None:
            raise NotReady("the model is not loaded")
        digests = {name: self._adapters[self._keys[name]].digest for name in blend.active}
        return blend.identity(self._loaded.identity, digests)

    def stats(self) -> Stats | None:
        loaded, batch, loop = self._loaded, self._batch, self._loop
        if loaded is None or batch is None or loop is None:
            return None
        running = [sequence for sequence in tuple(batch.running) if not sequence.done]
        done = sum(sequence.done for sequence in loop.running)
        return Stats(
            running=len(running),
            waiting=max(0, loop.load - done - len(running)),
            kv_cache_used=sum(sequence.cached for sequence in running) * loaded.token_bytes,
            kv_cache_total=loaded.llama.cells * loaded.token_bytes,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            preemptions=batch.preemptions,
            adapters=len(loaded.llama.adapters),
        )

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        loaded, loop = self._loaded, self._loop
        if loaded is None or loop is None:
            raise NotReady("the model is not loaded")
        assert options.name is not None
        key = options.name
        while key in loaded.llama.adapters:
            key += "'"
        adapter = await in_daemon_thread(lambda: fetch_adapter(key, options, self._base_dir, report))
        loaded.base.check(adapter)
        await asyncio.wrap_future(loop.call(lambda: self._attach(loaded.llama, loaded.base, adapter)))
        old = self._keys.get(options.name)
        self._keys[options.name] = key  # before the old one leaves: requests that come meanwhile use the new one
        await self._retire(old)

    async def unload_adapter(self, name: str) -> None:
        await self._retire(self._keys.pop(name, None))

    async def _retire(self, key: str | None) -> None:
        loop, batch = self._loop, self._batch
        if key is not None and loop is not None and batch is not None:
            self._adapters.pop(key, None)
            await asyncio.wrap_future(loop.call(lambda: batch.retire(key)))

    async def close(self) -> None:
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        if self._loaded is not None:
            self._loaded.llama.close()
        self._loop = self._batch = self._loaded = None

    def _check_room(self, loop: "Loop") -> None:
        """Raises Overloaded."""
        if loop.load >= self._own.max_batch_size + self._own.max_queue:
            raise Overloaded(
                f"{loop.load} texts run or wait already (max_batch_size {self._own.max_batch_size}, max_queue "
                f"{self._own.max_queue}); try again in a moment"
            )


def _room(options: ModelOptions, base: "Base", token_bytes: int) -> tuple[int, int]:
    """The longest context, and how many tokens the KV cache holds; one context or a quarter of what is free, if unset.

    Raises LoadError where it is too small for max_context, or for any text.
    """
    import torch

    from model_compose.engines.huggingface.free import free_memory
    from model_compose.engines.huggingface.memory import size_text

    own = options.options
    assert isinstance(own, LlamacppOptions)
    wished = [limit for limit in (own.max_context, options.max_seq_length) if limit is not None]
    context = min([base.context, *wished])
    free = free_memory(torch.device("cpu"))
    budget = context * token_bytes if free is None else min(context * token_bytes, free // 4)
    if own.kv_cache is not None:
        budget = int(own.kv_cache)
    cells = budget // token_bytes
    least = context if own.max_context is not None else 1
    if cells < least:
        raise LoadError(
            f"a KV cache of {size_text(budget)} holds {cells} tokens of this model, which takes {size_text(token_bytes)} "
            f"for each, and one text needs {least}; set a larger kv_cache, or a smaller max_context"
        )
    if cells < context:
        log.warning(
            "the KV cache of %s holds %d tokens, so prompt and answer together are limited to these instead of %d",
            size_text(budget), cells, context,
        )  # fmt: skip
    return min(context, cells), cells


def _settings(options: ModelOptions, cells: int) -> "Settings":
    import torch

    from model_compose.engines.llamacpp.llama import Settings

    own = options.options
    assert isinstance(own, LlamacppOptions)
    float32 = options.precision == "float32"
    gpu_layers = 0 if options.device == "cpu" else -1 if own.n_gpu_layers is None else own.n_gpu_layers
    return Settings(
        cells=cells, rows=own.max_batch_size, tokens_per_step=own.n_batch,
        threads=own.n_threads or torch.get_num_threads(), gpu_layers=gpu_layers,
        kv_float32=float32, flash_attention=False if float32 and own.flash_attn is None else own.flash_attn,
    )  # fmt: skip
