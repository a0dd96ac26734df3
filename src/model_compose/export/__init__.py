"""Writes one component's blend to disk, as a PEFT adapter, a merged model, or a GGUF file.

Each format is a function in a file of its own. This file finds the component and the blend, fetches the base and the
adapters, checks that they fit, and calls the format's function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.config import Config
from model_compose.engines.options import ModelOptions, Precision
from model_compose.errors import InputError
from model_compose.export.destination import atomic
from model_compose.loading import ComposeFile
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blend
from model_compose.lora.peft_config import CONFIG_FILE
from model_compose.progress import Report, silent
from model_compose.registry import Registry
from model_compose.sources import Fetched, HuggingfaceSource, describe, fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARD_SIZE = 5 * 10**9
"""Bytes in a shard of a merged model. This was transformers' default for years, and the Hub's viewers are made for it."""


@dataclass(frozen=True)
class Order:
    """What the user asks to export.

    component: a model component's id; may be None if the file has only one. blend: as in a request, a name or
    {adapter: weight}; None is the default blend. precision: the dtype to write; "auto" keeps the base's dtype, and writes
    adapters in float32. shard_size: bytes.
    """

    format: str
    output: Path
    component: str | None = None
    blend: Any = None
    precision: Precision = "auto"
    shard_size: int | None = None


@dataclass(frozen=True)
class Source:
    """Where an adapter came from. identity: as in `Fetched`; it stands for the content."""

    name: str
    identity: str


@dataclass(frozen=True)
class Export:
    """A blend, with everything that a format needs to write it.

    adapters: the adapters whose weight is not 0, checked against the base. sources: where they came from. base: all of the
    base's files, or only its configs if the format needs no weights. model: the base on the meta device (shapes, no data).
    """

    options: ModelOptions
    blend: Blend
    adapters: Mapping[str, LoraAdapter]
    sources: Mapping[str, Source]
    base: Fetched
    model: "PreTrainedModel"
    order: Order

    @property
    def base_name(self) -> str:
        """The base's name in messages and cards."""
        return describe(self.options.model)

    @property
    def identity(self) -> str:
        """The blend's identity, as in responses: a digest of the base, the adapters' contents, the weights and the
        method."""
        return self.blend.identity(self.base.identity, {name: a.digest for name, a in self.adapters.items()})

    @property
    def dtype(self) -> "torch.dtype | None":
        """The dtype to write; None keeps the dtype of each tensor."""
        import torch

        found: torch.dtype | None = None if self.order.precision == "auto" else getattr(torch, self.order.precision)
        return found


@dataclass(frozen=True)
class Format:
    """A format in which a blend can be written.

    write(export, path, report): creates the folder or file `path`, which does not exist before. weights: whether it needs
    the base's weights. file: the suffix, if it writes a single file; None if it writes a folder. sharded: whether it takes
    shard_size. refuse(options): called before anything is fetched; raises InputError for a base that it cannot write.
    """

    write: Callable[[Export, Path, Report], None]
    weights: bool = False
    file: str | None = None
    sharded: bool = False
    refuse: Callable[[ModelOptions], None] = lambda options: None


FORMATS: Registry[Format] = Registry(
    "export format",
    "model_compose.formats",
    {
        "peft": "model_compose.export.peft:FORMAT",
        "merged": "model_compose.export.merged:FORMAT",
        "gguf": "model_compose.export.gguf:ADAPTER",
        "gguf-merged": "model_compose.export.gguf:MERGED",
    },
    ("write", "weights", "file", "sharded", "refuse"),
)


def export(loaded: ComposeFile, order: Order, report: Report = silent) -> None:
    """Write what `order` asks for. If anything fails, nothing is left at the destination. Blocks until it is done.

    Raises InputError (the order is wrong, or its destination cannot be written), SourceError, AdapterError or LoadError.
    """
    format = _format(order)
    options = _component(loaded.config, order.component)
    blend = options.to_blends().resolve(order.blend, place="--blend")
    if not blend.active and not format.weights:
        raise InputError(
            f"--format {order.format}: the blend has no adapter with a weight other than 0, so there is nothing to "
            "write; choose another --blend"
        )
    format.refuse(options)
    with atomic(order.output) as path:
        format.write(_gather(loaded, options, blend, order, format, report), path, report)


def overflow(name: str) -> InputError:
    """The error for a tensor with values that float16 cannot hold."""
    return InputError(f"--precision: {name} has values beyond float16's 65504; export with --precision bfloat16")


def _format(order: Order) -> Format:
    """The order's format. Raises InputError for an unknown one, and for options that it does not have."""
    if order.format not in FORMATS:
        raise InputError(f"--format: unknown format '{order.format}'; known: {', '.join(FORMATS)}")
    format = FORMATS[order.format]
    if order.shard_size is not None and not format.sharded:
        raise InputError(f"--shard-size: --format {order.format} is not sharded; leave this option out")
    if format.file is not None and order.output.suffix != format.file:
        raise InputError(
            f"--output: --format {order.format} writes one file, so its name must end with {format.file}, as in "
            f"{order.output}{format.file}"
        )
    return format


def _component(config: Config, id: str | None) -> ModelOptions:
    """The model component with this id; if `id` is None, the only one. As on /v1, a component without an id is `default`.

    Raises InputError.
    """
    named = dict(config.models)
    if not named:
        raise InputError("the file has no component of `type: model`, so there is no blend to export")
    if id is None and len(named) > 1:
        raise InputError(f"the file has several models; choose one with --component: {', '.join(named)}")
    if id is not None and id not in named:
        raise InputError(f"--component: unknown model '{id}'; known: {', '.join(named)}")
    return next(iter(named.values())) if id is None else named[id]


def _gather(
    loaded: ComposeFile, options: ModelOptions, blend: Blend, order: Order, format: Format, report: Report
) -> Export:
    """Fetch the blend's adapters and the base, and check that they fit together."""
    from model_compose.checkpoint.reading import copy_checker
    from model_compose.engines.adapters import fetch_adapter
    from model_compose.engines.blueprint import read_blueprint
    from model_compose.engines.on_disk import CONFIG_FILES
    from model_compose.lora.adapter import check, check_copies
    from model_compose.lora.layers import module_shapes

    base_dir = loaded.base_dir
    listed = {
        name: adapter
        for name, adapter in zip(options.adapter_names, options.peft_adapters, strict=True)
        if name in blend.active
    }
    adapters = {name: fetch_adapter(name, adapter, base_dir, report) for name, adapter in listed.items()}
    sources = {
        name: Source(describe(a.model), fetch(a.model, base_dir=base_dir, only=(CONFIG_FILE,)).identity)
        for name, a in listed.items()
    }
    on_hub = isinstance(options.model, HuggingfaceSource) and options.model.filename is None
    weights = format.weights or any(adapter.copies for adapter in adapters.values()) or not on_hub
    base = fetch(options.model, base_dir=base_dir, only=None if weights else CONFIG_FILES, report=report)
    model: Any = read_blueprint(options, base).model
    shapes = module_shapes(model)
    adapters = {name: check(adapter, shapes) for name, adapter in adapters.items()}
    holds = copy_checker(base, model)
    for adapter in adapters.values():
        check_copies(adapter, holds)
    return Export(options, blend, adapters, sources, base, model, order)
