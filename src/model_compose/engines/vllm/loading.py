"""Fetches and reads the base and its adapters before vLLM starts, and checks them against each other. Blocks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_compose.engines.adapters import fetch_adapters
from model_compose.engines.on_disk import check_kind
from model_compose.engines.options import ModelOptions
from model_compose.engines.tokenizer import load_tokenizer
from model_compose.engines.vllm.server import RANKS
from model_compose.errors import AdapterError, InputError, LoadError
from model_compose.lora.adapter import Factors, LoraAdapter, ModuleShape, check
from model_compose.lora.blend import Blend, Blends
from model_compose.progress import Report
from model_compose.sources import Fetched, HuggingfaceSource, fetch

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""The files of a base that its tokenizer and shapes need, if another server has the weights."""


@dataclass(frozen=True)
class BaseDescription:
    """The base without its weights. eos: the token ids that end a text. shapes: the modules' shapes, by path."""

    base: Fetched
    config: Any
    tokenizer: Any
    eos: tuple[int, ...]
    shapes: Mapping[str, ModuleShape]

    @property
    def vocabulary(self) -> int:
        """The width of the logits."""
        return int(self.config.get_text_config().vocab_size)


def load(
    options: ModelOptions, base_dir: Path, report: Report, *, weights: bool
) -> tuple[BaseDescription, dict[str, LoraAdapter]]:
    """The base and its adapters by name. weights: whether the base's weights must be fetched.

    Raises SourceError, AdapterError or LoadError.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from model_compose.engines.blueprint import load_errors, read_blueprint

    transformers_logging.set_verbosity_error()
    adapters = {adapter.name: adapter for adapter in fetch_adapters(options, base_dir, report)}
    # Fetch and check the configs first: a problem should show before the weights are downloaded.
    small = SMALL_FILES if isinstance(options.model, HuggingfaceSource) else None
    base = fetch(options.model, base_dir=base_dir, only=small, report=report)
    check_kind(base, "vllm")
    blueprint = read_blueprint(options, base)
    with load_errors(blueprint.name, torch.device("meta")):
        adapters = {name: check_adapter(adapter, blueprint.shapes) for name, adapter in adapters.items()}
        tokenizer = load_tokenizer(base, options.trust_remote_code, chat=options.chats)
        eos = _eos(base, blueprint.config, tokenizer)
    if weights and small is not None:
        base = fetch(options.model, base_dir=base_dir, report=report)
    return BaseDescription(base, blueprint.config, tokenizer, eos, blueprint.shapes), adapters


def check_adapter(adapter: LoraAdapter, shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
    """The adapter with the base's module paths. Raises AdapterError if it does not fit, or holds copies of base weights."""
    adapter = check(adapter, shapes)
    if adapter.copies:
        raise AdapterError(
            f"adapter '{adapter.name}': it brings its own '{next(iter(adapter.copies))}', which vllm would ignore; if it "
            "equals the base's, save the adapter with save_embedding_layers=False, or use driver: huggingface, which "
            "compares the two"
        )
    return adapter


def zero_adapter(adapters: Iterable[LoraAdapter], shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
    """An adapter of zeros on one module. It is a module of the other adapters, if there are any, since vLLM takes those."""
    import torch

    paths = [*(path for adapter in adapters for path in adapter.modules), *shapes]
    path = next(path for path in paths if shapes[path].kind == "linear")
    shape = shapes[path]
    factors = Factors(torch.zeros(1, shape.inputs), torch.zeros(shape.outputs, 1), 1.0)
    return LoraAdapter("none", {path: factors}, digest="none")


def _eos(base: Fetched, config: Any, tokenizer: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    try:
        listed = GenerationConfig.from_pretrained(base.folder, local_files_only=True).eos_token_id
    except OSError:  # no generation_config.json
        listed = config.get_text_config().eos_token_id
    ids = listed if isinstance(listed, list) else [listed]
    return tuple({int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None})


def dtype_name(precision: str, config: Any, *, on_cpu: bool) -> str:
    """`precision` as a value of vLLM's --dtype. vLLM's own "auto" would load a float32 checkpoint in 16 bits."""
    import torch

    from model_compose.engines.devices import pick_dtype

    chosen = pick_dtype(precision, torch.device("cpu" if on_cpu else "cuda"))
    chosen = config.dtype if chosen == "auto" else chosen
    return str(chosen).removeprefix("torch.") if isinstance(chosen, torch.dtype) else "auto"


def kv_bytes_per_token(config: Any, dtype: str) -> int:
    """The bytes of one token's keys and values over all layers. dtype: as for vLLM's --dtype; auto counts as float16."""
    import torch

    from model_compose.engines import sizes

    return sizes.kv_bytes_per_token(config, getattr(torch, dtype, torch.float16))


# Ranks: when vLLM starts, it allocates memory for the largest rank that it allows.


def rank(blend: Blend, adapters: Mapping[str, LoraAdapter]) -> int:
    """The rank of the blend as one stacked adapter: the largest sum of the adapters' ranks in one module."""
    ranks: dict[str, int] = {}
    for name in blend.active:
        for path, factors in adapters[name].modules.items():
            ranks[path] = ranks.get(path, 0) + factors.rank
    return max(ranks.values(), default=0)


def choose_rank(blends: Blends, adapters: Mapping[str, LoraAdapter], limit: int | None) -> int:
    """The largest rank for which to start the server: `limit`; if it is None, enough for all adapters at once, but at most
    what vLLM allows.

    Raises LoadError if a blend of the file, or a single adapter, has a larger rank.
    """
    every = Blend(dict.fromkeys(adapters, 1.0))
    chosen = limit or next((allowed for allowed in RANKS if allowed >= rank(every, adapters)), RANKS[-1])
    single = (Blend({name: 1.0}, name) for name in adapters)
    for blend in (blends.default, *blends.named.values(), *single):
        if problem := too_large(blend, adapters, chosen):
            raise LoadError(problem, at=("max_lora_rank",))
    return chosen


def check_rank(blend: Blend, adapters: Mapping[str, LoraAdapter], limit: int) -> None:
    """Raise InputError for a blend whose rank is larger than the server's limit."""
    if problem := too_large(blend, adapters, limit):
        raise InputError(problem, field="blend")


def too_large(blend: Blend, adapters: Mapping[str, LoraAdapter], limit: int) -> str | None:
    """The error message for a blend whose rank is larger than `limit`; None if it is not."""
    needed = rank(blend, adapters)
    if needed <= limit:
        return None
    parts = " + ".join(f"{name} {rank(Blend({name: 1.0}), adapters)}" for name in blend.active)
    named = f"the blend '{blend.name}'" if blend.name else "this blend"
    larger = next((allowed for allowed in RANKS if allowed >= needed), None)
    remedies = ["fewer adapters"]
    if larger:
        remedies.append(f"options.max_lora_rank: {larger}")
    if blend.name:
        remedies.append("the blend as a model of its own (model-compose export --format merged)")
    return f"{named} has the rank {needed} ({parts}), but vllm was started for {limit}; use {', or '.join(remedies)}"
