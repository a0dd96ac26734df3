"""The engine of `driver: llamacpp` with `options.server`: llama-server in a process of its own.

llama-server computes and samples tokens. Prompts, text and the end of a text are handled by the same code as in the
embedded engine. llama-server loads each adapter of the file once, when it starts; every request gives their weights.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from model_compose.daemon import in_daemon_thread
from model_compose.engines import Stats
from model_compose.engines.adapters import check_loaded
from model_compose.engines.llamacpp.completion import ends, refuse
from model_compose.engines.llamacpp.options import LlamacppOptions, find
from model_compose.engines.llamacpp.slots import Slots
from model_compose.engines.llamacpp.writing import Job, Writing
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.engines.prompts import Prompts, check_logit_bias
from model_compose.engines.served.child import inherited
from model_compose.engines.served.connection import Connection
from model_compose.engines.served.engine import ServedEngine
from model_compose.errors import ComposeError, Conflict, InputError, NotReady, RunError
from model_compose.generation import Chunk, Request, Usage
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends, stack
from model_compose.progress import Progress, Report

if TYPE_CHECKING:
    from model_compose.engines.llamacpp.llama import Settings

SOCKET = "llama.sock"
"""A host that ends with .sock makes llama-server listen on a Unix socket. Only this user can open it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerParts:
    """What is known before the server starts.

    identity: of the base's content. eos: the tokens that end a text. adapters: the file's adapters, by name. files: the
    GGUF files of adapters that the server loads. numbers: an adapter's number on the server, which is its place in `files`;
    by the adapter's name, or by the blend's identity for a blend by a low-rank method, which is loaded as one adapter.
    token_bytes: the bytes of one token's keys and values. plain: a token of complete characters.
    """

    base: Path
    identity: str
    tokenizer: Any
    vocabulary: int
    eos: tuple[int, ...]
    context: int
    settings: "Settings"
    adapters: Mapping[str, LoraAdapter]
    numbers: Mapping[str, int]
    files: tuple[Path, ...]
    token_bytes: int
    plain: int


