"""Fetches and reads adapters. An adapter's config is checked before its weights are downloaded."""

from collections.abc import Container
from pathlib import Path

from model_compose.engines.devices import main_memory, size_text
from model_compose.engines.on_disk import CONFIG_FILES
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.errors import AdapterError, InputError, SourceError
from model_compose.lora.adapter import WEIGHT_FILES, LoraAdapter, read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.peft_config import read_config
from model_compose.progress import Report
from model_compose.sources import HuggingfaceSource, ModelSource, fetch


def fetch_adapters(options: ModelOptions, base_dir: Path, report: Report) -> list[LoraAdapter]:
    """Fetch and read all adapters of the component. Blocks. Raises SourceError or AdapterError."""
    named = zip(options.adapter_names, options.peft_adapters, strict=True)
    return [fetch_adapter(name, adapter, base_dir, report) for name, adapter in named]


def fetch_adapter(name: str, options: AdapterOptions, base_dir: Path, report: Report) -> LoraAdapter:
    """Fetch and read one adapter. Blocks. Raises SourceError or AdapterError."""
    folder = fetch_adapter_folder(name, options.model, base_dir, report)
    _check_memory(name, folder)
    return read_adapter(folder, name)


def _check_memory(name: str, folder: Path) -> None:
    """Raise AdapterError for weights that do not fit into main memory twice: reading holds the file and its tensors."""
    free = main_memory()
    needed = 2 * next((path.stat().st_size for file in WEIGHT_FILES if (path := folder / file).is_file()), 0)
    if free is not None and needed > free:
        raise AdapterError(
            f"adapter '{name}': reading its weights takes {size_text(needed)} of main memory, but only {size_text(free)} "
            "are free"
        )


def fetch_adapter_folder(name: str, source: ModelSource, base_dir: Path, report: Report) -> Path:
    """Fetch one adapter and return its folder. Blocks.

    For the Hub, the config is fetched and checked first: it is small and decides whether the adapter can be used. Raises
    SourceError or AdapterError.
    """
    if isinstance(source, HuggingfaceSource):
        only = fetch(source, base_dir=base_dir, only=CONFIG_FILES, report=report)
        read_config(only.folder, name)
    try:
        return fetch(source, base_dir=base_dir, report=report).folder
    except SourceError as error:
        raise SourceError(f"adapter '{name}': {error}") from error


def check_loaded(blend: Blend, adapters: Container[str]) -> None:
    """Raise InputError for an adapter that has been unloaded since the blend was resolved."""
    if gone := [name for name in blend.active if name not in adapters]:
        raise InputError(f"the adapter '{gone[0]}' has been unloaded meanwhile", field="blend")
