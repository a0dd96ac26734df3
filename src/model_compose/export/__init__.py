"""Blends out of the door: one component's blend as a PEFT adapter, a merged model, or a GGUF file.

One file a format, each a function that writes what the blend is; this one decides what is exported, fetches it and checks
it. Nothing here serves anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.config import Config
from model_compose.engines.options import ModelOptions, Precision
from model_compose.errors import InputError
from model_compose.export.destination import whole
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
"""Bytes; transformers' own default was this for years, and the Hub's viewers expect no larger files."""


@dataclass(frozen=True)
class Order:
    """What somebody asked for.

    blend: as in a request: a name, {adapter: weight}, None for the default. component: an id; None, where there is one.
    precision: the dtype that is written; auto keeps what the base (an adapter: float32) has. shard_size: bytes.
    """

    format: str
    output: Path
    component: str | None = None
    blend: Any = None
    precision: Precision = "auto"
    shard_size: int | None = None


@dataclass(frozen=True)
class Source:
    """Where an adapter came from. identity pins its content where the source has revisions."""

    name: str
    identity: str


@dataclass(frozen=True)
class Export:
    """A blend with all that a format needs to write it.

    adapters: those of non-zero weight, checked against the base. sources: where they came from. base: whole, or its configs
    alone where the format reads no weights. model: the base on the meta device, shapes without weights.
    """

    options: ModelOptions
    blend: Blend
    adapters: Mapping[str, LoraAdapter]
    sources: Mapping[str, Source]
    base: Fetched
    model: "PreTrainedModel"
    order: Order
    trust_remote_code: bool = False

    @property
    def base_name(self) -> str:
        return describe(self.options.model)

    @property
    def identity(self) -> str:
        """The blend's digest over base, adapter contents, weights and method, as engines and responses tell it."""
        return self.blend.identity(self.base.identity, {name: a.digest for name, a in self.adapters.items()})

    @property
    def dtype(self) -> "torch.dtype | None":
        """The dtype that was asked for; None keeps what is there."""
        import torch

        found: torch.dtype | None = None if self.order.precision == "auto" else getattr(torch, self.order.precision)
        return found


@dataclass(frozen=True)
class Format:
    """A way to write a blend. write: makes the folder or file at a path that does not exist yet.

    weights: it reads those of the base. file: the suffix of the one file that it is, None for a folder. sharded: takes
    shard_size. refuse: raises InputError before anything is fetched, for a base that it cannot take.
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
)


def export(loaded: ComposeFile, order: Order, report: Report = silent) -> None:
    """Writes what was ordered, whole or not at all. Blocking.

    Raises InputError (the order is wrong, or cannot be written), SourceError, AdapterError, LoadError.
    """
    format = _format(order)
    options = _component(loaded.config, order.component)
    blend = options.to_blends().resolve(order.blend, place="--blend")
    if not blend.active and not format.weights:
        raise InputError(
            f"--format {order.format}: the blend has no adapter with a weight other than 0, so there is nothing to "
            "write; name another --blend"
        )
    format.refuse(options)
    with whole(order.output) as path:
        format.write(_gather(loaded, options, blend, order, format, report), path, report)


def _format(order: Order) -> Format:
    """Raises InputError for what the format does not have."""
    if order.format not in FORMATS:
        raise InputError(f"--format: unknown format '{order.format}'; known: {', '.join(FORMATS)}")
    format = FORMATS[order.format]
    if order.shard_size is not None and not format.sharded:
        raise InputError(f"--shard-size: --format {order.format} is not sharded; leave it out")
    if format.file is not None and order.output.suffix != format.file:
        raise InputError(
            f"--output: --format {order.format} writes one file, so its name must end with {format.file}, as in "
            f"{order.output}{format.file}"
        )
    return format


def _component(config: Config, id: str | None) -> ModelOptions:
    """The model component of that id; the only one where there is no id. `default` is the one without an id, as on /v1."""
    models = {c.id: c for c in config.all_components if isinstance(c, ModelOptions)}
    named = {"default" if key == "__component__" else key: model for key, model in models.items()}
    if not named:
        raise InputError("the file has no component of `type: model`, so there is no blend to export")
    if id is None and len(named) > 1:
        raise InputError(f"the file has several models; say which by --component: {', '.join(named)}")
    if id is not None and id not in named:
        raise InputError(f"--component: unknown model '{id}'; known: {', '.join(named)}")
    return next(iter(named.values())) if id is None else named[id]


def _gather(
    loaded: ComposeFile, options: ModelOptions, blend: Blend, order: Order, format: Format, report: Report
) -> Export:
    """Fetches the blend's adapters and the base, and checks that they fit."""
    from model_compose.engines.adapters import fetch_adapter
    from model_compose.engines.blueprint import read_blueprint
    from model_compose.engines.on_disk import CONFIG_FILES
    from model_compose.export.checkpoint import holder
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
    says = holder(base, model)
    for adapter in adapters.values():
        check_copies(adapter, says)
    return Export(options, blend, adapters, sources, base, model, order)
