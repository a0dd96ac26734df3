"""Engines: what runs a base model with blended adapters. The protocol, the options that all share, and the registry.

A new engine is one file here plus its line in ENGINES: a class with the methods of `Engine` and its own `Options`.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from model_compose.engines.blends import BlendOptions, to_blend, weights_of
from model_compose.generation import Chunk, Request
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Report
from model_compose.registry import Registry
from model_compose.room import Room
from model_compose.schema import Options, Weight
from model_compose.sources import ModelSource
from model_compose.sources.confine import SourcePatterns

Precision = Literal["auto", "float32", "float16", "bfloat16"]


def _kind(value: Any) -> Any:
    """The dialect's long form, {type: int8}, as the short one."""
    return value["type"] if isinstance(value, dict) and value.keys() == {"type"} else value


Quantization = Annotated[Literal["int8", "int4", "nf4", "fp4"], BeforeValidator(_kind)]


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

    Options: ClassVar[type[Options]]
    room: Room

    def __init__(self, options: "ModelOptions", blends: Blends, base_dir: Path) -> None: ...

    @classmethod
    def refuse(cls, options: "ModelOptions") -> None:
        """Raises ValueError for a valid option that this driver cannot honour; it names the option and what would work."""

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


ENGINES: Registry[type[Engine]] = Registry(
    {
        "huggingface": "model_compose.engines.huggingface:HuggingfaceEngine",
        "vllm": "model_compose.engines.vllm:VllmEngine",
        "llamacpp": "model_compose.engines.llamacpp:LlamacppEngine",
    }
)


