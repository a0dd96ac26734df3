"""An adapter by its config and the header of its weights: enough to say whether it fits a base, in milliseconds.

What takes the numbers (NaN, copies of the base's weights) is seen when the adapter is read (adapter.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_compose.errors import AdapterError
from model_compose.headers import HeaderError, Stored, read_safetensors
from model_compose.lora.adapter import WEIGHT_FILES, Factors, LoraAdapter, ModuleShape, weight_file
from model_compose.lora.peft_config import of_adapter, read_config, scaling
from model_compose.lora.weights import Sides, by_module

_AROUND = re.compile(r"(?:(?:model|language_model|transformer)\.)*")


def has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WEIGHT_FILES)


def read_header(folder: Path, name: str) -> LoraAdapter | None:
    """The adapter, whose factors know their shapes and nothing else; None for a pickle, which has no header.

    Raises AdapterError for a config that cannot be used, and for weights that are missing, damaged, or no plain LoRA.
    """
    config = read_config(folder, name)
    with of_adapter(name):
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
    """What a checkpoint's headers say of the adapter's modules, as far as they say it: by the adapter's paths.

    weights: by parameter name. A checkpoint may name a module otherwise than the model does, pack it, or fuse it with
    others, and a tied head is not in it; such modules are left out. Whether a matrix lies as in a Linear or transposed
    (GPT-2) is not told either: it counts as whichever fits.
    """
    inner: dict[str, list[str]] = {}
    for name in weights:
        inner.setdefault(_inner(name), []).append(name)
    shapes = {}
    for path, factors in adapter.modules.items():
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
    """A path without what stands around the layers, which differs between a checkpoint and the model made from it."""
    return _AROUND.sub("", path, count=1)
