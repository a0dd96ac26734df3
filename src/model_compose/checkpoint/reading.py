"""Reads a base's weights one tensor at a time, by their names in the checkpoint.

Each read opens the file again and closes it afterwards. As long as a file stays mapped, the pages that were read count as
the process's memory, so an open file would cost as much memory as the whole model.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from model_compose.checkpoint.files import NAMES, weight_files
from model_compose.checkpoint.shards import Entry
from model_compose.errors import LoadError, reason
from model_compose.lora.adapter import is_copy
from model_compose.sources import Fetched

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint(Protocol):
    """The weights of a base."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The stored tensors' dtypes and shapes, by stored name, in the files' order."""

    def read(self, name: str) -> Tensor:
        """The tensor with this stored name, with the dtype and shape of its entry."""

    def stored(self, key: str) -> str | None:
        """The stored name of the model's parameter `key`; None if no single stored tensor becomes this parameter."""

    def is_copy(self, copy: Tensor, name: str) -> bool | None:
        """Whether `copy` equals the tensor with this stored name, except for rounding; None if they cannot be compared."""


def open_checkpoint(base: Fetched, model: "PreTrainedModel") -> Checkpoint:
    """The base's weights. Raises LoadError if they are quantised, missing, or in another format."""
    if base.file is not None:
        from model_compose.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint(base.folder / base.file, model)
    if (config := getattr(model.config, "quantization_config", None)) is not None:
        method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
        raise LoadError(
            f"{base} is stored quantised ({method or 'by an unnamed method'}), and quantising the sum again would lose "
            "precision; use the model that it was quantised from as the base"
        )
    files = weight_files(base.folder)
    if not files:
        raise LoadError(f"{base} has neither {' nor '.join(NAMES)}, nor an index of shards of either")
    return FolderCheckpoint(files, model)


def copy_checker(base: Fetched, model: "PreTrainedModel") -> Callable[[str, Tensor], bool | None]:
    """A function (parameter name, tensor) -> whether the base's parameter equals that tensor.

    The function returns None if they cannot be compared. It looks under both names of a tied parameter, and raises
    LoadError as `open_checkpoint` does. It opens the checkpoint at its first call only, since a GGUF file takes seconds.
    """
    opened = functools.cache(lambda: open_checkpoint(base, model))

    def holds(key: str, copy: Tensor) -> bool | None:
        checkpoint, tied = opened(), model.all_tied_weights_keys
        other = {**tied, **{source: target for target, source in tied.items()}}
        stored = checkpoint.stored(key) or checkpoint.stored(other.get(key, key))
        return False if stored is None else checkpoint.is_copy(copy, stored)

    return holds


class FolderCheckpoint:
    """A checkpoint of safetensors or pickles. weights_only=True reads a pickle without executing its code."""

    def __init__(self, files: Iterable[Path], model: "PreTrainedModel") -> None:
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            found = _entries(file)
            if twice := found.keys() & self.entries.keys():
                name = min(twice)
                raise LoadError(
                    f"{self._files[name]} and {file} both hold '{name}'; keep only the files of one checkpoint"
                )
            self.entries |= found
            self._files |= dict.fromkeys(found, file)
        self._keys = _model_keys(model, self.entries)

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        if file.suffix != ".safetensors":
            return _unpickled(file)[name]
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def stored(self, key: str) -> str | None:
        return self._keys.get(key)

    def is_copy(self, copy: Tensor, name: str) -> bool:
        return is_copy(copy, self.read(name))


def _entries(file: Path) -> dict[str, Entry]:
    """The dtypes and shapes of a file's tensors. Both formats are mapped, so this reads no data. Raises LoadError."""
    if file.suffix != ".safetensors":
        return {name: _entry(tensor) for name, tensor in _unpickled(file).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: _entry(opened.get_tensor(name)) for name in opened.offset_keys()}
    except SafetensorError as error:
        raise LoadError(f"{file} is damaged ({reason(error)}); fetch the model again") from None


def _entry(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape))


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise LoadError(
            f"{file} cannot be read ({reason(error)}); convert it to safetensors (transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
        ) from None
    if not isinstance(found, dict):
        raise LoadError(f"{file} does not hold a mapping of names to tensors; fetch the model again")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _model_keys(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Stored names by parameter name, after the renaming that transformers does on loading (a prefix that is missing or
    superfluous, names of older versions). Parameters that transformers computes from several tensors are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    keys = {}
    for name in names:
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converted is None and key in parameters:
            keys[key] = name
    return keys
