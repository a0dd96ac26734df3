"""Writes the blend exactly, as one PEFT adapter A = [A_i], B = [w_i s_i B_i], which PEFT, vLLM and SGLang load."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from model_compose.export import Export, Format, overflow
from model_compose.export.card import write_card
from model_compose.lora.adapter import Factors, LoraAdapter, write_adapter
from model_compose.lora.blend import stack
from model_compose.progress import Report
from model_compose.sources import HuggingfaceSource


def write(export: Export, folder: Path, report: Report) -> None:
    """Write the adapter's folder, in float32 unless the order has another precision.

    Raises InputError for a blend of full rank, which no LoRA equals, and for factors that overflow the precision.
    """
    stacked = one_rank(stack(export.blend, export.adapters))
    if export.dtype is not None:
        stacked = _rounded(stacked, export.dtype)
    source = export.options.model
    base = source.repository if isinstance(source, HuggingfaceSource) else stacked.base or export.base_name
    write_adapter(replace(stacked, base=base), folder)
    write_card(export, folder, rank=next(iter(stacked.modules.values())).rank)


def one_rank(adapter: LoraAdapter) -> LoraAdapter:
    """The same adapter, with the factors of every module padded with zeros to the largest rank.

    SGLang slices its buffers by the config's single r (srt/lora/mem_pool.py). PEFT and newer versions of vLLM also read
    rank_pattern.
    """
    rank = max(factors.rank for factors in adapter.modules.values())
    modules = {
        path: replace(
            factors, a=F.pad(factors.a, (0, 0, 0, rank - factors.rank)), b=F.pad(factors.b, (0, rank - factors.rank))
        )
        for path, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _rounded(adapter: LoraAdapter, dtype: torch.dtype) -> LoraAdapter:
    """The adapter with its factors in `dtype`. Raises InputError if they overflow it."""

    def rounded(path: str, factors: Factors) -> Factors:
        a, b = factors.a.to(dtype), factors.b.to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise overflow(path)
        return replace(factors, a=a, b=b)

    return replace(adapter, modules={path: rounded(path, factors) for path, factors in adapter.modules.items()})


FORMAT = Format(write)
