"""`plan`: what a file will need, from configs alone: memory on each device, and bytes to download.

Components are gone through in the order in which `up` loads them, and what one takes is gone for the next. The arithmetic
is the driver's own (`needs`), so `up` refuses what `plan` refuses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from model_compose.config import Config
from model_compose.engines import ENGINES
from model_compose.engines.devices import Devices, check_quantization, device_name, pick_dtype, size_text
from model_compose.engines.needs import Needs, check_fits
from model_compose.engines.options import ModelOptions
from model_compose.errors import InputError, LoadError, SourceError
from model_compose.loading import ComposeFile
from model_compose.preflight import check_files
from model_compose.progress import Report, silent
from model_compose.sources import describe
from model_compose.sources.survey import Survey, survey

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from model_compose.engines.sizes import AdapterSize

CUDA_CONTEXT = 512 << 20
"""What CUDA takes of a card before the first tensor: gone from the free memory that a card reports, not from its size."""


@dataclass(frozen=True)
class Download:
    """One source. total: all its bytes, missing: those that are not on this machine; None where nobody says."""

    name: str
    total: int | None
    missing: int | None


@dataclass(frozen=True)
class ModelPlan:
    """One model component. unknown: why its memory cannot be told; problem: why it does not fit."""

    component: str
    model: str
    downloads: tuple[Download, ...]
    needs: tuple[Needs, ...] = ()
    parameters: int | None = None
    precision: str | None = None
    quantization: str | None = None
    unknown: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    models: tuple[ModelPlan, ...]

    @property
    def problems(self) -> list[str]:
        return [model.problem for model in self.models if model.problem is not None]


class Memory(Devices):
    """How much every device has: what `--memory` pretends, else what is free, less what earlier components take."""

    def __init__(self, pretended: Mapping[str, int]) -> None:
        self._pretended, self._taken = pretended, dict[str, int]()

    def pick(self, name: str) -> "torch.device":
        """As the engine picks it, but pretended devices exist. Raises LoadError."""
        import torch

        if name == "auto":
            name = next((key for key in self._pretended if key not in ("", "cpu")), "auto")
        try:
            device = torch.device(name)
        except RuntimeError:  # auto, or no device's name
            return super().pick(name)
        return device if device_name(device) in self._pretended or "" in self._pretended else super().pick(name)

    def free(self, device: "torch.device") -> int | None:
        name = device_name(device)
        size = self._pretended.get(name, self._pretended.get(""))
        if size is None:
            size = super().free(device)
        elif device.type == "cuda":
            size -= CUDA_CONTEXT
        return None if size is None else max(0, size - self._taken.get(name, 0))

    def taken(self, needs: Needs) -> int:
        """What earlier components take of the device."""
        return self._taken.get(needs.device, 0)

    def take(self, needs: Needs) -> None:
        self._taken[needs.device] = self._taken.get(needs.device, 0) + needs.weights + needs.kv_cache


def plan(loaded: ComposeFile, pretended: Mapping[str, int], report: Report = silent) -> Plan:
    """What every model component needs. pretended: bytes by device ("" is any), from `parse_memory`.

    Fetches configs. Raises SourceError, AdapterError, LoadError for what `up` would refuse for another reason than memory.
    """
    check_files(loaded, weights=False)
    memory = Memory(pretended)
    return Plan(tuple(_plan_model(*model, loaded.base_dir, memory, report) for model in models(loaded.config)))


def parse_memory(given: Sequence[str]) -> dict[str, int]:
    """16GB, or cuda:0=16GB -> bytes by device, where "" is whichever device a model goes to. Raises InputError."""
    sizes = {}
    for text in given:
        device, _, size = text.rpartition("=")
        try:
            sizes["cuda:0" if device == "cuda" else device] = int(TypeAdapter(ByteSize).validate_python(size.strip()))
        except ValidationError:
            raise InputError(f"--memory {text}: expected SIZE or DEVICE=SIZE, such as 16GB or cuda:0=16GiB") from None
    return sizes


def models(config: Config) -> list[tuple[str, ModelOptions]]:
    """The model components by the names that /v1 has for them."""
    return [
        ("default" if component.id == "__component__" else component.id, component)
        for component in config.all_components
        if isinstance(component, ModelOptions)
    ]


def _plan_model(name: str, options: ModelOptions, base_dir: Path, memory: Memory, report: Report) -> ModelPlan:
    from model_compose.engines.on_disk import CONFIG_FILES

    device = memory.pick(options.device)  # looked at before anything is fetched, as `up` does
    check_quantization(options.quantization, str(device))
    base = survey(options.model, base_dir=base_dir, only=CONFIG_FILES, report=report)
    adapters = _survey_adapters(options, base_dir, report)
    named = {describe(options.model): base, **{f"adapter {name}": survey for name, survey in adapters.items()}}
    downloads = tuple(Download(name, survey.total, survey.missing) for name, survey in named.items())
    made = ModelPlan(name, describe(options.model), downloads)
    if ENGINES[options.driver].needs is None:
        return replace(made, unknown=f"{options.driver} chooses its own memory")
    if base.fetched is None:
        return replace(made, unknown="the config comes with the weights, so memory can be told only once they are here")
    made = _measure(made, options, base, adapters, device, memory)
    for needs in made.needs:
        before = memory.taken(needs)
        memory.take(needs)
        try:
            check_fits(needs)
        except LoadError as error:
            hint = f" (the components before it take {size_text(before)}: their kv_cache may be set)" if before else ""
            made = replace(made, problem=made.problem or f"{error}{hint}")
    return made


def _survey_adapters(options: ModelOptions, base_dir: Path, report: Report) -> dict[str, Survey]:
    from model_compose.lora.peft_config import CONFIG_FILE

    found = {}
    for name, adapter in zip(options.adapter_names, options.peft_adapters, strict=True):
        try:
            found[name] = survey(adapter.model, base_dir=base_dir, only=(CONFIG_FILE,), report=report)
        except SourceError as error:
            raise SourceError(f"adapter '{name}': {error}") from error
    return found


def _measure(
    made: ModelPlan,
    options: ModelOptions,
    base: Survey,
    adapters: Mapping[str, Survey],
    device: "torch.device",
    memory: Memory,
) -> ModelPlan:
    """`made` with the numbers of the base and of every adapter whose config is there."""
    import torch

    from model_compose.engines.blueprint import read_blueprint
    from model_compose.engines.sizes import checkpoint_dtype, checkpoint_of, stored_bits

    needs = ENGINES[options.driver].needs
    assert base.fetched is not None
    assert needs is not None
    blueprint = read_blueprint(options, base.fetched)
    model, checkpoint = blueprint.model, checkpoint_of(base.files, base.fetched.file)
    dtype = pick_dtype(options.precision, device)
    compute = dtype if isinstance(dtype, torch.dtype) else checkpoint_dtype(model, checkpoint)
    found = {adapter: _adapter_size(adapter, survey, model) for adapter, survey in adapters.items()}
    sizes = {adapter: size for adapter, size in found.items() if size is not None}
    untold = ", ".join(adapter for adapter in found if adapter not in sizes)
    return replace(
        made,
        precision=str(compute).removeprefix("torch."),
        quantization=options.quantization
        or (f"{bits} bits, as stored" if (bits := stored_bits(model.config)) else None),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        needs=needs(options, blueprint, sizes, checkpoint, memory),
        unknown=f"adapters not counted, as their config comes with the weights: {untold}" if untold else None,
    )


def _adapter_size(name: str, found: Survey, model: Any) -> "AdapterSize | None":
    from model_compose.engines.sizes import adapter_size
    from model_compose.lora.adapter import WEIGHT_FILES
    from model_compose.lora.peft_config import read_config

    if found.fetched is None:
        return None
    stored = next((found.files[file] for file in WEIGHT_FILES if file in found.files), None)
    return adapter_size(read_config(found.fetched.folder, name), model, name, stored)


# As JSON, and as a table.


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "fits": not plan.problems,
        "components": [
            {
                **{key: value for key, value in vars(model).items() if key not in ("needs", "downloads")},
                "devices": [_device_json(needs) for needs in model.needs],
                "downloads": [vars(download) for download in model.downloads],
            }
            for model in plan.models
        ],
    }


def _device_json(needs: Needs) -> dict[str, Any]:
    """All in bytes, but for context and kv_tokens."""
    inner = ("model", "adapters_at_once", "kv_least", "kv_given", "smaller")
    told = {key: value for key, value in vars(needs).items() if key not in inner}
    derived = {"weights": needs.weights, "least": needs.least, "kv_tokens": needs.tokens, "missing": needs.missing}
    return told | derived


def show(plan: Plan) -> None:
    """A table for each component, to stdout: as wide as the terminal, plain when piped."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    with console.capture() as captured:
        _print(plan, console)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _print(plan: Plan, console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    for model in plan.models:
        console.print(f"[bold]{escape(f'{model.component}: {model.model}')}[/]")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold", style="dim")
        for row in _rows(model):
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
        if model.unknown:
            console.print(escape(f"not known: {model.unknown}"))
    if not plan.models:
        console.print("no model components: nothing to load")
    elif not plan.problems:
        unknown = any(model.unknown for model in plan.models)
        console.print("✅ What is known fits" if unknown else "✅ Everything fits")


def _rows(model: ModelPlan) -> list[tuple[str, str, str]]:
    rows = []
    for needs in model.needs:
        free = "free memory not known" if needs.free is None else f"of {size_text(needs.free)} free"
        rows.append((needs.device, size_text(needs.weights + needs.kv_cache), free))
        rows += [(f"  {what}", size_text(size), note) for what, size, note in _parts(model, needs) if size]
    for download in model.downloads:
        size = "not known" if download.missing is None else size_text(download.missing)
        whole = download.total is not None and download.total != download.missing
        rows.append(("download", size, download.name + (f", {size_text(download.total or 0)} in all" if whole else "")))
    return rows


def _parts(model: ModelPlan, needs: Needs) -> list[tuple[str, int, str]]:
    """What, how many bytes, how they come about."""
    packed = f", Linear weights in {model.quantization}" if model.quantization else ""
    mapped = ", mapped from the files" if needs.mapped else ""
    per_token = f"{needs.tokens:,} tokens of {needs.kv_per_token:,} B"
    limited = needs.tokens < needs.context
    context = f"which limits the context of {needs.context:,}" if limited else f"context {needs.context:,}"
    return [
        ("base", needs.base, f"{model.parameters or 0:,} parameters in {model.precision}{packed}{mapped}"),
        *((f"adapter {name}", size, "") for name, size in needs.adapters.items()),
        ("adapters as stored", needs.kept, "stay in main memory, for folding"),
        ("folded", needs.folded, f"the weights that the default blend touches, once more (fold: {needs.fold})"),
        ("folded ahead", needs.full_rank, "the weights that the blend of full rank touches, once more"),
        ("while loading", needs.loading, "the base is converted whole before it is quantised"),
        ("KV cache", needs.kv_cache, f"{per_token}, {context}"),
        ("working memory", needs.working, "besides, while it computes (an estimate)"),
        ("too few", needs.missing, f"for a KV cache of {size_text(needs.kv_least)} besides"),
    ]
