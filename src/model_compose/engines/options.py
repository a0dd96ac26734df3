"""The options of a model in the YAML file that are the same for every driver: `ModelOptions` and `AdapterOptions`.

Each driver has a class of its own for the key `options`, beside the driver's code.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from model_compose.engines import ENGINES
from model_compose.engines.blends import BlendOptions, ByMethod, to_blend, weights_of
from model_compose.errors import Keys
from model_compose.lora.blend import Blend, Blends
from model_compose.schema import AnyOf, Named, Options, Weight, invalid
from model_compose.sources import ModelSource
from model_compose.sources.confine import SourcePatterns

Precision = Literal["auto", "float32", "float16", "bfloat16"]


def _kind(value: Any) -> Any:
    """Turn the dialect's long form, {type: int8}, into the short one, int8."""
    return value["type"] if isinstance(value, dict) and value.keys() == {"type"} else value


Quantization = Annotated[Literal["int8", "int4", "nf4", "fp4"], BeforeValidator(_kind)]


class AdapterOptions(Options):
    """One LoRA adapter, with its weight in the default blend. precision and device default to the base's."""

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
            raise invalid(f"an adapter's name must not contain ':', which separates component and blend; got '{name}'")
        return name

    @field_validator("quantization")
    @classmethod
    def _no_quantization(cls, value: Any) -> Any:
        if value is not None:
            raise invalid("adapters are never quantised; remove 'quantization', or set precision: float16")
        return value


class ModelOptions(Named):
    """The keys of a model component that every driver gets."""

    driver: str = Field(default="huggingface", description="What runs the model: huggingface, vllm or llamacpp")
    model: ModelSource = Field(description="Where the weights come from: org/name of the Hub, a path, or a mapping")
    precision: Precision = Field(
        default="auto",
        description="The dtype of the weights. auto is the checkpoint's own on an accelerator; on a CPU it is bfloat16 "
        "where the processor computes that natively, else float32",
    )
    device: str = Field(default="auto", description="cpu, cuda or cuda:1; auto takes an accelerator if there is one")
    device_mode: Literal["auto", "single"] = Field(
        default="auto", description="Accepted for files of the original; the model is on one device either way"
    )
    quantization: Quantization | None = Field(
        default=None,
        description="How the base's weights are stored: int8 or int4 on a CPU; int8, nf4 or fp4 on CUDA. "
        "Adapters stay exact",
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
    options: Annotated[SerializeAsAny[Options], AnyOf(lambda: [each.Options for each in ENGINES.usable.values()])] = (
        Field(default_factory=Options, validate_default=True, description="Options of the driver")
    )

    @field_validator("driver")
    @classmethod
    def _known_driver(cls, driver: str) -> str:
        if driver not in ENGINES:
            raise invalid(f"unknown driver '{driver}'; available: {', '.join(ENGINES)}")
        ENGINES[driver]  # imports it here, so that a package that cannot be imported is an error of this key
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
            raise invalid(
                "'runtime_adapter_sources' has no effect without allow_runtime_adapters: true; set that, or leave it out",
                "runtime_adapter_sources",
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        seen: set[str] = set()
        adapters = [(name, ("peft_adapters", index, "name")) for index, name in enumerate(self.adapter_names)]
        for name, at in (*adapters, *((blend, ("blends", blend)) for blend in self.blends)):
            if name in seen:
                raise invalid(
                    f"the name '{name}' is used twice; adapters and blends of a component share one namespace", *at
                )
            if name == "default":
                raise invalid(f"the name '{name}' is reserved for the blend of the adapters' own weights", *at)
            if ":" in name:
                raise invalid(f"a blend's name must not contain ':'; got '{name}'", *at)
            seen.add(name)
        for blend, written in self.blends.items():
            for adapter in weights_of(written):
                if adapter not in self.adapter_names:
                    known = ", ".join(self.adapter_names) or "none"
                    within = ("weights", adapter) if isinstance(written, ByMethod) else (adapter,)
                    raise invalid(
                        f"blend '{blend}' names the unknown adapter '{adapter}'; known: {known}",
                        "blends",
                        blend,
                        *within,
                    )
        ENGINES[self.driver].refuse(self)
        return self

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of peft_adapters, in the file's order; adapters without a name are called peft_adapter_<i>."""
        return tuple(adapter.name or f"peft_adapter_{index}" for index, adapter in enumerate(self.peft_adapters))

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code from the model's repository may run; False for a driver without this option."""
        return "trust_remote_code" in type(self.options).model_fields and bool(
            self.options.model_dump(include={"trust_remote_code"})["trust_remote_code"]
        )

    @property
    def chats(self) -> bool:
        """Whether its task needs the base's chat template."""
        return False

    def to_blends(self) -> Blends:
        """The blends that requests may name: single adapters, the named blends, and the default blend of the adapters'
        weights."""
        weights = {name: adapter.weight for name, adapter in zip(self.adapter_names, self.peft_adapters, strict=True)}
        named = {name: to_blend(name, written) for name, written in self.blends.items()}
        return Blends(self.adapter_names, named, Blend(weights, "default"))


def refuse_given(options: ModelOptions, refused: Mapping[Keys, tuple[bool, str]]) -> None:
    """Raise ValueError for the first option that is given but that the driver cannot honour.

    refused: for each option, by its keys: whether it is given, and what to do instead.
    """
    for keys, (given, remedy) in refused.items():
        if given:
            name = ".".join(key for key in keys if isinstance(key, str) and key != "options")
            raise invalid(f"driver {options.driver} cannot honour '{name}': {remedy}", *keys)


def refuse_common(options: ModelOptions) -> None:
    """Raise ValueError for an option that no driver can honour."""
    refuse_given(
        options,
        {
            ("fast_tokenizer",): (not options.fast_tokenizer, "streaming needs the fast tokenizer; leave it out"),
            ("preload",): (not options.preload, "models load when the service starts; leave it out"),
            ("on_demand",): (bool(options.on_demand), "models stay loaded; leave it out"),
            ("runtime_spec",): (options.runtime_spec is not None, "it would have no effect; leave it out"),
        },
    )


def refuse_full_rank(options: ModelOptions) -> None:
    """Raise ValueError for a blend of full rank. For drivers that can only load LoRAs."""
    if blends := options.to_blends().full_rank:
        raise invalid(
            f"driver {options.driver} cannot honour the blend {blends[0].described}, which has full rank and is not a "
            "LoRA: use driver: huggingface, or serve the model that `model-compose export --format merged` writes",
            "blends", blends[0].name or "",
        )  # fmt: skip
