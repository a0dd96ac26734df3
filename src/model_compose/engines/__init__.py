"""Engines run a base model with blended adapters. Here are the protocols of a driver and of its engine, and the registry.

To add a driver, write a class with the methods of `Engine` and with `Options`, `needs`, `refuse` and `preflight` of
`Driver`, and add a line to ENGINES.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
    """What an engine is doing now, and what it has done since it was opened.

    running, waiting: numbers of texts; waiting includes runs that have a place but no text yet. kv_cache_used: bytes
    held by running texts. kv_cache_prefixes: further bytes held by the prefix cache, which gives them up when texts
    need them; None if the engine does not report this. kv_cache_total: the bytes of both together at most.
    prefix_queries, prefix_hits: prompt tokens that were looked up in the prefix cache, and found there.
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
    """Runs one base model with its adapters. It is opened once and then serves as many requests at once as `room`
    admits."""

    room: Room

    async def open(self, report: Report) -> None:
        """Fetch and load everything. Raises SourceError, AdapterError or LoadError."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """Yield the text while it is generated. Closing the iterator stops the computation within one token.

        Raises InputError (prompt too long, no chat template) or RunError, and Overloaded if the request has no place
        yet and the room is full.
        """

    def identity(self, blend: Blend) -> str:
        """The blend's identity: a digest of the base, the adapters' contents, the weights and the method."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the base has a chat template; False before it is loaded and after it is closed."""

    def stats(self) -> Stats | None:
        """The current numbers; None before the engine is loaded and after it is closed. Any thread may call this; it does
        not block."""

    async def load_adapter(self, options: "AdapterOptions", report: Report) -> None:
        """Load an adapter under options.name while requests run, or replace the one with this name. Requests that use the
        old adapter finish with it. Raises SourceError, AdapterError or Conflict."""

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter. It is freed as soon as no running request uses it."""

    async def close(self) -> None: ...


class Driver(Protocol):
    """What `driver:` in a YAML file names: a callable that makes an engine. An engine's class can be the driver itself."""

    @property
    def Options(self) -> type[Options]:
        """The class of the component's `options`."""

    @property
    def needs(self) -> "Callable[..., tuple[Needs, ...]] | None":
        """A function for `plan`: (options, blueprint, adapters, checkpoint, devices) -> what each device must hold, the
        base's device first. None for a driver that decides by itself how much memory it takes."""

    def refuse(self, options: "ModelOptions", /) -> None:
        """Raise ValueError for an option that is valid but that this driver cannot honour. The error names the option and
        what would work."""

    def preflight(self, options: "ModelOptions", adapters: Mapping[str, LoraAdapter], base_dir: Path, /) -> None:
        """Raises LoadError for what this machine shows to be wrong before anything is loaded: a program that is not there,
        or adapters that do not suit the options. The error's `at` starts in the component's `options`.

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
    ("Options", "needs", "refuse", "preflight"),
)
