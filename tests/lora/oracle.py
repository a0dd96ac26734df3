"""The independent reference for blends: dense sums W + Σ w s B A in float64. Also makes random adapters for any base."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.layers import module_shapes

TOLERANCE = 1e-5
"""The largest allowed `error` in float32, for factors drawn with std ≤ 0.05. (With larger factors float32 itself errs.)"""


def dense(model: nn.Module, adapters: Iterable[LoraAdapter], weights: Mapping[str, float]) -> Any:
    """A float64 copy of the model with the weighted sum added to its weights. Tied weights are separated first."""
    reference = copy.deepcopy(model).double()
    for module in reference.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            module._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    for adapter in adapters:
        for path, factors in adapter.modules.items():
            module = reference.get_submodule(path)
            delta = weights.get(adapter.name, 0.0) * factors.scaling * (factors.b.double() @ factors.a.double())
            parameter: Any = module.weight
            parameter.data += delta if isinstance(module, nn.Linear) else delta.T
    return reference


def error(ours: Tensor, reference: Tensor) -> float:
    """max|ours - reference| / max|reference|"""
    return float((ours.double() - reference).abs().max() / reference.abs().max())


def random_adapter(
    name: str, model: nn.Module, paths: Iterable[str], ranks: Iterable[int], scalings: Iterable[float], seed: int
) -> LoraAdapter:
    """An adapter with random factors (std 0.05) for each path, each with its own rank and scaling."""
    generator = torch.Generator().manual_seed(seed)
    shapes = module_shapes(model)
    modules = {}
    for path, rank, scaling in zip(paths, ranks, scalings, strict=True):
        shape = shapes[path]
        a = torch.randn(rank, shape.inputs, generator=generator) * 0.05
        b = torch.randn(shape.outputs, rank, generator=generator) * 0.05
        modules[path] = Factors(a, b, scaling, shape.kind == "embedding")
    return LoraAdapter(name, modules, digest=name)
