"""What is known before llama.cpp computes, here or in another process: base, adapters, tokenizer, what fits. Blocking."""

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
    """The adapters, the base that they fit, and its tokenizer. Raises SourceError, AdapterError, LoadError."""
    adapters = fetch_adapters(options, base_dir, report)
    fetched = fetch(options.model, base_dir=base_dir, report=report)
    check_kind(fetched, "llamacpp")
    assert fetched.file is not None
    base = read_base(fetched.folder / fetched.file, fetched.identity)
    adapters = [base.check(adapter) for adapter in adapters]
    return adapters, base, load_tokenizer(fetched, trust_remote_code=False, chat=options.chats)


def kv_bytes_per_token(options: ModelOptions, base: Base) -> int:
    """Keys and values of one token, of which `precision` decides the size."""
    return base.kv_bytes_per_token(4 if options.precision == "float32" else 2)


def room(options: ModelOptions, base: Base, *, rows: int = 1) -> tuple[int, int]:
    """The longest context, and how many tokens each row of the KV cache holds; if it is unset, a context for each, or a
    quarter of what is free. rows: into which it is divided; 1 where all texts share it.

    Raises LoadError where it is too small for max_context, or for any text.
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
    own = options.options
    assert isinstance(own, LlamacppOptions)
    float32 = options.precision == "float32"
    gpu_layers = 0 if options.device == "cpu" else -1 if own.n_gpu_layers is None else own.n_gpu_layers
    return Settings(
        cells=cells, rows=own.max_batch_size, tokens_per_step=own.n_batch,
        threads=own.n_threads or torch.get_num_threads(), gpu_layers=gpu_layers,
        kv_float32=float32, flash_attention=False if float32 and own.flash_attn is None else own.flash_attn,
    )  # fmt: skip
