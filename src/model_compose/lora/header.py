"""Reads an adapter's config and the header of its weights, without the numbers. This takes milliseconds and suffices to
say whether the adapter fits a base.

Checks that need the numbers (NaN, copies of the base's weights) are made when adapter.py reads the whole adapter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_compose.errors import AdapterError
from model_compose.headers import HeaderError, Stored, read_safetensors
from model_compose.lora.adapter import WEIGHT_FILES, Factors, LoraAdapter, ModuleShape, text_path, weight_file
from model_compose.lora.peft_config import naming_adapter, read_config, scaling
from model_compose.lora.weights import Sides, by_module


def has_weights(folder: Path) -> bool:
    """Whether the folder holds an adapter's weights, in either format."""
    return any((folder / file).is_file() for file in WEIGHT_FILES)


def read_header(folder: Path, name: str) -> LoraAdapter | None:
    """The adapter, with factors that have shapes but no numbers. None if its weights are a pickle, which has no header.

    Raises AdapterError for a config that cannot be used, and for weights that are missing, damaged or not plain LoRA.
    """
    config = read_config(folder, name)
    with naming_adapter(name):
        path = weight_file(folder)
        if path.suffix != ".safetensors":
            return None
        try:
            found, _ = by_module(read_safetensors(path), path)
        except HeaderError as error:
            raise AdapterError(f"{path} {error}") from None
        modules = {module: _factors(config, module, sides) for module, sides in found.items()}
    return LoraAdapter(name, modules, "", config.get("base_model_name_or_path"))


def _factors(config: Mapping[str, Any], path: str, sides: Sides[Stored]) -> Factors:
    a: Any
    b: Any
    (_, a), (_, b) = sides.a, sides.b
    return Factors(a, b, scaling(config, path, sides.rank), sides.embedding)


def shapes_in(weights: Mapping[str, Stored], adapter: LoraAdapter) -> dict[str, ModuleShape]:
    """The shapes of the adapter's modules, as far as a checkpoint's headers give them, by the adapter's paths.

    weights: the checkpoint's tensors by parameter name. Some modules cannot be found and are left out: a checkpoint may
    name a module differently than the model does, pack it (quantised), or fuse it with others, and it does not hold a tied
    output head. The headers do not say either whether a matrix is stored as in a Linear or transposed (GPT-2's Conv1D), so
    we assume the one that fits the adapter.
    """
    inner: dict[str, list[str]] = {}
    for name in weights:
        inner.setdefault(_inner(name), []).append(name)
    shapes = {}
    for path, factors in adapter.modules.items():
        if ".experts." in path:  # transformers fuses all experts of a layer into one tensor
            continue
        named = inner.get(_inner(f"{path}.weight"), [])
        stored = weights.get(f"{path}.weight") or (weights[named[0]] if len(named) == 1 else None)
        if stored is not None and stored.plain and len(stored.shape) == 2:
            rows, columns = stored.shape
            if factors.embedding:
                shapes[path] = ModuleShape("embedding", rows, columns)
            elif (factors.a.shape[1], factors.b.shape[0]) == (rows, columns):
                shapes[path] = ModuleShape("conv1d", rows, columns)
            else:
                shapes[path] = ModuleShape("linear", columns, rows)
    return shapes


def _inner(path: str) -> str:
    """A path without the prefixes before the layers, which may differ between a checkpoint and the model."""
    return text_path(path).removeprefix("transformer.")
