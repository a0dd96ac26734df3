"""Computes the bytes of a base, of an adapter, and of the keys and values of a token, from configs alone.

The base is given as a model on the meta device and an adapter as its PEFT config, so no weights have to be fetched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from model_compose.errors import AdapterError, LoadError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model_compose.lora.adapter import LoraAdapter, ModuleShape

BITSANDBYTES_BLOCK = 64
"""The number of weights that share one float32 scale in nf4 and fp4."""


@dataclass(frozen=True)
class Checkpoint:
    """A base's weight files. format: safetensors, gguf or other. size: their bytes; None if unknown."""

    format: str = "safetensors"
    size: int | None = None


@dataclass(frozen=True)
class AdapterSize:
    """An adapter's size. ranks: by module path. stored: the bytes of its factors as stored in its file, which stay in main
    memory beside the copy that computes; 0 if they are in main memory already."""

    ranks: Mapping[str, int]
    stored: int


def checkpoint_of(sizes: Mapping[str, int], file: str | None = None) -> Checkpoint:
    """The base's weight files, from a listing. sizes: bytes by file name. file: the GGUF file, if the base is one."""
    if file is not None:
        return Checkpoint("gguf", sizes.get(file))
    for format, endings in (("safetensors", (".safetensors",)), ("other", (".bin", ".pt", ".pth"))):
        if weights := [size for name, size in sizes.items() if name.endswith(endings)]:
            return Checkpoint(format, sum(weights))
    return Checkpoint()


def kv_bytes_per_token(config: Any, dtype: "torch.dtype") -> int:
    """The bytes of one token's keys and values over all layers. Layers with a sliding window count like others.

    Raises LoadError for a model without attention heads.
    """
    return sum(_kv_numbers(layer) for layer in layer_configs(config)) * dtype.itemsize


def layer_configs(config: Any) -> list[Any]:
    """The text model's config of each layer. Most models have the same for all layers; Gemma 4's layers differ."""
    config = config.get_text_config()
    count = int(config.num_hidden_layers)
    return list(config.per_layer_config) if config.is_heterogeneous else [config] * count


def _kv_numbers(config: Any) -> int:
    """How many numbers a layer caches for one token: KV heads · (key size + value size)."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise LoadError(
            f"a model of type '{config.model_type}' has no attention heads, and the embedded engine can only cache keys "
            "and values; use another base"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotated = getattr(config, "qk_rope_head_dim", None)  # latent attention (DeepSeek): only part of the key is rotated
    key_dim = head_dim if rotated is None else config.qk_nope_head_dim + rotated
    return int(kv_heads * (key_dim + (getattr(config, "v_head_dim", None) or head_dim)))


def context_length(config: Any, *limits: int | None) -> int:
    """The most tokens of a prompt with its answer: the model's own context, or a smaller limit (max_seq_length)."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min([int(limit) for limit in (own, *limits) if limit is not None] or [2048])


def base_bytes(
    model: "nn.Module", dtype: "torch.dtype", quantization: str | None = None, device_type: str = "cpu"
) -> int:
    """The bytes of the base's parameters in `dtype`, tied ones counted once. If quantised, Linear weights count as packed,
    with their scales.

    model: on the meta device. bitsandbytes (CUDA) does not quantise the output head. If a quantised head is tied to the
    embedding, both exist: the packed head and the plain embedding.
    """
    from torch import nn

    if quantization is None:
        return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    head = _head(model)
    linears = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and (device_type == "cpu" or module.weight not in head)
    }
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    plain = sum(weight.numel() for weight in model.parameters() if weight not in linears or weight in embeddings)
    packed = sum(_packed(weight, quantization, device_type, is_head=weight in head) for weight in linears)
    return plain * dtype.itemsize + packed


