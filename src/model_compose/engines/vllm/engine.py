"""The engine of `driver: vllm`: vLLM in a process of its own, or a vLLM server that already runs.

vLLM gets every blend as one stacked adapter, which is written and loaded when a request first uses the blend.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import httpx

from model_compose.daemon import in_daemon_thread
from model_compose.engines import Stats
from model_compose.engines.adapters import check_loaded, fetch_adapter
from model_compose.engines.devices import main_memory
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.engines.prompts import Prompts, check_logit_bias
from model_compose.engines.served.compiled import Compiled
from model_compose.engines.served.engine import ServedEngine
from model_compose.engines.sizes import context_length
from model_compose.engines.vllm.connection import Connection, Served
from model_compose.engines.vllm.loading import (
    BaseDescription,
    check_adapter,
    check_rank,
    choose_rank,
    dtype_name,
    kv_bytes_per_token,
    load,
    zero_adapter,
)
from model_compose.engines.vllm.options import VllmOptions, refuse
from model_compose.engines.vllm.server import RANKS, Installed, Settings, command, cores, environment, find, interpreter
from model_compose.engines.vllm.stream import Prompt, Text, complete
from model_compose.errors import (
    AdapterError,
    ComposeError,
    Conflict,
    InputError,
    LoadError,
    NotReady,
    RunError,
)
from model_compose.generation import Chunk, Request, Usage
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Progress, Report
from model_compose.schema import Options
from model_compose.sources.local import absolute

METRICS_SECONDS = 2.0
SOCKET = "server"
DEFAULT_KV_CACHE = 4 << 30
"""Bytes of the KV cache on a CPU, where vLLM would take nearly all memory; half of the free memory if that is less."""


class VllmEngine(ServedEngine):
    """Tokenizes prompts, has blends loaded as stacked adapters, asks vLLM for tokens, and keeps its process running."""

    Options: ClassVar[type[Options]] = VllmOptions
    needs = None  # vLLM divides its own memory
    refuse = staticmethod(refuse)
    server = "vLLM"

    @classmethod
    def preflight(cls, options: ModelOptions, adapters: Mapping[str, LoraAdapter], base_dir: Path) -> None:
        own = options.options
        assert isinstance(own, VllmOptions)
        if own.python:
            interpreter(own.python, base_dir)
        if len(adapters) == len(options.peft_adapters):
            choose_rank(options.to_blends(), adapters, own.max_lora_rank)

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        assert isinstance(options.options, VllmOptions)
        super().__init__(options, rows=options.options.max_batch_size, queue=options.options.max_queue)
        self._own = options.options
        self._blends, self._base_dir = blends, base_dir
        self._loaded: BaseDescription | None = None
        self._adapters: dict[str, LoraAdapter] = {}
        self._connection: Connection | None = None
        self._compiled: Compiled | None = None
        self._served = Served("", 0)
        self._zero: LoraAdapter | None = None
        """An adapter of zeros, for requests without an adapter. On a CPU, vLLM (0.32) wrongly applies the last slot's
        adapter to rows that have none, if other rows of the batch have one."""
        self._max_rank = 0
        self._dtype = ""
        self._stats: Stats | None = None
        self._measuring: asyncio.Task[None] | None = None

    @property
    def _takes_adapters(self) -> bool:
        """Whether vLLM is started with LoRA, which takes memory and time."""
        return bool(self._options.peft_adapters or self._own.max_lora_rank or self._own.base_url)

    @property
    def _slots(self) -> int:
        """The number of adapters that vLLM must hold at once: max_loras, and the adapter of zeros if there is one."""
        return self._own.max_loras + (self._zero is not None)

    async def open(self, report: Report) -> None:
        own = self._own
        installed = None if own.base_url else await find(own.python, self._base_dir)
        try:
            loaded, self._adapters = await in_daemon_thread(lambda: self._load(report))
            self._loaded = loaded
            unset = None if installed else RANKS[-1]  # another server does not tell its limit
            if self._takes_adapters and (installed is None or installed.on_cpu):
                self._zero = zero_adapter(self._adapters.values(), loaded.shapes)
            self._max_rank = choose_rank(self._blends, self._adapters, own.max_lora_rank or unset)
            shared = absolute(own.adapter_folder, self._base_dir) if own.adapter_folder else None
            self._folder = Path(tempfile.mkdtemp(prefix="model-compose-", dir=shared))
            if installed is None:
                key = own.api_key.get_secret_value() if own.api_key else None
                self._connection = Connection(own.base_url or "", api_key=key)
            else:
                await self._start(installed, loaded, self._folder, report)
            await self._attach(loaded, report)
        except BaseException:
            await self.close()
            raise

    def _load(self, report: Report) -> tuple[BaseDescription, dict[str, LoraAdapter]]:
        own = self._own
        return load(self._options, self._base_dir, report, weights=own.base_url is None)

    async def _start(self, installed: Installed, loaded: BaseDescription, folder: Path, report: Report) -> None:
        own, options = self._own, self._options
        limits = [limit for limit in (own.max_context, options.max_seq_length) if limit is not None]
        socket = folder / SOCKET
        self._dtype = dtype_name(options.precision, loaded.config, on_cpu=installed.on_cpu)
        settings = Settings(
            socket=socket,
            model=loaded.base.folder,
            dtype=self._dtype,
            context=context_length(loaded.config, *limits) if limits else None,
            rows=own.max_batch_size,
            lora=(self._slots, self._max_rank) if self._takes_adapters else None,
            kv_cache=_kv_cache(own.kv_cache, on_cpu=installed.on_cpu),
            prefix_cache=own.prefix_cache,
            trust_remote_code=options.trust_remote_code,
        )
        self._connection = Connection("http://vllm", socket=socket)
        variables = environment(installed, os.environ, cores(), own.env)
        await self._run_server(
            command(installed, settings), variables, socket, self._connection, self._forget_adapters, report,
            patience=own.start_timeout,
        )  # fmt: skip

    async def _attach(self, loaded: BaseDescription, report: Report) -> None:
        """Connect to the running server, and load every adapter once, so that one that vLLM refuses is found now.

        Raises LoadError or AdapterError.
        """
        connection, own = self._connection, self._own
        assert connection is not None
        assert self._folder is not None
        served = await connection.served()
        limits = (served.context, own.max_context, self._options.max_seq_length)
        self._served = Served(served.name, min(limit for limit in limits if limit is not None))
        self._prompts = Prompts(loaded.tokenizer, self._served.context)
        self._compiled = Compiled(self._folder, self._slots, connection.load, connection.unload)
        for number, name in enumerate(self._adapters):
            report(Progress("attaching adapters", number, len(self._adapters), "adapters"))
            await self._try(name, self._adapters)
        if self._blends.default.active:
            async with self._model(self._blends.default):
                pass
        report(Progress("attaching adapters", len(self._adapters), len(self._adapters), "adapters"))
        await self._measure(loaded)
        self._measuring = asyncio.create_task(self._keep_measuring(loaded))

    async def _try(self, name: str, adapters: Mapping[str, LoraAdapter]) -> None:
        """Load the adapter once. Raises AdapterError if vLLM refuses it."""
        blend, compiled = Blend({name: 1.0}, name), self._compiled
        assert compiled is not None
        try:
            async with compiled.use(self._identity(blend, adapters), blend, adapters):
                pass
        except (AdapterError, InputError) as error:
            raise AdapterError(f"adapter '{name}': {error}") from error
        except httpx.TransportError as error:
            raise LoadError(
                f"vLLM ended while it loaded the adapter '{name}' ({error}); its log has the details"
            ) from error

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        loaded, connection, prompts = self._loaded, self._connection, self._prompts
        if loaded is None or connection is None or prompts is None or self._compiled is None:
            raise NotReady("the model is not loaded")
        sampling = request.sampling
        check_logit_bias(request, loaded.vocabulary)
        start, unfinished, last = time.perf_counter(), sampling.num_return_sequences, Chunk()
        with self.room.hold(unfinished, request.place):  # before any work
            tokens = await prompts.read(request)
            try:
                async with self._model(request.blend) as model:
                    prompt = Prompt(model, tokens, sampling, prompts.context - len(tokens), loaded.eos)
                    texts = [Text(index, prompt, loaded.tokenizer) for index in range(unfinished)]
                    async with aclosing(complete(connection.client, prompt, texts)) as items:
                        async for item in items:
                            if isinstance(item, int):
                                made = sum(len(text.tokens) for text in texts)
                                usage = Usage(len(tokens), made, time.perf_counter() - start, item)
                                yield replace(last, usage=usage)
                                continue
                            unfinished -= item.finish is not None
                            if unfinished:
                                yield item
                            last = item
            except (httpx.HTTPError, httpx.StreamError, RunError) as error:
                raise self._failure(error) from error
            except RuntimeError as error:  # httpx's, of a client that has been closed meanwhile
                if self._closed:
                    raise self._failure(error) from error
                raise

    @asynccontextmanager
    async def _model(self, blend: Blend) -> AsyncGenerator[str]:
        """Yield the server's model id for the blend, which stays loaded within the block.

        Raises InputError, AdapterError or NotReady.
        """
        compiled, adapters = self._compiled, self._adapters
        assert compiled is not None
        if not self.up:
            raise NotReady("vLLM has ended and is being started again; try again in a moment")
        identity = self._identity(blend, adapters)
        if not blend.active:
            if self._zero is None:
                yield self._served.name
                return
            blend, adapters = Blend({self._zero.name: 1.0}), {self._zero.name: self._zero}
        check_rank(blend, adapters, self._max_rank)
        async with compiled.use(identity, blend, adapters) as name:
            try:
                yield name
            except NotReady:  # the server at base_url may have been restarted, and has then lost the adapter
                compiled.forget(identity)
                raise

    def _failure(self, error: Exception) -> ComposeError:
        """The caller's error for a broken connection, or for an answer that vLLM gave up."""
        if isinstance(error, RunError) and not self._closed:
            return error
        return self._broken()

    def identity(self, blend: Blend) -> str:
        return self._identity(blend, self._adapters)

    def _identity(self, blend: Blend, adapters: Mapping[str, LoraAdapter]) -> str:
        if self._loaded is None:
            raise NotReady("the model is not loaded")
        check_loaded(blend, adapters)
        return blend.identity(self._loaded.base.identity, {name: adapters[name].digest for name in blend.active})

    def stats(self) -> Stats | None:
        return self._stats

    async def _keep_measuring(self, loaded: BaseDescription) -> None:
        while True:
            await asyncio.sleep(METRICS_SECONDS)
            if self.up:
                await self._measure(loaded)

    async def _measure(self, loaded: BaseDescription) -> None:
        assert self._connection is not None
        with suppress(httpx.HTTPError, ValueError):  # keep the last numbers
            per_token = kv_bytes_per_token(loaded.config, self._dtype)
            self._stats = await self._connection.stats(per_token, len(self._adapters))

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        loaded = self._loaded
        if loaded is None or self._compiled is None:
            raise NotReady("the model is not loaded")
        name = options.name
        assert name is not None
        if options.device is not None or options.precision != "auto":
            raise InputError(
                "vllm computes adapters on the base's device and in its dtype; remove device and precision"
            )
        if not self._takes_adapters:
            raise Conflict("vLLM was started without room for adapters; set options.max_lora_rank")
        adapter = await in_daemon_thread(lambda: fetch_adapter(name, options, self._base_dir, report))
        adapter = check_adapter(adapter, loaded.shapes)
        adapters = {**self._adapters, name: adapter}
        check_rank(Blend({name: 1.0}, name), adapters, self._max_rank)
        await self._try(name, adapters)
        self._adapters = adapters  # a new mapping: running requests keep the old one

    async def unload_adapter(self, name: str) -> None:
        self._adapters = {each: adapter for each, adapter in self._adapters.items() if each != name}

    async def close(self) -> None:
        self._closed, self._stats, self._loaded = True, None, None
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait([self._measuring])
            self._measuring = None
        if self._child is None and self._connection is not None and self._compiled is not None:
            for name in self._compiled.names:
                with suppress(httpx.HTTPError):
                    await self._connection.unload(name)
        await super().close()

    def _forget_adapters(self) -> None:
        """Before each start: a new server has no adapters."""
        if self._compiled is not None:
            self._compiled.clear()


def _kv_cache(given: int | None, *, on_cpu: bool) -> int | None:
    """Bytes for keys and values; None leaves it to vLLM, which measures what a card has free."""
    if given is not None or not on_cpu:
        return given
    free = main_memory()
    return DEFAULT_KV_CACHE if free is None else min(DEFAULT_KV_CACHE, free // 2)
