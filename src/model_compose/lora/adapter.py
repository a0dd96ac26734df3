"""Reads a PEFT folder into a `LoraAdapter` (for every module the factors A and B and the scaling), checks it against a
base model, and writes it again.

An adapter whose effect we cannot compute exactly is refused, and the error gives the reason. peft_config.py reads the
folder's config, weights.py its weights.
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
from model_compose.lora.peft_config import CONFIG_FILE, naming_adapter, read_config, scaling
from model_compose.lora.weights import PREFIX, read_weights, same_values

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one module: ΔW = scaling · B A.

    a: (r, in); for an embedding, (r, vocabulary). b: (out, r). Both keep the dtype of the file.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self, weight: float = 1.0, device: "torch.device | None" = None) -> "torch.Tensor":
        """weight · scaling · B A, of shape (out, in), in float32, on `device` (None: where the factors are)."""
        import torch

        a, b = (factor.to(device, torch.float32) for factor in (self.a, self.b))
        return (weight * self.scaling) * (b @ a)


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter.

    modules: the factors, by the module's path in the base model ("model.layers.0.self_attn.q_proj").
    digest: sha256 of config and weights; it changes if the files change, though the adapter's name stays.
    base: the base model that it was trained on, according to its config.
    copies: base weights that PEFT stored beside an adapted embedding, by parameter name. They must equal the base's own.
    tied: whether one pair of factors was trained for all modules that share a weight (PEFT's ensure_weight_tying).
    """

    name: str
    modules: Mapping[str, Factors]
    digest: str
    base: str | None = None
    copies: Mapping[str, "torch.Tensor"] = field(default_factory=dict)
    tied: bool = False


@dataclass(frozen=True)
class ModuleShape:
    """The base's module at a path.

    kind: "linear", "conv1d" or "embedding". inputs: features in; for an embedding, the size of the vocabulary. outputs:
    features out. tied: whether another module uses the same weight.
    """

    kind: str
    inputs: int
    outputs: int
    tied: bool = False


def read_adapter(folder: Path, name: str) -> LoraAdapter:
    """Read a PEFT folder. Raises AdapterError, which names the adapter, for anything that is not plain LoRA."""
    config = read_config(folder, name)
    with naming_adapter(name):
        path = weight_file(folder)
        # Do not map the file: if it were overwritten while mapped, the adapter would change while it serves, or the
        # process would be killed (SIGBUS).
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
    """The path of the weights, safetensors first. Raises AdapterError if the folder has none."""
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    raise AdapterError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}")


def check(adapter: LoraAdapter, shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
    """Check that the base has every module of the adapter, with fitting sizes. shapes: the base's modules by path.

    Returns the adapter with the base's own module paths. Raises AdapterError, which names the module and the shapes.
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
                f"adapter '{adapter.name}': {path} is a {shape.kind} module in the base, but has {stored} factors in the "
                "adapter"
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


_DECODER_PREFIX = re.compile(r"^(?:(?:model|language_model)\.)+")
"""The part of a module's path before the text decoder's own. It depends on the version of transformers and on the class
that was trained: model.layers, language_model.model.layers and model.language_model.layers mean the same layers."""


def text_path(path: str) -> str:
    """A module's path within the text decoder: layers.0.self_attn.q_proj."""
    return _DECODER_PREFIX.sub("", path)


def _named_as_in(shapes: Mapping[str, ModuleShape], adapter: LoraAdapter) -> LoraAdapter:
    """The adapter with the base's module paths, where the adapter's own differ in their prefix.

    Raises AdapterError if two of its paths mean the same module.
    """
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
    """Check an adapter that was trained with PEFT's ensure_weight_tying. tied: the paths that share one weight.

    PEFT then trains one pair of factors for all modules that share the weight, and saves the pair once for each of them.
    We apply each module's pair on its own, which is exact if all of them are present and equal. Raises AdapterError.
    """
    import torch

    inside = tied & set(adapter.modules)
    if not inside:
        return
    if missing := tied - inside:
        raise AdapterError(
            f"adapter '{adapter.name}': it was trained with ensure_weight_tying, and the base ties {sorted(inside)[0]} to "
            f"{sorted(missing)[0]}, for which the adapter has no factors"
        )
    pairs = [adapter.modules[path] for path in inside]
    # As a matrix, an embedding's update is the transpose of the output head's.
    updates = [(pair.b.T, pair.a.T) if pair.embedding else (pair.a, pair.b) for pair in pairs]
    if not all(torch.equal(a, updates[0][0]) and torch.equal(b, updates[0][1]) for a, b in updates[1:]):
        raise AdapterError(
            f"adapter '{adapter.name}': it was trained with ensure_weight_tying, but has different factors for "
            f"{' and '.join(sorted(inside))}, which share one weight in the base"
        )


def check_copies(adapter: LoraAdapter, holds: "Callable[[str, torch.Tensor], bool | None]") -> None:
    """Check that the base weights stored in the adapter are the base's own; PEFT may store an adapted embedding's weight.

    If such a weight was trained or resized, the sum would not be exact. holds(name, copy): whether the base's parameter
    `name` equals `copy`; None if the two cannot be compared. Raises AdapterError.
    """
    for name, copy in adapter.copies.items():
        if held := holds(name, copy):
            continue
        why = (
            "which cannot be compared with the base model's, since the base is quantised; if the two are the same, save "
            "the adapter with save_embedding_layers=False"
            if held is None
            else "which differs from the base model's (a resized or trained embedding)"
        )
        raise AdapterError(
            f"adapter '{adapter.name}': it brings its own '{name}', {why}. An adapter that replaces base weights is "
            "refused, since a replacement cannot be scaled by a weight."
        )


def is_copy(copy: "torch.Tensor", weight: "torch.Tensor | None") -> bool:
    """Whether `copy` equals the base's `weight` after one is rounded to the other's dtype. `weight` is None if the base
    has no such parameter; they are then not equal."""
    if weight is None:
        return False
    return same_values(copy, weight.to(copy.dtype)) or same_values(copy.to(weight.dtype), weight)


def write_adapter(adapter: LoraAdapter, folder: Path) -> None:
    """Write a PEFT folder whose scaling is 1 in every module (B is multiplied by it). `folder` must not exist yet.

    Both rank_pattern and alpha_pattern are written, since the rank may differ between modules.
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
