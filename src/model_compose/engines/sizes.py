"""How many bytes a base, an adapter and a token's keys and values are, by their configs alone.

The base is a model on the meta device, an adapter its PEFT config, so that nothing has to be fetched. Knows nothing of
devices, nor of how much fits.
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
"""Weights that share a float32 scale in nf4 and fp4."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a base's weight files. format: safetensors, gguf, other. size: bytes, None before a listing."""

    format: str = "safetensors"
    size: int | None = None


@dataclass(frozen=True)
class AdapterSize:
    """ranks: by module path. stored: bytes of its factors as its file has them, which stay in main memory beside the copy
    that computes; 0 where they are there already."""

    ranks: Mapping[str, int]
    stored: int


def checkpoint_of(sizes: Mapping[str, int], file: str | None = None) -> Checkpoint:
    """What a listing tells of the base. sizes: bytes by file name. file: the one that was asked for, a GGUF."""
    if file is not None:
        return Checkpoint("gguf", sizes.get(file))
    for format, endings in (("safetensors", (".safetensors",)), ("other", (".bin", ".pt", ".pth"))):
        if weights := [size for name, size in sizes.items() if name.endswith(endings)]:
            return Checkpoint(format, sum(weights))
    return Checkpoint()


def kv_bytes_per_token(config: Any, dtype: "torch.dtype") -> int:
    """Keys and values of one token in all layers. Sliding layers count alike. Raises LoadError for a model without them."""
    return sum(_kv_numbers(layer) for layer in layer_configs(config)) * dtype.itemsize


def layer_configs(config: Any) -> list[Any]:
    """The text model's config for each layer: most models have one for all, Gemma 4's layers differ."""
    config = config.get_text_config()
    count = int(config.num_hidden_layers)
    return list(config.per_layer_config) if config.is_heterogeneous else [config] * count


def _kv_numbers(config: Any) -> int:
    """How many numbers a layer keeps of a token: KV heads · (key size + value size)."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise LoadError(
            f"a model of type '{config.model_type}' has no attention heads, and the embedded engine keeps keys and values "
            "only; use another base"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotated = getattr(config, "qk_rope_head_dim", None)  # latent attention (DeepSeek): a part of the key is rotated
    key_dim = head_dim if rotated is None else config.qk_nope_head_dim + rotated
    return int(kv_heads * (key_dim + (getattr(config, "v_head_dim", None) or head_dim)))


def context_length(config: Any, *limits: int | None) -> int:
    """The longest prompt plus answer, in tokens: the model's own, or less where a limit (max_seq_length) says so."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min([int(limit) for limit in (own, *limits) if limit is not None] or [2048])


def base_bytes(
    model: "nn.Module", dtype: "torch.dtype", quantization: str | None = None, device_type: str = "cpu"
) -> int:
    """The parameters in `dtype`, tied ones once; where quantised, Linear weights packed with their scales.

    model: on the meta device. bitsandbytes (CUDA) leaves the output head as it is. A head that is tied to the embedding is
    packed besides the embedding, which stays plain.
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
    """Bytes of a Linear's weight (rows, columns) and its float32 scales, as native code or bitsandbytes keep it."""
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
    """What `precision: auto` resolves to on an accelerator: the config's dtype, else what the size of the files tells (a
    packed GGUF unpacks to float32). Where nothing is known the smallest, so that nobody is refused for a guess."""
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
    """An adapter by its PEFT config alone. stored: bytes of its weights' file; unknown, float32 is the upper bound.

    Raises AdapterError where it has no module in common with the base.
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
    """An adapter that has been read: its factors are in main memory, so they are no longer among what is free."""
    return AdapterSize({path: factors.rank for path, factors in adapter.modules.items()}, 0)


def stored_bits(config: Any) -> int | None:
    """Bits of a weight of a checkpoint that is quantised itself (GPTQ and its kind); None of one that is not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, Mapping) else stored.to_dict()
    eight = stored.get("bits") == 8 or stored.get("load_in_8bit") or stored.get("quant_method") == "fp8"
    return 8 if eight else 4


def _targets(config: Mapping[str, Any], model: "nn.Module", shapes: Mapping[str, "ModuleShape"]) -> list[str]:
    """The modules that the adapter acts on, chosen as peft chooses them, whose own matching of patterns may take for ever.

    Raises AdapterError for a pattern that is not evaluated.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from model_compose.lora.peft_config import check_plain, whole

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
        paths = targets = list(filter(whole("target_modules", targets), paths))
    if isinstance(excluded, str):
        matches = whole("exclude_modules", excluded)
        paths, excluded = [path for path in paths if not matches(path)], None
    check_plain("layers_pattern", [layers] if isinstance(layers, str) else layers or [])
    asked = SimpleNamespace(
        target_modules=targets, target_parameters=None, modules_to_save=None,
        exclude_modules=excluded, layers_to_transform=config.get("layers_to_transform"), layers_pattern=layers,
    )  # fmt: skip
    return [path for path in paths if check_target_module_exists(asked, path)]


def weight_of(model: "nn.Module", path: str) -> "torch.Tensor":
    module: Any = model.get_submodule(path)
    weight: torch.Tensor = module.weight
    return weight


def _head(model: "nn.Module") -> set[Any]:
    """The weight of the output head, which nobody means by "all linear"."""
    getter: Any = model
    head = getter.get_output_embeddings()
    return set() if head is None else {head.weight}


def parameters(ranks: Mapping[str, int], shapes: Mapping[str, "ModuleShape"]) -> int:
    """The numbers in A (r, in) and B (out, r) of all modules."""
    return sum(rank * (shapes[path].inputs + shapes[path].outputs) for path, rank in ranks.items())
