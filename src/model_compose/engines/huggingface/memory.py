"""How much memory a model needs on each device, computed from configs before any weights are read.

`plan` prints these numbers, `up` refuses a model that does not fit, and the engine chooses the size of its KV cache.
sizes.py reads the sizes of the parts from their configs. This module knows nothing of where files come from.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model_compose.engines import ENGINES
from model_compose.engines.devices import KINDS, Devices, device_name, free_memory, pick_dtype
from model_compose.engines.huggingface.options import HuggingfaceOptions
from model_compose.engines.needs import LEAST_TOKENS, Needs, limit_context
from model_compose.engines.options import ModelOptions
from model_compose.engines.sizes import (
    AdapterSize,
    Checkpoint,
    base_bytes,
    checkpoint_dtype,
    context_length,
    kv_bytes_per_token,
    layer_configs,
    parameters,
    stored_bits,
    weight_of,
)
from model_compose.lora.blend import Blend
from model_compose.lora.methods import LowRank

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model_compose.engines.blueprint import Blueprint
    from model_compose.engines.huggingface.cache import KVCache, LayerShape

log = logging.getLogger(__name__)

UNKNOWN_MEMORY = 8 << 30
"""The free memory that we assume if the system does not tell it."""


def kv_budget(
    options: HuggingfaceOptions, device: "torch.device", free_bytes: int, per_token: int, context: int
) -> int:
    """Bytes for the KV cache. free_bytes: what is free on the device once the weights are there.

    That is `kv_cache` if it is given. Otherwise it is 90 % of an accelerator's free memory, as activations need the
    rest, or a quarter of a CPU's, as other programs use it, too. It is never more than max_batch_size texts of the
    whole context can fill.
    """
    if options.kv_cache is not None:
        return int(options.kv_cache)
    share = free_bytes // 4 if device.type == "cpu" else free_bytes * 9 // 10
    return max(0, min(share, options.max_batch_size * context * per_token))


def open_cache(
    layers: "list[LayerShape]", device: "torch.device", context: int, options: HuggingfaceOptions
) -> "tuple[KVCache, int]":
    """The KV cache, and the longest context in tokens, which one sequence alone can fill.

    Called once the weights are loaded.

    layers: what the model keeps for each token. context: the model's own limit. Raises LoadError if kv_cache is too
    small for max_context, or for any sequence.
    """
    from model_compose.engines.huggingface.cache import SMALLEST, KVCache

    per_token = sum(shape.token_bytes for shape in layers)
    context = min(context, options.max_context or context)
    row = -(-context // SMALLEST) * SMALLEST
    free = free_memory(device)
    budget = kv_budget(options, device, UNKNOWN_MEMORY if free is None else free, per_token, row)
    holds = budget // per_token // SMALLEST * SMALLEST
    wanted = SMALLEST if options.max_context is None else row
    context = limit_context(budget, per_token, holds, context, wanted)
    return KVCache(layers, budget, context), context


def needs(
    options: ModelOptions,
    blueprint: "Blueprint",
    adapters: Mapping[str, AdapterSize],
    checkpoint: Checkpoint,
    devices: Devices,
) -> tuple[Needs, ...]:
    """What each device has to hold. The base's device comes first.

    adapters: by name, without those whose size is not known yet. devices: this machine's, or those that `plan`
    pretends. Raises LoadError for a device that is not there.
    """
    import torch

    model, name = blueprint.model, blueprint.name
    device = devices.pick(options.device)
    dtype = pick_dtype(options.precision, device)
    own, shapes = checkpoint_dtype(model, checkpoint), blueprint.shapes
    compute = dtype if isinstance(dtype, torch.dtype) else own
    in_place = device.type == "cpu" and checkpoint.format == "safetensors" and compute == own
    blends = options.to_blends()
    touched = _touched(blends.default, adapters)
    copied = {path for blend in blends.full_rank for path in _touched(blend, adapters)}
    base = replace(
        Needs(name, device_name(device), devices.free(device)),
        **_base_needs(options, model, touched, in_place, device, compute, checkpoint),
        full_rank=sum(weight_of(model, path).numel() for path in copied) * compute.itemsize,
    )
    found = {base.device: base}

    def on(device: torch.device) -> Needs:
        return found.get(device_name(device)) or Needs(name, device_name(device), devices.free(device))

    for adapter_name, adapter in zip(options.adapter_names, options.peft_adapters, strict=True):
        if adapter_name in adapters:
            there = on(device if adapter.device is None else devices.pick(adapter.device))
            itemsize = (compute if adapter.precision == "auto" else getattr(torch, adapter.precision)).itemsize
            size = parameters(adapters[adapter_name].ranks, shapes) * itemsize
            found[there.device] = replace(there, adapters={**there.adapters, adapter_name: size})
    made = {blend.described: parameters(_compressed(blend, adapters), shapes) for blend in blends.low_rank}
    held = {name: size * compute.itemsize for name, size in made.items()}
    found[base.device] = replace(found[base.device], adapters={**found[base.device].adapters, **held})
    # The adapters that svd makes are kept in float32.
    if kept := sum(adapter.stored for adapter in adapters.values()) + 4 * sum(made.values()):
        found["cpu"] = replace(on(torch.device("cpu")), kept=kept)
    at_once = _own(options).max_adapters_on_device
    found = {key: replace(there, adapters_at_once=at_once) for key, there in found.items()}
    found[base.device] = _with_kv_cache(options, found[base.device], model.config, device, compute)
    return tuple(found.values())


def _touched(blend: Blend, adapters: Mapping[str, AdapterSize]) -> set[str]:
    """The modules that a blend changes."""
    return {path for adapter in adapters.keys() & blend.active for path in adapters[adapter].ranks}


def _compressed(blend: Blend, adapters: Mapping[str, AdapterSize]) -> dict[str, int]:
    """The ranks, by module, of the adapter that a method of low rank makes of a blend."""
    assert isinstance(blend.method, LowRank)
    known = [adapters[name].ranks for name in adapters.keys() & blend.active]
    return {
        path: min(blend.method.rank, sum(ranks.get(path, 0) for ranks in known)) for path in _touched(blend, adapters)
    }


def _base_needs(
    options: ModelOptions,
    model: "nn.Module",
    touched: set[str],
    in_place: bool,
    device: "torch.device",
    dtype: "torch.dtype",
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """The fields of `Needs` for the base's own weights. in_place: they can be used where the files are mapped."""
    import torch

    from model_compose.engines.huggingface.decoder import takes

    wish, bits, fold = options.quantization, stored_bits(model.config), _own(options).fold
    if wish is None and bits is not None:  # its files give the size; else this is a lower bound
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return {"base": checkpoint.size or numbers * bits // 8}
    base, smaller = base_bytes(model, dtype, wish, device.type), dict[str, int]()
    if wish is not None:
        converted = device.type == "cpu" and not in_place
        own = str(checkpoint_dtype(model, checkpoint)).removeprefix("torch.")
        if converted and checkpoint.format == "safetensors":
            smaller[f"precision: {own}"] = base
        return {"base": base, "loading": base_bytes(model, dtype) if converted else 0, "smaller": smaller}
    if dtype.itemsize > 2:
        smaller["precision: bfloat16"] = base_bytes(model, torch.bfloat16)
    for kind in KINDS.get(device.type, ())[:2]:
        if _honours(options, kind):
            smaller[f"quantization: {kind}"] = base_bytes(model, dtype, kind, device.type)
    folds = fold == "always" or (fold == "auto" and dtype == torch.float32)
    mapped = in_place and not takes(model)  # the lean decoder fuses weights, which copies most of them
    copied = sum(weight_of(model, path).numel() for path in touched) * dtype.itemsize
    return {
        "base": base,
        "mapped": mapped,
        "fold": fold if folds else "never",
        "folded": copied if folds and not mapped else 0,
        "smaller": smaller,
    }


def _with_kv_cache(
    options: ModelOptions, needs: Needs, config: Any, device: "torch.device", dtype: "torch.dtype"
) -> Needs:
    own = _own(options)
    context = context_length(config, options.max_seq_length, own.max_context)
    per_token = kv_bytes_per_token(config, dtype)
    most = own.max_batch_size * context * per_token
    left = most if needs.free is None else max(0, needs.free - needs.weights)
    cache = kv_budget(own, device, left, per_token, context)
    least = per_token * min(context, LEAST_TOKENS) if own.kv_cache is None else int(own.kv_cache)
    return replace(
        needs, context=context, kv_per_token=per_token, kv_cache=cache, kv_least=least,
        kv_given=own.kv_cache is not None, working=_working(config, own.max_batch_size, dtype, needs.adapters_held),
    )  # fmt: skip


def _working(config: Any, rows: int, dtype: "torch.dtype", adapters: int) -> int:
    """An estimate of the bytes that a step needs besides weights and cache.

    These are the activations of one layer (four as wide as the model, three as wide as its MLP), the logits of all rows
    with three float32 copies for sampling, and another copy of the adapters in use for their stacks, in which B is as
    wide as the fused products.
    """
    from model_compose.engines.huggingface.batch import PREFILL_TOKENS

    widest = max(_inner(layer) for layer in layer_configs(config))
    config = config.get_text_config()
    hidden = int(config.hidden_size)
    activations = (PREFILL_TOKENS + rows) * (4 * hidden + 3 * widest) * dtype.itemsize
    return activations + rows * int(config.vocab_size) * (dtype.itemsize + 12) + 2 * adapters


def _inner(config: Any) -> int:
    """The width of a layer's MLP. Gemma 3n lists the widths of all layers in each config."""
    inner: Any = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(inner) if isinstance(inner, list) else inner)


def _honours(options: ModelOptions, kind: str) -> bool:
    """Whether the driver takes this quantization: we must not suggest one that it refuses."""
    try:
        ENGINES[options.driver].refuse(options.model_copy(update={"quantization": kind}))
    except ValueError:
        return False
    return True


def _own(options: ModelOptions) -> HuggingfaceOptions:
    assert isinstance(options.options, HuggingfaceOptions)
    return options.options
