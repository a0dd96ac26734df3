"""A PEFT folder <-> `LoraAdapter`: the factors A and B and the scaling of every module, and the checks before use.

Whatever the folder holds is computed exactly or refused with the reason. peft_config.py and weights.py read its two files.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model_compose.errors import AdapterError
from model_compose.lora.peft_config import CONFIG_FILE, of_adapter, read_config, scaling
from model_compose.lora.weights import PREFIX, read_weights, same_values

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one module: ΔW = scaling · B A.

    a: (r, in), for an embedding (r, vocabulary). b: (out, r). Dtypes as stored.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self, weight: float = 1.0, device: "torch.device | None" = None) -> "torch.Tensor":
        """weight · scaling · B A, (out, in), float32, on `device` (where the factors are if None)."""
        import torch

        a, b = (factor.to(device, torch.float32) for factor in (self.a, self.b))
        return (weight * self.scaling) * (b @ a)


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter: its factors by module path as the base model names them ("model.layers.0.self_attn.q_proj").

    digest: sha256 over config and weights, so that the same name with new content is another identity.
    copies: base weights that PEFT stored along with an adapted embedding; they must equal the base's own.
    tied: whether it was trained with one pair of factors for an embedding and the output head that shares its weight.
    """

    name: str
    modules: Mapping[str, Factors]
    digest: str
    base: str | None = None
    copies: Mapping[str, "torch.Tensor"] = field(default_factory=dict)
    tied: bool = False


@dataclass(frozen=True)
class ModuleShape:
    """What the base has at a module path: its kind ("linear", "conv1d", "embedding") and sizes (in for an embedding is
    the vocabulary). tied: whether another module has the same weight."""

    kind: str
    inputs: int
    outputs: int
    tied: bool = False


def read_adapter(folder: Path, name: str) -> LoraAdapter:
    """Reads a PEFT folder. Raises AdapterError, with the adapter's name, for anything that is not plain LoRA."""
    config = read_config(folder, name)
    with of_adapter(name):
        path = weight_file(folder)
        # Read as a whole: a file that is mapped and written again would change the adapter while it serves, or end us.
        data = path.read_bytes()
        pairs, copies = read_weights(data, path)
        modules = {
            module: Factors(pair.a, pair.b, scaling(config, module, len(pair.a)), pair.embedding)
            for module, pair in pairs.items()
        }
        digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
        digest.update(data)
    tied = bool(config.get("ensure_weight_tying"))
    return LoraAdapter(name, modules, digest.hexdigest(), config.get("base_model_name_or_path"), copies, tied)


def weight_file(folder: Path) -> Path:
    """Raises AdapterError where there is none."""
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    raise AdapterError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}")


