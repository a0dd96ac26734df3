"""Reads the file of an adapter's weights into factors A and B by module path.

The file may come from a stranger. We use its content unchanged or refuse it with AdapterError, and we never allocate much
more memory than the file has bytes. adapter.py checks whether the factors fit a base.
"""

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from model_compose.errors import AdapterError, reason

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
"""PEFT's prefix of the base's module paths."""

_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?$")


@dataclass(frozen=True)
class Pair:
    """The factors of one module: a (r, in) and b (out, r); an embedding's a is (r, vocabulary)."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    embedding: bool


class Shaped(Protocol):
    """A tensor, or its description in a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Shaped)


@dataclass(frozen=True)
class Sides(Generic[T]):
    """The factors of one module, a (r, in) and b (out, r), as the file stores them, each with its name in the file."""

    a: tuple[str, T]
    b: tuple[str, T]
    embedding: bool

    @property
    def rank(self) -> int:
        return self.a[1].shape[0]


def read_weights(data: bytes, path: Path) -> tuple[dict[str, Pair], dict[str, "torch.Tensor"]]:
    """The factors by module path, and the copies of base weights that the file holds, by parameter name.

    data: the file's bytes. path: the file that they were read from, for messages. Raises AdapterError.
    """
    modules, stored = by_module(_tensors(data, path), path)
    copies: dict[str, torch.Tensor] = {}
    for parameter, tensor in stored:
        if parameter in copies and not same_values(copies[parameter], tensor):
            raise AdapterError(f"{path} holds two different copies of the base's '{parameter}'")
        copies[parameter] = tensor
    return {module: _pair(module, sides) for module, sides in modules.items()}, copies


def by_module(tensors: Mapping[str, T], path: Path) -> tuple[dict[str, Sides[T]], list[tuple[str, T]]]:
    """Sort a file's tensors into factors by module path, and copies of base weights as (parameter name, tensor).

    tensors: by their names in the file. Raises AdapterError for a name that is neither, for two names that mean the same
    factor, and for shapes that do not fit A (r, in) and B (out, r).
    """
    found: dict[str, dict[str, tuple[str, T]]] = {}
    embeddings: set[str] = set()
    adapters: set[str | None] = set()
    copies: list[tuple[str, T]] = []
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        match = _FACTOR.match(bare.removesuffix(".weight"))
        if match and not bare.endswith(".bias"):
            adapters.add(match["adapter"])
            sides = found.setdefault(match["path"], {})
            if match["side"] in sides and len(adapters) == 1:  # a file of several adapters is refused below
                raise AdapterError(
                    f"'{sides[match['side']][0]}' and '{key}' are both the lora_{match['side']} of "
                    f"'{match['path']}', and model-compose cannot tell which one to use"
                )
            sides[match["side"]] = key, tensor
            if match["embedding"]:
                embeddings.add(match["path"])
        elif "lora_" not in bare and "modules_to_save" not in bare and bare.endswith(".weight"):
            copies.append((bare.replace(".base_layer.weight", ".weight"), tensor))
        elif bare.endswith(".bias") and "lora_" not in bare:
            raise AdapterError(f"'{key}' is a trained bias, which is not part of a weighted low-rank sum")
        else:
            raise AdapterError(f"the tensor '{key}' is not a LoRA factor, so the adapter cannot be applied exactly")
    if len(adapters) > 1:
        raise AdapterError(_several(adapters, path))
    if not found:
        raise AdapterError("its weights file has no lora_A and lora_B tensors")
    return {module: _sides(module, sides, module in embeddings) for module, sides in found.items()}, copies


def same_values(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    """Whether both have the same shape and the same numbers. Their dtypes may differ."""
    import torch

    return one.shape == other.shape and torch.equal(one.float(), other.to(one.device).float())


def _several(adapters: set[str | None], path: Path) -> str:
    names = sorted(name for name in adapters if name is not None)
    quoted = [f"'{name}'" for name in names] + ["one without a name"] * (None in adapters)
    folders = [folder for name in names if (folder := path.parent / name).is_dir()]
    remedy = "save only the one that you want (PEFT: save_pretrained(folder, selected_adapters=[name]))"
    if folders:
        remedy = f"point to the folder of the one that you want: {' or '.join(map(str, folders))}"
    return f"{path} holds several adapters: {', '.join(quoted)}; {remedy}"


def _sides(path: str, sides: Mapping[str, tuple[str, T]], embedding: bool) -> Sides[T]:
    if missing := {"A", "B"} - set(sides):
        raise AdapterError(f"{path} has no lora_{missing.pop()}")
    a, b = (tuple(sides[side][1].shape) for side in "AB")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise AdapterError(f"{path} has A {a} and B {b}; expected (r, in) and (out, r)")
    return Sides(sides["A"], sides["B"], embedding)


def _pair(path: str, sides: "Sides[torch.Tensor]") -> Pair:
    import torch

    a, b = (_floats(*side) for side in (sides.a, sides.b))
    # Test in float32, in which blends are summed: a finite float64 may overflow there.
    if not all(torch.isfinite(factor.float()).all() for factor in (a, b)):
        raise AdapterError(f"{path} holds NaN or infinite values")
    return Pair(a, b, sides.embedding)


def _floats(key: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor as stored; a float8 tensor becomes float32, since torch does not compute in float8.

    Raises AdapterError for a dtype that is no floating-point type.
    """
    import torch

    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return tensor
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith("float8_"):
        return tensor.float()
    raise AdapterError(f"the tensor '{key}' is {name}, not floating-point; quantised adapters are refused")


# Reading the file.


def _tensors(data: bytes, path: Path) -> dict[str, "torch.Tensor"]:
    """The file's tensors by name. A .bin file is a pickle; weights_only=True reads it without executing its code."""
    import torch
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            tensors: Any = load(data)
        else:
            _check_size(data)
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of hostile bytes may raise anything
        raise AdapterError(f"{path} cannot be read ({reason(error)}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise AdapterError(f"{path} does not hold a mapping of names to tensors")
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"{path} holds a value of type {type(tensor).__name__} as '{key}', not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
            raise AdapterError(
                f"{path} holds '{key}' as a sparse, nested, quantised or device tensor; save the adapter as safetensors"
            )
    # A pickled tensor with stride 0 repeats a few numbers until they fill the memory. The factor 2 allows for two names
    # that share one storage.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * len(data):
        raise AdapterError(f"{path} unpacks to more bytes than the file has; save the adapter as safetensors")
    return {key: tensor.detach() for key, tensor in sorted(tensors.items())}


def _check_size(data: bytes) -> None:
    """Raise ValueError for a zip whose content is larger than itself: torch.save does not compress, so it may be a bomb."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("it is compressed, which torch.save never does")