def _packed(weight: "torch.Tensor", kind: str, device_type: str, *, is_head: bool) -> int:
    """The bytes of a quantised Linear weight (rows, columns) with its float32 scales, in our native code or
    bitsandbytes."""
    from model_compose.native import GROUP

    rows, columns = weight.shape
    if device_type == "cpu" and kind == "int4" and not is_head and rows % GROUP == 0 and columns % GROUP == 0:
        return rows * columns // 2 + 8 * rows * columns // GROUP
    if device_type == "cpu":
        return rows * -(-columns // GROUP) * GROUP + 4 * rows
    if kind == "int8":
        return rows * columns + 4 * rows
    return -(-rows * columns // 2) + 4 * -(-rows * columns // BITSANDBYTES_BLOCK)


def checkpoint_dtype(model: "nn.Module", checkpoint: Checkpoint) -> "torch.dtype":
    """The dtype of `precision: auto` on an accelerator: the config's, else the one that fits the size of the files (a
    quantised GGUF is dequantised to float32). If nothing is known, it is the smallest, so that a guess refuses nobody."""
    import torch

    config: Any = model.config
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if checkpoint.size is None:
        return torch.float16
    a_parameter = checkpoint.size / sum(parameter.numel() for parameter in model.parameters())
    whole = a_parameter > 3 or (checkpoint.format == "gguf" and a_parameter < 1.5)
    return torch.float32 if whole else torch.float16


def adapter_size(config: Mapping[str, Any], model: "nn.Module", name: str, stored: int | None = None) -> AdapterSize:
    """An adapter's size from its PEFT config. stored: the bytes of its weights' file; if None, float32's size is assumed,
    which is the upper bound.

    Raises AdapterError if the base has none of its target modules.
    """
    from model_compose.lora.layers import module_shapes
    from model_compose.lora.peft_config import rank_of

    shapes = module_shapes(model)
    targets = _targets(config, model, shapes)
    if not targets:
        raise AdapterError(
            f"adapter '{name}': the base model has none of its target_modules ({config.get('target_modules')}); was the "
            "adapter trained for another architecture?"
        )
    ranks = {path: rank_of(config, path) for path in targets}
    return AdapterSize(ranks, parameters(ranks, shapes) * 4 if stored is None else stored)


def loaded_size(adapter: "LoraAdapter") -> AdapterSize:
    """The size of an adapter that has been read. Its factors are in main memory already, so `stored` is 0."""
    return AdapterSize({path: factors.rank for path, factors in adapter.modules.items()}, 0)


def stored_bits(config: Any) -> int | None:
    """The bits per weight of a checkpoint that is stored quantised (GPTQ and the like); None if it is not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, Mapping) else stored.to_dict()
    eight = stored.get("bits") == 8 or stored.get("load_in_8bit") or stored.get("quant_method") == "fp8"
    return 8 if eight else 4


def _targets(config: Mapping[str, Any], model: "nn.Module", shapes: Mapping[str, "ModuleShape"]) -> list[str]:
    """The modules that the adapter targets, by PEFT's rules. Patterns are matched by our own code, since PEFT's
    matching may take years.

    Raises AdapterError for a pattern that we do not evaluate.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from model_compose.lora.peft_config import check_plain, full_matcher

    targets: Any = config.get("target_modules")
    excluded: Any = config.get("exclude_modules")
    layers: Any = config.get("layers_pattern")
    paths = list(shapes)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _head(model)
        return [
            path for path, shape in shapes.items() if shape.kind != "embedding" and weight_of(model, path) not in head
        ]
    if targets is None:
        own_config: Any = model.config
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(own_config.model_type, [])
    if isinstance(targets, str):
        paths = targets = list(filter(full_matcher("target_modules", targets), paths))
    if isinstance(excluded, str):
        matches = full_matcher("exclude_modules", excluded)
        paths, excluded = [path for path in paths if not matches(path)], None
    check_plain("layers_pattern", [layers] if isinstance(layers, str) else layers or [])
    asked = SimpleNamespace(
        target_modules=targets, target_parameters=None, modules_to_save=None,
        exclude_modules=excluded, layers_to_transform=config.get("layers_to_transform"), layers_pattern=layers,
    )  # fmt: skip
    return [path for path in paths if check_target_module_exists(asked, path)]


def weight_of(model: "nn.Module", path: str) -> "torch.Tensor":
    """The weight of the module at `path`."""
    module: Any = model.get_submodule(path)
    weight: torch.Tensor = module.weight
    return weight


def _head(model: "nn.Module") -> set[Any]:
    """The weight of the output head, which PEFT's "all-linear" leaves out; empty if the model has none."""
    getter: Any = model
    head = getter.get_output_embeddings()
    return set() if head is None else {head.weight}


def parameters(ranks: Mapping[str, int], shapes: Mapping[str, "ModuleShape"]) -> int:
    """How many numbers A (r, in) and B (out, r) have over all modules."""
    return sum(rank * (shapes[path].inputs + shapes[path].outputs) for path, rank in ranks.items())
