"""A PEFT folder <-> `LoraAdapter`: the factors A and B and the scaling of every module, and the checks before use.

Whatever the folder holds is computed exactly or refused with the reason. PEFT itself only warns about config keys that
it does not know, so the decision rests on the lists below, not on PEFT.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.errors import AdapterError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Config keys whose value changes nothing in the forward pass, or is read below.
HARMLESS = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "runtime_config",
    ]
)
# Values of init_lora_weights that leave the base's weights as they are.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Features whose effect is more than s·B·A, and what a reader may know them as.
REFUSED = {
    "use_dora": "DoRA rescales the merged weight, so its effect is not a weighted sum",
    "lora_bias": "a bias on B is not part of the low-rank sum",
    "modules_to_save": "it replaces whole modules of the base, which cannot be weighted",
    "trainable_token_indices": "it replaces rows of the embedding, which cannot be weighted",
    "target_parameters": "LoRA on bare parameters (experts) is not supported",
    "layer_replication": "it changes the number of layers",
    "alora_invocation_tokens": "aLoRA switches on in the middle of a prompt",
    "ensure_weight_tying": "it ties the adapter of the embedding to the one of lm_head",
    "enable_lora": "merged projections of PEFT before 0.1 are not supported",
    "merge_weights": "merged projections of PEFT before 0.1 are not supported",
}


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
    """

    name: str
    modules: Mapping[str, Factors]
    digest: str
    base: str | None = None
    copies: Mapping[str, "torch.Tensor"] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleShape:
    """What the base has at a module path: its kind ("linear", "conv1d", "embedding") and sizes (in for an embedding is
    the vocabulary)."""

    kind: str
    inputs: int
    outputs: int


def read_adapter(folder: Path, name: str) -> LoraAdapter:
    """Reads a PEFT folder. Raises AdapterError, with the adapter's name, for anything that is not plain LoRA."""
    config = read_config(folder, name)
    path = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if path is None:
        raise AdapterError(f"adapter '{name}': {folder} holds neither {' nor '.join(WEIGHT_FILES)}")
    tensors = _read_tensors(path, name)
    modules, copies = _group(tensors, config, name)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return LoraAdapter(name, modules, digest.hexdigest(), config.get("base_model_name_or_path"), copies)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's config, checked against the lists of what is exact. Raises AdapterError."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"adapter '{name}': {folder} has no {CONFIG_FILE}; is it a PEFT adapter's folder?") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterError(f"adapter '{name}': {path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"adapter '{name}': {path} must hold a JSON object")
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"adapter '{name}': peft_type is {kind!r}; only 'LORA' adapters can be combined")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise AdapterError(
            f"adapter '{name}': init_lora_weights is {init!r}, which changes the base model's own weights when it is "
            "loaded (PiSSA, OLoRA, CorDA, LoftQ); convert it to a plain LoRA first (PEFT: "
            "save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise AdapterError(f"adapter '{name}': bias is {bias!r}; only 'none' is a weighted low-rank sum")
    patterns = config.get("alpha_pattern") or {}
    for key, alpha in {"lora_alpha": config.get("lora_alpha", 8), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise AdapterError(f"adapter '{name}': the alpha of {key} is {alpha!r}, not a number")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(f"adapter '{name}': alpha_pattern '{key}' is no pattern ({error})") from None
    for key, value in config.items():
        if key in HARMLESS or key in ("init_lora_weights", "bias") or value in (None, False, [], {}, ""):
            continue
        reason = REFUSED.get(key, "model-compose does not know this option, and might compute something else")
        raise AdapterError(f"adapter '{name}': {key} is {_short(value)}; {reason}. Such an adapter is refused.")
    return config


def check(adapter: LoraAdapter, shapes: Mapping[str, ModuleShape]) -> None:
    """The preflight: every module exists in the base and fits. Raises AdapterError that names module and shapes."""
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


def check_copy(adapter: LoraAdapter, name: str, copy: "torch.Tensor", weight: "torch.Tensor | None") -> None:
    """PEFT may store the base's embedding along with its adapter; where it was trained, the sum would not be exact.

    name: the parameter. weight: the base's own, None where it has none. Raises AdapterError where they differ.
    """
    import torch

    if weight is None or weight.shape != copy.shape or not torch.equal(copy.to(weight.device, weight.dtype), weight):
        raise AdapterError(
            f"adapter '{adapter.name}': it brings its own '{name}', which differs from the base model's (a resized or "
            "trained embedding). Replaced weights cannot be weighted; such an adapter is refused."
        )


def _read_tensors(path: Path, name: str) -> dict[str, "torch.Tensor"]:
    """Tensors by their stored names. A .bin is a pickle: read with weights_only=True, which executes nothing."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"adapter '{name}': {path} cannot be read ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise AdapterError(f"adapter '{name}': {path} does not hold a mapping of names to tensors")
    return tensors


_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.[^.]+)?$")
_PREFIX = "base_model.model."


def _group(
    tensors: Mapping[str, "torch.Tensor"], config: Mapping[str, Any], name: str
) -> tuple[dict[str, Factors], dict[str, "torch.Tensor"]]:
    """Stored tensors -> factors by module path, and copies of base weights by parameter name."""
    import torch

    sides: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    copies: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(_PREFIX)
        match = _FACTOR.match(bare.removesuffix(".weight"))
        if match and not bare.endswith(".bias"):
            sides.setdefault(match["path"], {})[match["which"]] = tensor
            if match["embedding"]:
                embeddings.add(match["path"])
        elif "lora_" not in bare and "modules_to_save" not in bare and bare.endswith(".weight"):
            copies[bare.replace(".base_layer.weight", ".weight")] = tensor
        else:
            raise AdapterError(
                f"adapter '{name}': the tensor '{key}' is not a LoRA factor; such an adapter would not be exact"
            )
    if not sides:
        raise AdapterError(f"adapter '{name}': its weights hold no lora_A and lora_B tensors")
    modules = {}
    for path, pair in sides.items():
        if set(pair) != {"A", "B"}:
            missing = "AB".replace(next(iter(pair)), "")
            raise AdapterError(f"adapter '{name}': {path} has no lora_{missing}")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"adapter '{name}': {path} has A {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, in) and (out, r)"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"adapter '{name}': {path} holds NaN or infinite values")
        modules[path] = Factors(a, b, scaling(config, path, a.shape[0]), path in embeddings)
    return modules, copies


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """s = alpha / r, or alpha / √r for rsLoRA (arXiv 2312.03732); alpha per module where alpha_pattern names it."""
    alpha = _pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first key that matches the end of the path, as PEFT's get_pattern_key decides it."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


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
        tensors[f"{_PREFIX}{path}.{infix}A{suffix}"] = factors.a.contiguous()
        tensors[f"{_PREFIX}{path}.{infix}B{suffix}"] = (factors.b * factors.scaling).contiguous()
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
