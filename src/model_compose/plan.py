"""Computes what a file needs, from configs alone, for the command `plan`: memory on each device, and bytes to download.

It goes through the components in the order in which `up` loads them; memory that one takes is not free for the next. It
uses the driver's own arithmetic (`needs`), so that `up` refuses what `plan` refuses.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError

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
"""The bytes that CUDA itself takes on a card before the first tensor. The free memory that a card reports does not include
them, but a size given by `--memory` does."""


@dataclass(frozen=True)
class Download:
    """One source. total: all its bytes. missing: the bytes that are not on this machine. Both are None if unknown."""

    name: str
    total: int | None
    missing: int | None


@dataclass(frozen=True)
class ModelPlan:
    """One model component. needs: the memory on each device. unknown: why (part of) its memory is unknown. problem: why it
    does not fit."""

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
    """What a file needs, component by component, in the order of loading."""

    models: tuple[ModelPlan, ...]

    @property
    def problems(self) -> list[str]:
        """The reasons why components do not fit, one sentence each."""
        return [model.problem for model in self.models if model.problem is not None]


class Memory(Devices):
    """The free memory of each device: the size that `--memory` pretends, else what is free now, minus what earlier
    components take. pretended: bytes by device, from `parse_memory`."""

    def __init__(self, pretended: Mapping[str, int]) -> None:
        self._pretended, self._taken = pretended, dict[str, int]()

    def pick(self, name: str) -> "torch.device":
        """The device that the engine would choose, if the pretended devices existed. Raises LoadError."""
        import torch

        if name == "auto":
            name = next((key for key in self._pretended if key not in ("", "cpu")), "auto")
        try:
            device = torch.device(name)
        except RuntimeError:  # "auto", or a name that is not a device's
            return super().pick(name)
        return device if device_name(device) in self._pretended or "" in self._pretended else super().pick(name)

    def free(self, device: "torch.device") -> int | None:
        """The bytes that are left on the device; None if unknown."""
        name = device_name(device)
        size = self._pretended.get(name, self._pretended.get(""))
        if size is None:
            size = super().free(device)
        elif device.type == "cuda":
            size -= CUDA_CONTEXT
        return None if size is None else max(0, size - self._taken.get(name, 0))

    def taken(self, needs: Needs) -> int:
        """The bytes that earlier components take on the device."""
        return self._taken.get(needs.device, 0)

    def take(self, needs: Needs) -> None:
        """Count the bytes of this component as taken."""
        self._taken[needs.device] = self._taken.get(needs.device, 0) + needs.weights + needs.kv_cache


def plan(loaded: ComposeFile, pretended: Mapping[str, int], report: Report = silent) -> Plan:
    """What every model component needs. pretended: bytes by device ("" is any), from `parse_memory`.

    Fetches configs. A component that does not fit is a problem in the plan; for other reasons to refuse the file, this
    raises SourceError, AdapterError or LoadError, as `up` would.
    """
    check_files(loaded, weights=False)
    memory = Memory(pretended)
    return Plan(tuple(_plan_model(*model, loaded.base_dir, memory, report) for model in loaded.config.models))


def parse_memory(given: Collection[str]) -> dict[str, int]:
    """Parse "16GB" or "cuda:0=16GB" into bytes by device. A size without a device gets the key "", which means the device
    that a model is placed on. Raises InputError."""
    sizes = {}
    for text in given:
        device, _, size = text.rpartition("=")
        try:
            sizes["cuda:0" if device == "cuda" else device] = int(TypeAdapter(ByteSize).validate_python(size.strip()))
        except ValidationError:
            raise InputError(f"--memory {text}: expected SIZE or DEVICE=SIZE, such as 16GB or cuda:0=16GiB") from None
    return sizes


def _plan_model(name: str, options: ModelOptions, base_dir: Path, memory: Memory, report: Report) -> ModelPlan:
    from model_compose.engines.on_disk import CONFIG_FILES

    device = memory.pick(options.device)  # refuse a missing device before fetching anything, as `up` does
    check_quantization(options.quantization, str(device))
    base = survey(options.model, base_dir=base_dir, only=CONFIG_FILES, report=report)
    adapters = _survey_adapters(options, base_dir, report)
    named = {describe(options.model): base, **{f"adapter {name}": survey for name, survey in adapters.items()}}
    downloads = tuple(Download(name, survey.total, survey.missing) for name, survey in named.items())
    made = ModelPlan(name, describe(options.model), downloads)
    if ENGINES[options.driver].needs is None:
        return replace(made, unknown=f"the driver {options.driver} decides by itself how much memory it takes")
    if base.fetched is None:
        return replace(
            made, unknown="the config comes with the weights, so the memory is known only after the download"
        )
    made = _measure(made, options, base, adapters, device, memory)
    for needs in made.needs:
        before = memory.taken(needs)
        memory.take(needs)
        try:
            check_fits(needs)
        except LoadError as error:
            hint = f" (earlier components take {size_text(before)}; set their kv_cache to less)" if before else ""
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
    """`made` with the numbers of the base, and of every adapter whose config has been fetched."""
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
    uncounted = ", ".join(adapter for adapter in found if adapter not in sizes)
    return replace(
        made,
        precision=str(compute).removeprefix("torch."),
        quantization=options.quantization
        or (f"{bits} bits, as stored" if (bits := stored_bits(model.config)) else None),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        needs=needs(options, blueprint, sizes, checkpoint, memory),
        unknown=f"not counted, since their config comes with the weights: adapters {uncounted}" if uncounted else None,
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
    """The plan for `--json`. Sizes are in bytes."""
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
    """The numbers of one device: all in bytes, except context and kv_tokens, which are in tokens."""
    inner = ("model", "adapters_at_once", "kv_least", "kv_given", "smaller")
    fields = {key: value for key, value in vars(needs).items() if key not in inner}
    derived = {"weights": needs.weights, "least": needs.least, "kv_tokens": needs.tokens, "missing": needs.missing}
    return fields | derived


def show(plan: Plan) -> None:
    """Print a table for each component to stdout: as wide as the terminal, and without colours if piped."""
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
            console.print(escape(f"unknown: {model.unknown}"))
    if not plan.models:
        console.print("no model components: nothing to load")
    elif not plan.problems:
        unknown = any(model.unknown for model in plan.models)
        console.print("✅ Everything that is known fits" if unknown else "✅ Everything fits")


def _rows(model: ModelPlan) -> list[tuple[str, str, str]]:
    rows = []
    for needs in model.needs:
        free = "free memory unknown" if needs.free is None else f"of {size_text(needs.free)} free"
        rows.append((needs.device, size_text(needs.weights + needs.kv_cache), free))
        rows += [(f"  {what}", size_text(size), note) for what, size, note in _parts(model, needs) if size]
    for download in model.downloads:
        size = "unknown" if download.missing is None else size_text(download.missing)
        whole = download.total is not None and download.total != download.missing
        rows.append(("download", size, download.name + (f", {size_text(download.total or 0)} in all" if whole else "")))
    return rows


def _parts(model: ModelPlan, needs: Needs) -> list[tuple[str, int, str]]:
    """Rows of (what, bytes, note). Rows with 0 bytes are not shown."""
    packed = f", Linear weights in {model.quantization}" if model.quantization else ""
    mapped = ", mapped from the files" if needs.mapped else ""
    per_token = f"{needs.tokens:,} tokens of {needs.kv_per_token:,} B"
    limited = needs.tokens < needs.context
    context = f"which limits the context of {needs.context:,}" if limited else f"context {needs.context:,}"
    return [
        ("base", needs.base, f"{model.parameters or 0:,} parameters in {model.precision}{packed}{mapped}"),
        *((f"adapter {name}", size, "") for name, size in needs.adapters.items()),
        ("adapters as stored", needs.kept, "stay in main memory, to fold or move them"),
        ("folded", needs.folded, f"a copy of the weights that the default blend changes (fold: {needs.fold})"),
        ("folded ahead", needs.full_rank, "a copy of the weights that the blend of full rank changes"),
        ("while loading", needs.loading, "the whole base is converted before it is quantised"),
        ("KV cache", needs.kv_cache, f"{per_token}, {context}"),
        ("working memory", needs.working, "in addition, while it computes (an estimate)"),
        ("too few", needs.missing, f"for a KV cache of {size_text(needs.kv_least)} in addition"),
    ]
