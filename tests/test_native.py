"""native.c against torch in float64, at every size: what does not fill a vector, a tile or a thread included."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from model_compose.engines.huggingface.decoder import Between, Sizes
from model_compose.engines.huggingface.quantized import NativeLinear, quantize, quantize_groups
from model_compose.native import FEW, Kernels, Weight, kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler")

SIZE = st.integers(1, 70)


def native() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-12)


def drawn(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@settings(deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16]), SIZE, SIZE, SIZE, st.booleans())
def test_products(dtype: torch.dtype, tokens: int, outputs: int, inputs: int, biased: bool) -> None:
    linear = nn.Linear(inputs, outputs, bias=biased, dtype=dtype)
    x = drawn(tokens, inputs)
    bias = None if linear.bias is None else linear.bias.double()
    wanted = F.linear(x.double(), linear.weight.double(), bias)
    weight = Weight(linear.weight.data)
    assert close(native().linear(x, weight, None if bias is None else bias.float()), wanted)
    assert torch.equal(native().expand(weight), linear.weight.float())
    assert close(NativeLinear(native(), linear)(x), wanted)


@settings(deadline=None)
@given(st.sampled_from(["int8", "int4"]), SIZE, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_products_with_packed_weights(kind: str, tokens: int, outputs: int, inputs: int, biased: bool) -> None:
    """Against the weights that the packed ones stand for, in float64."""
    linear = nn.Linear(32 * inputs, 32 * outputs, bias=biased)
    weight = linear.weight.data
    if kind == "int4":
        q, scales, offsets = (part.double() for part in quantize_groups(weight))
        stands_for = ((q.view(len(q), -1, 32) - 8) * scales[..., None] + offsets[..., None]).view_as(q)
    else:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        stands_for = (weight / scale).round().double() * scale.double()
    packed = quantize(kind, linear)
    assert isinstance(packed, NativeLinear)
    x = drawn(tokens, 32 * inputs)
    wanted = F.linear(x.double(), stands_for, None if linear.bias is None else linear.bias.double())
    assert close(packed(x), wanted, 1e-5)
    assert close(packed(x[None].bfloat16())[0], wanted, 2e-2)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_many_tokens_are_as_few(kind: str) -> None:
    linear = nn.Linear(64, 96, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    module = NativeLinear(native(), linear) if kind == "bfloat16" else quantize(kind, linear)
    x = drawn(FEW + 1, 64)
    assert close(module(x), torch.cat([module(x[:5]), module(x[5:])]), 1e-6 if kind != "bfloat16" else 1e-2)


@settings(deadline=None)
@given(SIZE, SIZE, SIZE, SIZE, st.integers(0, 3))
def test_low_rank(tokens: int, inputs: int, rank: int, outputs: int, zeros: int) -> None:
    x, a, v = drawn(tokens, inputs), drawn(rank, inputs, seed=1), drawn(tokens, rank, seed=2)
    v[:, :zeros] = 0  # adapters of other rows
    b, y = drawn(rank, outputs, seed=3), drawn(tokens, outputs, seed=4)
    wanted = y.double() + 0.5 * ((x.double() @ a.double().T) * v) @ b.double()
    native().low_rank(x, a, v, b, y, 0.5)
    assert close(y, wanted, 2e-6)


@settings(deadline=None)
@given(SIZE, st.integers(1, 300), st.booleans())
def test_norms(rows: int, size: int, adds: bool) -> None:
    x, y, weight = drawn(rows, size), drawn(rows, size, seed=1) if adds else None, drawn(size, seed=2)
    total = x.double() if y is None else x.double() + y.double()
    out = native().add_norm(x, y, weight, 1e-5)
    assert close(x, total)
    assert close(out, F.rms_norm(total, (size,), weight.double(), 1e-5), 2e-6)


@settings(deadline=None)
@given(SIZE, st.integers(1, 100), st.sampled_from([1.0, 30.0, 1e4]))
def test_gates(rows: int, size: int, spread: float) -> None:
    gate_up = drawn(rows, 2 * size) * spread
    gate, up = gate_up.double().chunk(2, -1)
    assert close(native().silu_mul(gate_up), F.silu(gate) * up, 2e-6)


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 8, 10, 64]), st.booleans(),
    st.sampled_from([None, 1, 7]), st.sampled_from([torch.float32, torch.bfloat16]), st.data(),
)  # fmt: skip
def test_attention_is_that_of_torch(
    rows: int,
    groups: int,
    shared: int,
    dim: int,
    normed: bool,
    window: int | None,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """The two ways of the decoder: what they give, and what they leave in the cache."""
    from model_compose.engines.huggingface.attention import Pass, Piece
    from model_compose.engines.huggingface.cache import KVCache, LayerShape
    from model_compose.engines.huggingface.decoder import TorchBetween

    starts = data.draw(st.lists(st.integers(0, 50), min_size=rows, max_size=rows))
    sizes, heads = Sizes(groups * shared, groups, dim, 1e-5), groups * shared
    weights = drawn(heads + groups, dim, seed=9) if normed else None
    layer: Any = SimpleNamespace(qk_norm=weights, window=window)  # of a Layer, what attention looks at
    angle = drawn(rows, dim // 2, seed=7)
    turn = (torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1))
    qkv = drawn(rows, (heads + 2 * groups) * dim, seed=8)
    outs = []
    for between in (Between(sizes, native()), TorchBetween(sizes, F.silu)):
        cache = KVCache([LayerShape(groups, dim, dim, dtype, torch.device("cpu"))], 1 << 24, 64)
        taken = [row for row in (cache.take(60) for _ in range(rows)) if row is not None]
        block = taken[0].block
        for number, kept in enumerate(block.tensors):
            kept.copy_(drawn(*kept.shape, seed=number).to(dtype))
        step = Pass([Piece(row, [1], start) for row, start in zip(taken, starts, strict=True)], torch.device("cpu"))
        outs.append((between.attend(step, 0, layer, qkv.clone(), turn), *block.tensors))
    for one, other in zip(*outs, strict=True):
        assert close(one.float(), other.float(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_it_can_be_turned_off_and_does_without_a_compiler(tmp_path: Path) -> None:
    code = "from model_compose.native import kernels; print(kernels())"
    for change in ({"MODEL_COMPOSE_NATIVE": "0"}, {"CC": "/bin/false"}, {"CC": str(tmp_path / "missing")}):
        environment = {**os.environ, **change, "XDG_CACHE_HOME": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert ran.stdout == "None\n"
    assert not list(tmp_path.glob("**/*.so"))