def check(adapter: LoraAdapter, shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
    """The preflight: every module exists in the base and fits. Returns the adapter with the base's own names for them.

    Raises AdapterError that names module and shapes.
    """
    adapter = _named_as_in(shapes, adapter)
    for path, factors in adapter.modules.items():
        shape = shapes.get(path)
        if shape is None:
            raise AdapterError(
                f"adapter '{adapter.name}': the base model has no module '{path}' that LoRA can act on; "
                "was the adapter trained for another architecture?"
            )
        if factors.embedding != (shape.kind == "embedding"):
            stored = "embedding" if factors.embedding else "linear"
            raise AdapterError(
                f"adapter '{adapter.name}': {path} is a {shape.kind} in the base, {stored} in the adapter"
            )
        found = (factors.a.shape[1], factors.b.shape[0])
        if found != (shape.inputs, shape.outputs):
            raise AdapterError(
                f"adapter '{adapter.name}': {path} has A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)}, which "
                f"fit a module of {found[0]} inputs and {found[1]} outputs; the base's has {shape.inputs} inputs and "
                f"{shape.outputs} outputs. The adapter belongs to another base model"
                + (f" ({adapter.base})." if adapter.base else ".")
            )
    if adapter.tied:
        _check_tied(adapter, {path for path, shape in shapes.items() if shape.tied})
    return adapter


_AROUND = re.compile(r"^(?:(?:model|language_model)\.)+")
"""What a path has before the text decoder's own part, by the version of transformers and the class that was trained:
model.layers, language_model.model.layers and model.language_model.layers are the same."""


def text_path(path: str) -> str:
    """A module's path within the text decoder: layers.0.self_attn.q_proj."""
    return _AROUND.sub("", path)


def _named_as_in(shapes: Mapping[str, ModuleShape], adapter: LoraAdapter) -> LoraAdapter:
    """The adapter with the base's paths for modules that it has under another prefix. Raises AdapterError."""
    if all(path in shapes for path in adapter.modules):
        return adapter
    own: dict[str, list[str]] = {}
    for path in shapes:
        own.setdefault(text_path(path), []).append(path)

    def name(path: str) -> str:
        found = own.get(text_path(path), ())
        return found[0] if path not in shapes and len(found) == 1 else path

    names = {path: name(path) for path in adapter.modules}
    found, times = Counter(names.values()).most_common(1)[0]
    if times > 1:
        same = " and ".join(f"'{path}'" for path in sorted(names) if names[path] == found)
        raise AdapterError(f"adapter '{adapter.name}': {same} are the same module '{found}' of this base")
    copies = {f"{name(key.removesuffix('.weight'))}.weight": copy for key, copy in adapter.copies.items()}
    return replace(adapter, modules={names[path]: pair for path, pair in adapter.modules.items()}, copies=copies)


def _check_tied(adapter: LoraAdapter, tied: set[str]) -> None:
    """PEFT's ensure_weight_tying trains one pair of factors for all modules that share a weight, and saves it for each:
    as a sum that is exact, if they are all there. Raises AdapterError."""
    import torch

    inside = tied & set(adapter.modules)
    if not inside:
        return
    if missing := tied - inside:
        raise AdapterError(
            f"adapter '{adapter.name}': it was trained with ensure_weight_tying, and the base ties {sorted(inside)[0]} to "
            f"{sorted(missing)[0]}, for which the adapter brings nothing"
        )
    pairs = [adapter.modules[path] for path in inside]
    # Seen as a matrix, an embedding is its head transposed.
    updates = [(pair.b.T, pair.a.T) if pair.embedding else (pair.a, pair.b) for pair in pairs]
    if not all(torch.equal(a, updates[0][0]) and torch.equal(b, updates[0][1]) for a, b in updates[1:]):
        raise AdapterError(
            f"adapter '{adapter.name}': it was trained with ensure_weight_tying, but brings different factors for "
            f"{' and '.join(sorted(inside))}, which are one weight in the base"
        )


def check_copies(adapter: LoraAdapter, holds: "Callable[[str, torch.Tensor], bool | None]") -> None:
    """PEFT may store the base's embedding along with its adapter; where it was trained, the sum would not be exact.

    holds: whether the base's parameter of this name is that tensor, None where that cannot be said. Raises AdapterError.
    """
    for name, copy in adapter.copies.items():
        if held := holds(name, copy):
            continue
        why = (
            "which cannot be compared with the base model's, since that is stored in fewer bits; save the adapter with "
            "save_embedding_layers=False if it is the base's"
            if held is None
            else "which differs from the base model's (a resized or trained embedding)"
        )
        raise AdapterError(
            f"adapter '{adapter.name}': it brings its own '{name}', {why}. Replaced weights cannot be weighted; such an "
            "adapter is refused."
        )


def is_copy(copy: "torch.Tensor", weight: "torch.Tensor | None") -> bool:
    """Whether `copy` is a base's weight, but for rounding to the dtype of either. None: the base has no such weight."""
    if weight is None:
        return False
    return same_values(copy, weight.to(copy.dtype)) or same_values(copy.to(weight.dtype), weight)


def write_adapter(adapter: LoraAdapter, folder: Path) -> None:
    """Writes a PEFT folder whose scaling is 1 in every module; `folder` must not exist yet.

    rank_pattern and alpha_pattern are both written, since the rank may differ by module.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    ranks = {path: factors.rank for path, factors in adapter.modules.items()}
    largest = max(ranks.values())
    patterns = {re.escape(path): rank for path, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for path, factors in adapter.modules.items():
        infix, suffix = ("lora_embedding_", "") if factors.embedding else ("lora_", ".weight")
        tensors[f"{PREFIX}{path}.{infix}A{suffix}"] = factors.a.contiguous()
        tensors[f"{PREFIX}{path}.{infix}B{suffix}"] = (factors.b * factors.scaling).contiguous()
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