class AdapterOptions(Options):
    """One LoRA adapter of the default blend. precision and device default to the base's."""

    type: Literal["lora"] = Field(description="The kind of adapter; LoRA is the only one")
    name: str | None = Field(
        default=None, min_length=1, description="The name that blends use; peft_adapter_<i> if unset"
    )
    model: ModelSource = Field(description="Where the weights come from: org/name of the Hub, a path, or a mapping")
    weight: Weight = Field(default=1.0, description="Its weight in the default blend; may be 0, negative, or above 1")
    precision: Precision = Field(
        default="auto", description="The dtype that the adapter computes in; auto is the base's"
    )
    device: str | None = Field(default=None, description="The device that computes the adapter; the base's if unset")
    quantization: SkipJsonSchema[Any] = None
    low_cpu_mem_usage: bool = Field(default=False, description="Accepted for files of the original; no effect")

    @field_validator("name")
    @classmethod
    def _no_colon(cls, name: str | None) -> str | None:
        if name is not None and ":" in name:
            raise ValueError(f"an adapter's name holds no ':', which separates component and blend; got '{name}'")
        return name

    @field_validator("quantization")
    @classmethod
    def _no_quantization(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("adapters are never quantised; remove 'quantization', or set precision: float16")
        return value


class ModelOptions(Options):
    """What every driver is told about its model."""

    id: str = Field(
        default="__component__",
        description="The name by which jobs and clients choose this component; `default` on /v1 if unset",
    )
    driver: str = Field(default="huggingface", description="What runs the model: huggingface, vllm or llamacpp")
    model: ModelSource = Field(description="Where the weights come from: org/name of the Hub, a path, or a mapping")
    precision: Precision = Field(
        default="auto",
        description="The dtype of the weights. auto is the checkpoint's own on an accelerator; on a CPU it is bfloat16 where "
        "the processor computes that natively, else float32",
    )
    device: str = Field(default="auto", description="cpu, cuda or cuda:1; auto takes an accelerator if there is one")
    device_mode: Literal["auto", "single"] = Field(
        default="auto", description="Accepted for files of the original; the model is on one device either way"
    )
    quantization: Quantization | None = Field(
        default=None,
        description="How the base's weights are stored: int8 or int4 on a CPU; int8, nf4 or fp4 on CUDA. Adapters stay exact",
    )
    max_seq_length: int | None = Field(
        default=None, ge=1, description="Longest prompt plus answer, in tokens; the model's own context if unset"
    )
    fast_tokenizer: bool = Field(default=True, description="Must stay true: streaming needs the fast tokenizer")
    low_cpu_mem_usage: bool = Field(
        default=False, description="Accepted for files of the original; weights are always loaded one by one"
    )
    preload: bool = Field(default=True, description="Must stay true: models load when the service starts")
    on_demand: Any = Field(default=False, description="Must stay false: models stay loaded")
    runtime_spec: Any = Field(default=None, description="Must stay unset: it would have no effect")
    peft_adapters: tuple[AdapterOptions, ...] = Field(
        default=(), description="The adapters; their weights form the default blend"
    )
    blends: dict[str, BlendOptions] = Field(
        default_factory=dict,
        description="Named blends: {adapter: weight} for the exact sum, or {method, weights, …} for an approximate method",
    )
    allow_runtime_adapters: bool = Field(
        default=False, description="Whether clients may load and unload adapters through /v1"
    )
    runtime_adapter_sources: SourcePatterns = Field(
        default=("./",),
        description="What clients may load: folders with everything below them, and repositories of the Hub (org/name, "
        "org/*); the folder of the file if unset",
    )
    options: SerializeAsAny[Options] = Field(
        default_factory=Options, validate_default=True, description="Options of the driver"
    )

    @field_validator("driver")
    @classmethod
    def _known_driver(cls, driver: str) -> str:
        if driver not in ENGINES:
            raise ValueError(f"unknown driver '{driver}'; available: {', '.join(ENGINES)}")
        return driver

    @field_validator("options", mode="before")
    @classmethod
    def _options_of_the_driver(cls, value: Any, info: ValidationInfo) -> Any:
        driver = info.data.get("driver")
        if driver is None:  # the driver itself was wrong, and is reported
            return Options()
        return ENGINES[driver].Options.model_validate({} if value is None or value == Options() else value)

    @model_validator(mode="after")
    def _sources_are_for_runtime_adapters(self) -> Self:
        if "runtime_adapter_sources" in self.model_fields_set and not self.allow_runtime_adapters:
            raise ValueError(
                "'runtime_adapter_sources' has no effect without allow_runtime_adapters: true; set that, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        for name in (*self.adapter_names, *self.blends):
            if name in seen:
                raise PydanticCustomError(
                    "duplicate_name",
                    "the name '{key}' is used twice; adapters and blends of a component share one namespace",
                    {"key": name},
                )
            if name == "default":
                raise PydanticCustomError(
                    "name", "the name '{key}' is taken by the blend of the adapters' own weights", {"key": name}
                )
            if ":" in name:
                raise PydanticCustomError("name", "a blend's name holds no ':'; got '{key}'", {"key": name})
            seen.add(name)
        for blend, written in self.blends.items():
            for adapter in weights_of(written):
                if adapter not in self.adapter_names:
                    raise PydanticCustomError(
                        "unknown_adapter",
                        "blend '{blend}' names the unknown adapter '{key}'; known: {known}",
                        {"blend": blend, "key": adapter, "known": ", ".join(self.adapter_names) or "none"},
                    )
        ENGINES[self.driver].refuse(self)
        return self

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(adapter.name or f"peft_adapter_{index}" for index, adapter in enumerate(self.peft_adapters))

    @property
    def chats(self) -> bool:
        """Whether its task needs the base's chat template."""
        return False

    def to_blends(self) -> Blends:
        """The vocabulary of blends: the adapters, the named blends, and the default from the adapters' weights."""
        weights = {name: adapter.weight for name, adapter in zip(self.adapter_names, self.peft_adapters, strict=True)}
        named = {name: to_blend(name, written) for name, written in self.blends.items()}
        return Blends(self.adapter_names, named, Blend(weights, "default"))
