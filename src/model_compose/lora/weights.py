"""The file of an adapter's weights -> factors A and B by module path.

The file comes from strangers: whatever it holds is taken as it stands or refused with AdapterError, and nothing is
allocated that its own bytes do not hold. Knows names, shapes and numbers; what they mean beside a base is in adapter.py.
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
"""What PEFT puts before the base's own module paths."""

_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?$")


@dataclass(frozen=True)
class Pair:
    """A (r, in) and B (out, r) of one module; an embedding's A is (r, vocabulary)."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    embedding: bool


class Shaped(Protocol):
    """A tensor, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Shaped)


@dataclass(frozen=True)
class Sides(Generic[T]):
    """A (r, in) and B (out, r) of one module as stored, with their names in the file."""

    a: tuple[str, T]
    b: tuple[str, T]
    embedding: bool

    @property
    def rank(self) -> int:
        return self.a[1].shape[0]


def read_weights(data: bytes, path: Path) -> tuple[dict[str, Pair], dict[str, "torch.Tensor"]]:
    """The pairs by module path, and copies of base weights by parameter name. path: the file that `data` was read from.

    Raises AdapterError.
    """
    modules, stored = by_module(_tensors(data, path), path)
    copies: dict[str, torch.Tensor] = {}
    for parameter, tensor in stored:
        if parameter in copies and not same_values(copies[parameter], tensor):
            raise AdapterError(f"{path} holds two different copies of '{parameter}'")
        copies[parameter] = tensor
    return {module: _pair(module, sides) for module, sides in modules.items()}, copies


def by_module(tensors: Mapping[str, T], path: Path) -> tuple[dict[str, Sides[T]], list[tuple[str, T]]]:
    """Tensors by their stored names -> the factors by module path, and copies of base weights with the parameter's name.

    Raises AdapterError for names that are no factors or say the same twice, and for shapes that are no A and B.
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
            if match["side"] in sides and len(adapters) == 1:  # of several adapters their names are told below
                raise AdapterError(
                    f"'{sides[match['side']][0]}' and '{key}' are both the lora_{match['side']} of "
                    f"'{match['path']}', and nothing says which of them counts"
                )
            sides[match["side"]] = key, tensor
            if match["embedding"]:
                embeddings.add(match["path"])
        elif "lora_" not in bare and "modules_to_save" not in bare and bare.endswith(".weight"):
            copies.append((bare.replace(".base_layer.weight", ".weight"), tensor))
        elif bare.endswith(".bias") and "lora_" not in bare:
            raise AdapterError(f"'{key}' is a bias that was trained along, which is no part of a weighted low-rank sum")
        else:
            raise AdapterError(f"the tensor '{key}' is not a LoRA factor; such an adapter would not be exact")
    if len(adapters) > 1:
        raise AdapterError(_several(adapters, path))
    if not found:
        raise AdapterError("its weights hold no lora_A and lora_B tensors")
    return {module: _sides(module, sides, module in embeddings) for module, sides in found.items()}, copies


def same_values(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    """Whether both hold the same numbers, whatever their dtypes."""
    import torch

    return one.shape == other.shape and torch.equal(one.float(), other.to(one.device).float())


def _several(adapters: set[str | None], path: Path) -> str:
    names = sorted(name for name in adapters if name is not None)
    quoted = [f"'{name}'" for name in names] + ["one without a name"] * (None in adapters)
    folders = [folder for name in names if (folder := path.parent / name).is_dir()]
    remedy = "save the one that you want alone (PEFT: save_pretrained(folder, selected_adapters=[name]))"
    if folders:
        remedy = f"name the folder of the one that you want: {' or '.join(map(str, folders))}"
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
    # In float32, in which blends are summed: a float64 may be finite and too large for it.
    if not all(torch.isfinite(factor.float()).all() for factor in (a, b)):
        raise AdapterError(f"{path} holds NaN or infinite values")
    return Pair(a, b, sides.embedding)


def _floats(key: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """As stored; 8 bits as float32, since torch computes nothing with them."""
    import torch

    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return tensor
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith("float8_"):
        return tensor.float()
    raise AdapterError(f"the tensor '{key}' holds {name}, not floating-point numbers; a quantised adapter is refused")


# Files.


def _tensors(data: bytes, path: Path) -> dict[str, "torch.Tensor"]:
    """Tensors by their stored names. A .bin is a pickle: read with weights_only=True, which executes nothing."""
    import torch
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            tensors: Any = load(data)
        else:
            _check_size(data)
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of a stranger's bytes fails in every way there is
        raise AdapterError(f"{path} cannot be read ({reason(error)}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise AdapterError(f"{path} does not hold a mapping of names to tensors")
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"{path} holds {type(tensor).__name__} as '{key}', which is no tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
            raise AdapterError(
                f"{path} holds '{key}' as a tensor of a kind that no adapter has; save it as safetensors"
            )
    # A pickled tensor may repeat a few numbers (stride 0) until they fill the memory; two names may share theirs.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * len(data):
        raise AdapterError(f"{path} unpacks to more than it holds; save it as safetensors")
    return {key: tensor.detach() for key, tensor in sorted(tensors.items())}


def _check_size(data: bytes) -> None:
    """torch.save compresses nothing, so a zip that grows was made to."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("it is compressed, which torch.save never does")
