"""Engines: what runs a base model with blended adapters. The protocols of a driver and its engine, and the registry.

A new driver is one file and its line in ENGINES: a class that has the methods of `Engine`, and `Options`, `refuse` and
`needs` of `Driver`.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from model_compose.errors import Keys, LoadError
from model_compose.generation import Chunk, Request
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Report
from model_compose.registry import Registry
from model_compose.room import Room
from model_compose.schema import Options

if TYPE_CHECKING:
    from model_compose.engines.needs import Needs
    from model_compose.engines.options import AdapterOptions, ModelOptions


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since it was opened.

    running and waiting count texts (waiting: also runs that have a place and no text yet), kv_cache_* bytes, prefix_*
    prompt tokens. kv_cache_used: what running texts hold. kv_cache_prefixes: what the prefix cache keeps besides, in the
    same total; it gives way to texts. None where the engine does not tell.
    """

    running: int
    waiting: int
    kv_cache_used: int
    kv_cache_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    adapters: int
    kv_cache_prefixes: int | None = None


class Engine(Protocol):
    """Runs one base model with its adapters. Opened once, then serves as many requests at once as its room has places."""

    room: Room

    async def open(self, report: Report) -> None:
        """Fetches and loads everything. Raises SourceError, AdapterError, LoadError."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The text as it is made. Closing the iterator stops the computation within one token.

        Raises InputError (prompt too long, no chat template), RunError, and Overloaded for a request without a place where
        the room has none left.
        """

    def identity(self, blend: Blend) -> str:
        """The blend's digest over base, adapter contents, weights and method."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the base brings one; False before it is loaded and once it is closed."""

    def stats(self) -> Stats | None:
        """As of now, from any thread, without waiting; None before it is loaded and once it is closed."""

    async def load_adapter(self, options: "AdapterOptions", report: Report) -> None:
        """One more adapter under options.name, or another one in its place, while requests run; those that use the old one
        finish on it. Raises SourceError, AdapterError, Conflict."""

    async def unload_adapter(self, name: str) -> None:
        """Frees an adapter as soon as no running request uses it."""

    async def close(self) -> None: ...


class Driver(Protocol):
    """What a file's `driver:` names. Called, it makes an engine; an engine's class is a driver itself."""

    @property
    def Options(self) -> type[Options]:
        """The class of the component's `options`."""

    @property
    def needs(self) -> "Callable[..., tuple[Needs, ...]] | None":
        """The arithmetic of `plan`: (options, blueprint, adapters, checkpoint, devices) -> what each device must hold, the
        base's first. None for a driver that takes its memory by itself."""

    def refuse(self, options: "ModelOptions", /) -> None:
        """Raises ValueError for a valid option that this driver cannot honour; it names the option and what would work."""

    def preflight(
        self, options: "ModelOptions", adapters: Mapping[str, LoraAdapter], base_dir: Path, /
    ) -> Iterable[tuple[Keys, LoadError]]:
        """What this machine shows to be wrong before anything is loaded, each with its keys under `options`: a program that
        is not there, or adapters that do not suit the options.

        adapters: those whose files are here, by name; their tensors may be on the meta device. Must not import torch.
        """

    def __call__(self, options: "ModelOptions", blends: Blends, base_dir: Path) -> Engine: ...


ENGINES: Registry[Driver] = Registry(
    "driver",
    "model_compose.engines",
    {
        "huggingface": "model_compose.engines.huggingface.engine:HuggingfaceEngine",
        "vllm": "model_compose.engines.vllm.engine:VllmEngine",
        "llamacpp": "model_compose.engines.llamacpp:DRIVER",
    },
)