class ServerEngine(ServedEngine):
    """Assigns llama-server's slots and turns to texts, asks it for tokens, and keeps its process running."""

    server = "llama-server"

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        assert isinstance(options.options, LlamacppOptions)
        super().__init__(options, rows=options.options.max_batch_size, queue=options.options.max_queue)
        self._own = options.options
        self._blends, self._base_dir = blends, base_dir
        self._slots = Slots(self._own.max_batch_size)
        self._loaded: ServerParts | None = None
        self._prefix_queries = self._prefix_hits = 0

    async def open(self, report: Report) -> None:
        binary = find(self._own.server or "", self._base_dir)
        self._folder = folder = Path(tempfile.mkdtemp(prefix="model-compose-"))
        try:
            loaded = await in_daemon_thread(lambda: self._load(folder, report))
            self._prompts = Prompts(loaded.tokenizer, loaded.context)
            self._connection = Connection("http://llama-server", socket=folder / SOCKET)
            variables = inherited(os.environ) | self._own.env
            await self._run_server(
                command(binary, loaded, folder / SOCKET), variables, folder / SOCKET, self._connection, self._slots.forget,
                report, patience=self._own.start_timeout,
            )  # fmt: skip
            eos = await ends(self._connection.client)
            self._loaded = replace(loaded, eos=tuple(sorted({*loaded.eos, *eos})))
        except BaseException:
            await self.close()
            raise

    def _load(self, folder: Path, report: Report) -> ServerParts:
        from model_compose.engines.llamacpp.loading import kv_bytes_per_token, read, room, settings
        from model_compose.lora.gguf import write_gguf

        adapters, base, tokenizer = read(self._options, self._base_dir, report)
        context, cells = room(self._options, base, rows=self._own.max_batch_size)
        by_name = {adapter.name: adapter for adapter in adapters}
        digests = {adapter.name: adapter.digest for adapter in adapters}
        served = {**by_name}
        for blend in self._blends.low_rank:
            served[blend.identity(base.identity, digests)] = stack(blend, by_name)
        files = []
        for number, adapter in enumerate(served.values()):
            files.append(folder / f"{number}.gguf")
            write_gguf(adapter, base.architecture, files[-1])
            report(Progress("converting adapters", number + 1, len(served), "adapters"))
        return ServerParts(
            base.file, base.identity, tokenizer, base.vocabulary,
            () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,), context, settings(self._options, cells),
            by_name, {key: number for number, key in enumerate(served)}, tuple(files),
            kv_bytes_per_token(self._options, base), tokenizer("a", add_special_tokens=False)["input_ids"][-1],
        )  # fmt: skip

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        loaded, connection, prompts, sampling = self._loaded, self._connection, self._prompts, request.sampling
        if loaded is None or connection is None or prompts is None:
            raise NotReady("the model is not loaded")
        refuse(sampling)
        check_logit_bias(request, loaded.vocabulary)
        start, unfinished = time.perf_counter(), sampling.num_return_sequences
        with self.room.hold(unfinished, request.place):  # before any work
            tokens = await prompts.read(request)
            identity, left = self.identity(request.blend), loaded.context - len(tokens)
            job = Job(
                connection.client, self._slots, lambda: self.up, loaded.tokenizer, loaded.vocabulary, tokens, sampling,
                identity, _weights(loaded, request.blend, identity), min(sampling.max_output_length or left, left),
                loaded.eos, loaded.plain,
            )  # fmt: skip
            writings = [Writing(job, index) for index in range(unfinished)]
            async with aclosing(self._chunks(writings)) as chunks:
                async for chunk in chunks:
                    unfinished -= chunk.finish is not None
                    if not unfinished:
                        made = sum(len(writing.text.tokens) for writing in writings)
                        usage = Usage(len(tokens), made, time.perf_counter() - start, writings[0].cached)
                        chunk = replace(chunk, usage=usage)
                    yield chunk

    async def _chunks(self, writings: Collection[Writing]) -> AsyncGenerator[Chunk]:
        """Yield the chunks of all texts as they come."""
        items: asyncio.Queue[Chunk | ComposeError] = asyncio.Queue()

        async def run(writing: Writing) -> None:
            try:
                await writing.run(items.put_nowait)
            except Exception as error:
                items.put_nowait(self._failure(error))

        tasks = [asyncio.create_task(run(writing)) for writing in writings]
        try:
            while not all(writing.text.finish for writing in writings) or not items.empty():
                item = await items.get()
                if isinstance(item, ComposeError):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            begun = [writing for writing in writings if writing.has_begun]
            self._prefix_queries += sum(len(writing.prompt) for writing in begun)
            self._prefix_hits += sum(writing.cached for writing in begun)

    def _failure(self, error: Exception) -> ComposeError:
        """The caller's error for an error while a text was generated."""
        if self._closed or isinstance(error, httpx.HTTPError | httpx.StreamError):
            return self._broken()
        if isinstance(error, ComposeError):
            return error
        log.error("a text failed", exc_info=error)
        return RunError(f"llama-server's answer cannot be read ({type(error).__name__}); the log has the details")

    def identity(self, blend: Blend) -> str:
        loaded = self._loaded
        if loaded is None:
            raise NotReady("the model is not loaded")
        check_loaded(blend, loaded.adapters)
        return blend.identity(loaded.identity, {name: loaded.adapters[name].digest for name in blend.active})

    def stats(self) -> Stats | None:
        loaded = self._loaded
        if loaded is None:
            return None
        used = self._slots.used
        return Stats(
            running=len(used), waiting=max(0, self.room.texts - len(used)),
            kv_cache_used=sum(len(slot.tokens) for slot in used) * loaded.token_bytes,
            kv_cache_total=loaded.settings.cells * loaded.settings.rows * loaded.token_bytes,
            prefix_queries=self._prefix_queries, prefix_hits=self._prefix_hits, preemptions=0,
            adapters=len(loaded.adapters),
        )  # fmt: skip

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        raise Conflict("llama-server loads adapters only when it starts; list them in the file")

    async def unload_adapter(self, name: str) -> None:
        """Nothing to do: adapters cannot be loaded while the server runs, and those of the file stay."""

    async def close(self) -> None:
        self._loaded = None
        await super().close()


def _weights(loaded: ServerParts, blend: Blend, identity: str) -> tuple[float, ...]:
    """The weights of all adapters of the server, by number. Raises InputError for a blend by a method that is not one
    of the file's."""
    weights = [0.0] * len(loaded.files)
    if blend.low_rank and identity not in loaded.numbers:
        raise InputError(
            f"the blend {blend.described} is none of the file's, and llama-server has only those with which it started",
            field="blend",
        )
    for name, weight in {identity: 1.0}.items() if blend.low_rank else blend.active.items():
        weights[loaded.numbers[name]] = weight
    return tuple(weights)


def command(binary: Path, loaded: ServerParts, socket: Path) -> list[str]:
    """The server's command line. --cache-ram is off: it stores keys and values of past prompts without noting their
    adapters and loads them into any slot (server_prompt_cache), so a text could get those of another blend."""
    settings = loaded.settings
    flash = {None: "auto", False: "off", True: "on"}[settings.flash_attention]
    kind = "f32" if settings.kv_float32 else "f16"
    given: dict[str, object] = {
        "host": socket,
        "model": loaded.base,
        "ctx-size": settings.cells * settings.rows,
        "parallel": settings.rows,
        "batch-size": settings.tokens_per_step,
        "ubatch-size": settings.ubatch,
        "threads": settings.threads,
        "cache-type-k": kind,
        "cache-type-v": kind,
        "flash-attn": flash,
        "cache-ram": 0,
        "cache-reuse": 0,
        "log-verbosity": 2,  # errors and warnings
    }
    if settings.gpu_layers >= 0:
        given["n-gpu-layers"] = settings.gpu_layers
    if settings.gpu_layers == 0:
        given["device"] = "none"
    if loaded.files:
        given["lora"] = ",".join(map(str, loaded.files))
    flags = ("no-kv-unified", "no-context-shift", "no-webui", "offline", "lora-init-without-apply")
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [str(binary), *options, *(f"--{flag}" for flag in flags)]
