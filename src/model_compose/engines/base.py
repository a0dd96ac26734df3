"""A base class for engines in other packages. It implements all of `Engine` except generating the text.

It suits engines that turn a prompt into pieces of text. An engine that loads adapters overrides more methods.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import ClassVar

from model_compose.engines import Stats
from model_compose.engines.adapters import check_loaded
from model_compose.engines.options import AdapterOptions, ModelOptions, refuse_common, refuse_full_rank, refuse_given
from model_compose.engines.text import StopStrings
from model_compose.errors import Conflict, InputError
from model_compose.generation import Chunk, Finish, Request, Sampling, Usage
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Report
from model_compose.room import Room
from model_compose.schema import Options as NoOptions
from model_compose.sources import describe

OF_MODELS = ("precision", "device", "quantization", "max_seq_length", "allow_runtime_adapters")
"""The keys of a component that an engine must either honour or refuse. (`refuse_common` refuses those that no engine
honours.)"""
OF_REQUESTS = ("logprobs", "response_format", "logit_bias")
"""The fields of `Sampling` that an engine must either honour or refuse. The others only change how a text is drawn and
where it ends."""


class BaseEngine(ABC):
    """An engine to which a subclass adds `write`. A text ends when `write` ends, before a stop string, or after
    max_output_length pieces; every piece counts as one token.

    Options: the class of `options:` in the YAML. rows: the most texts that are written at once. queue: the most further
    texts that may wait. honours: the names from OF_MODELS and OF_REQUESTS that this engine acts on; if a file or a request
    sets any other of these names, it is refused.
    """

    Options: ClassVar[type[NoOptions]] = NoOptions
    needs = None
    rows: ClassVar[int] = 16
    queue: ClassVar[int] = 256
    honours: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> None:
        self.options, self.blends, self.base_dir = options, blends, base_dir
        self.room = Room(self.rows, self.queue)
        self._turns = asyncio.Semaphore(self.rows)

    @abstractmethod
    def write(self, request: Request) -> AsyncGenerator[str]:
        """Yield one text for the request, in pieces of complete characters. The iterator is closed when the client
        leaves."""

    @classmethod
    def refuse(cls, options: ModelOptions) -> None:
        refuse_common(options)
        refuse_full_rank(options)
        given = {key: getattr(options, key) != ModelOptions.model_fields[key].default for key in OF_MODELS}
        remedy = "it does not act on it; leave it out"
        refuse_given(options, {(key,): (is_given, remedy) for key, is_given in given.items() if key not in cls.honours})

    @classmethod  # noqa: B027
    def preflight(cls, options: ModelOptions, adapters: Mapping[str, LoraAdapter], base_dir: Path) -> None:
        """Nothing to look at before the engine opens."""

    async def open(self, report: Report) -> None:  # noqa: B027
        """Nothing to load."""

    async def close(self) -> None:  # noqa: B027
        """Nothing to free."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        self._check(request)
        start, sampling, tokens = time.perf_counter(), request.sampling, 0
        texts = sampling.num_return_sequences
        with self.room.hold(texts, request.place):
            for index in range(texts):
                finish: Finish = "stop"
                stops, length, stopped = StopStrings(sampling.stop_sequences), 0, False
                async with self._turns, aclosing(self.write(request)) as pieces:
                    async for piece in pieces:
                        length += 1
                        ready, stopped = stops.push(piece)
                        if ready:
                            yield Chunk(index, ready)
                        if stopped:
                            break
                        if length == sampling.max_output_length:
                            finish = "length"
                            break
                tokens += length
                usage = Usage(completion_tokens=tokens, seconds=time.perf_counter() - start)
                rest = "" if stopped else stops.flush()
                yield Chunk(index, rest, finish, usage=usage if index == texts - 1 else None)

    def _check(self, request: Request) -> None:
        """Raise InputError for a field that this engine does not act on, and for a chat without a chat template."""
        given, plain = request.sampling, Sampling()
        for name in OF_REQUESTS:
            if name not in self.honours and getattr(given, name) != getattr(plain, name):
                raise InputError(f"driver {self.options.driver} does not act on '{name}'; leave it out", field=name)
        if not isinstance(request.prompt, str) and not self.has_chat_template:
            raise InputError(
                f"driver {self.options.driver} has no chat template; use /v1/completions or task: text-generation",
                field="messages",
            )

    def identity(self, blend: Blend) -> str:
        """A digest of the sources' names. An engine that reads the files should use digests of their content instead."""
        sources = dict(zip(self.options.adapter_names, self.options.peft_adapters, strict=True))
        check_loaded(blend, sources)
        return blend.identity(
            describe(self.options.model), {name: describe(each.model) for name, each in sources.items()}
        )

    @property
    def has_chat_template(self) -> bool:
        return False

    def stats(self) -> Stats | None:
        return None

    async def load_adapter(self, options: AdapterOptions, report: Report) -> None:
        raise Conflict(f"driver {self.options.driver} cannot load adapters while it runs")

    async def unload_adapter(self, name: str) -> None:
        raise Conflict(f"driver {self.options.driver} cannot unload adapters while it runs")
