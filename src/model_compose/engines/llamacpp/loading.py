"""What both ways of running llama.cpp do first: read base, adapters and tokenizer, and compute what fits. Blocks."""

import logging
from pathlib import Path
from typing import Any

import torch

from model_compose.engines.adapters import fetch_adapters
from model_compose.engines.devices import free_memory
from model_compose.engines.llamacpp.base import Base, read_base
from model_compose.engines.llamacpp.llama import Settings
from model_compose.engines.llamacpp.options import LlamacppOptions
from model_compose.engines.needs import limit_context
from model_compose.engines.on_disk import check_kind
from model_compose.engines.options import ModelOptions
from model_compose.engines.tokenizer import load_tokenizer
from model_compose.lora.adapter import LoraAdapter
from model_compose.progress import Report
from model_compose.sources import fetch

log = logging.getLogger(__name__)


def read(options: ModelOptions, base_dir: Path, report: Report) -> tuple[list[LoraAdapter], Base, Any]:
    """The adapters, the base (which they fit), and its tokenizer. Raises SourceError, AdapterError or LoadError."""
    adapters = fetch_adapters(options, base_dir, report)
    fetched = fetch(options.model, base_dir=base_dir, report=report)
    check_kind(fetched, "llamacpp")
    assert fetched.file is not None
    base = read_base(fetched.folder / fetched.file, fetched.identity)
    adapters = [base.check(adapter) for adapter in adapters]
    return adapters, base, load_tokenizer(fetched, trust_remote_code=False, chat=options.chats)


def kv_bytes_per_token(options: ModelOptions, base: Base) -> int:
    """The bytes of one token's keys and values: float32 with precision: float32, else float16."""
    return base.kv_bytes_per_token(4 if options.precision == "float32" else 2)


def room(options: ModelOptions, base: Base, *, rows: int = 1) -> tuple[int, int]:
    """The longest context, and how many tokens each row of the KV cache holds. rows: into how many rows the cache is
    divided; 1 if all texts share it.

    If kv_cache is not set, the cache holds a full context for each row, but takes at most a quarter of the free memory.
    Raises LoadError if the cache is too small for max_context, or for any text.
    """
    own = options.options
    assert isinstance(own, LlamacppOptions)
    wished = [limit for limit in (own.max_context, options.max_seq_length) if limit is not None]
    context = min([base.context, *wished])
    token_bytes = kv_bytes_per_token(options, base)
    free = free_memory(torch.device("cpu"))
    wanted = rows * context * token_bytes
    budget = wanted if free is None else min(wanted, free // 4)
    if own.kv_cache is not None:
        budget = int(own.kv_cache)
    cells = budget // token_bytes // rows
    least = context if own.max_context is not None else 1
    return limit_context(budget, token_bytes, cells, context, least, rows=rows), cells


def settings(options: ModelOptions, cells: int) -> Settings:
    """The settings for llama.cpp. cells: tokens in the KV cache, from `room`."""
    own = options.options
    assert isinstance(own, LlamacppOptions)
    float32 = options.precision == "float32"
    gpu_layers = 0 if options.device == "cpu" else -1 if own.n_gpu_layers is None else own.n_gpu_layers
    return Settings(
        cells=cells, rows=own.max_batch_size, tokens_per_step=own.n_batch,
        threads=own.n_threads or torch.get_num_threads(), gpu_layers=gpu_layers,
        kv_float32=float32, flash_attention=False if float32 and own.flash_attn is None else own.flash_attn,
    )  # fmt: skip
