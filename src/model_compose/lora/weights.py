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
from typing import TYPE_CHECKING, Any

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


def read_weights(data: bytes, path: Path) -> tuple[dict[str, Pair], dict[str, "torch.Tensor"]]:
    """The pairs by module path, and copies of base weights by parameter name. path: the file that `data` was read from.

    Raises AdapterError.
    """
    tensors = _tensors(data, path)
    sides: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    embeddings: set[str] = set()
    adapters: set[str | None] = set()
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        match = _FACTOR.match(bare.removesuffix(".weight"))
        if match and not bare.endswith(".bias"):
            adapters.add(match["adapter"])
            found = sides.setdefault(match["path"], {})
            if match["side"] in found and len(adapters) == 1:  # of several adapters their names are told below
                raise AdapterError(
                    f"'{found[match['side']][0]}' and '{key}' are both the lora_{match['side']} of "
                    f"'{match['path']}', and nothing says which of them counts"
                )
            found[match["side"]] = key, tensor
            if match["embedding"]:
                embeddings.add(match["path"])
        elif "lora_" not in bare and "modules_to_save" not in bare and bare.endswith(".weight"):
            parameter = bare.replace(".base_layer.weight", ".weight")
            if parameter in copies and not same_values(copies[parameter], tensor):
                raise AdapterError(f"{path} holds two different copies of '{parameter}'")
            copies[parameter] = tensor
        elif bare.endswith(".bias") and "lora_" not in bare:
            raise AdapterError(f"'{key}' is a bias that was trained along, which is no part of a weighted low-rank sum")
        else:
            raise AdapterError(f"the tensor '{key}' is not a LoRA factor; such an adapter would not be exact")
    if len(adapters) > 1:
        raise AdapterError(_several(adapters, path))
    if not sides:
        raise AdapterError("its weights hold no lora_A and lora_B tensors")
    return {module: _pair(module, found, module in embeddings) for module, found in sides.items()}, copies


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


def _pair(path: str, sides: Mapping[str, tuple[str, "torch.Tensor"]], embedding: bool) -> Pair:
    import torch

    if missing := {"A", "B"} - set(sides):
        raise AdapterError(f"{path} has no lora_{missing.pop()}")
    a, b = (_floats(*sides[side]) for side in "AB")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
        raise AdapterError(f"{path} has A {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, in) and (out, r)")
    # In float32, in which blends are summed: a float64 may be finite and too large for it.
    if not all(torch.isfinite(factor.float()).all() for factor in (a, b)):
        raise AdapterError(f"{path} holds NaN or infinite values")
    return Pair(a, b, embedding)


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
