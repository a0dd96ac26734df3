"""One PEFT adapter that is exactly the blend: A = [A_i], B = [w_i s_i B_i], as PEFT, vLLM and SGLang load it."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from model_compose.export import Export, Format
from model_compose.export.card import write_card
from model_compose.lora.adapter import Factors, LoraAdapter, write_adapter
from model_compose.lora.blend import stack
from model_compose.progress import Report
from model_compose.sources import HuggingfaceSource


def write(export: Export, folder: Path, report: Report) -> None:
    """float32 unless another dtype was asked for. Raises InputError for a dtype that does not hold the factors."""
    stacked = one_rank(stack(export.blend, export.adapters))
    if export.dtype is not None:
        stacked = _rounded(stacked, export.dtype)
    source = export.options.model
    base = source.repository if isinstance(source, HuggingfaceSource) else stacked.base or export.base_name
    write_adapter(replace(stacked, base=base), folder)
    write_card(export, folder, rank=next(iter(stacked.modules.values())).rank)


def one_rank(adapter: LoraAdapter) -> LoraAdapter:
    """The same function with every module at the largest rank, padded with zeros.

    SGLang slices its buffers by the config's one r (srt/lora/mem_pool.py); PEFT and newer versions of vLLM read
    rank_pattern as well.
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
    def rounded(factors: Factors) -> Factors:
        return replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype))

    return replace(adapter, modules={path: rounded(factors) for path, factors in adapter.modules.items()})


FORMAT = Format(write)
