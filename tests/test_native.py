"""Native code against torch in float64, for sizes that fill no vector, tile or thread, and for several processors."""

import atexit
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model_compose.engines.huggingface.attention import Pass, Piece
from model_compose.engines.huggingface.cache import KVCache, LayerShape
from model_compose.engines.huggingface.decoder import Between, LlamaForward, NativeLayers, Sizes
from model_compose.engines.huggingface.quantized import NativeLinear, quantize, quantize_groups
from model_compose.lora.blend import Blend
from model_compose.lora.layers import LoraModel, module_shapes
from model_compose.native import FEW, Affine, CHeads, Kernels, compiling, kernels
from tests.lora.oracle import random_adapter

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler")

SIZE = st.integers(1, 70)
PORTABLE = [
    march
    for march, needed in {"x86-64": "sse2", "haswell": "avx2"}.items()
    if platform.machine() == "x86_64" and f" {needed} " in compiling._processor()
]


BUILD = st.sampled_from(["native", *PORTABLE])
"""For which processor the code is compiled: without vectors of 512 bits, or of 256 bits, other lines of it run."""


@functools.cache
def native(build: str = "native") -> Kernels:
    if build == "native":
        found = kernels()
        assert found is not None
        return found
    compiler = compiling.find_compiler()
    assert compiler is not None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        flags = [f"-march={build}" if flag.startswith("-march=") else flag for flag in compiling.FLAGS]
        patch.setattr(compiling, "FLAGS", tuple(flags))
        return compiling.load_compiled(compiler, Kernels)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-12)


def drawn(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@settings(deadline=None)
@given(BUILD, st.sampled_from([torch.float32, torch.bfloat16]), SIZE, SIZE, SIZE, st.booleans())
def test_products(build: str, dtype: torch.dtype, tokens: int, outputs: int, inputs: int, biased: bool) -> None:
    linear = nn.Linear(inputs, outputs, bias=biased, dtype=dtype)
    x = drawn(tokens, inputs)
    bias = None if linear.bias is None else linear.bias.double()
    wanted = F.linear(x.double(), linear.weight.double(), bias)
    affine = Affine(linear.weight.data, inputs, bias=None if bias is None else bias.float())
    assert close(native(build).linear(x, affine), wanted)
    assert close(NativeLinear(native(build), linear)(x), wanted)


@settings(deadline=None)
@given(
    BUILD, st.sampled_from(["int8", "int4"]), SIZE, SIZE, SIZE, st.booleans(), st.sampled_from([1e-40, 1e-9, 1.0, 1e9])
)
def test_products_with_packed_weights(
    build: str, kind: str, tokens: int, outputs: int, inputs: int, biased: bool, spread: float
) -> None:
    """Against the weights that the packed ones stand for, in float64: activations are rounded to 16 bits and no further."""
    if kind == "int4":
        inputs, outputs = (-(-size // 32) * 32 for size in (inputs, outputs))
    linear = nn.Linear(inputs, outputs, bias=biased)
    weight = linear.weight.data
    if kind == "int4":
        q, scales, offsets = (part.double() for part in quantize_groups(weight))
        stands_for = ((q.view(len(q), -1, 32) - 8) * scales[..., None] + offsets[..., None]).view_as(q)
    else:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        stands_for = (weight / scale).round().double() * scale.double()
    packed = quantize(kind, linear)
    assert isinstance(packed, NativeLinear)
    packed._native = native(build)
    x = drawn(tokens, inputs) * spread
    wanted = F.linear(x.double(), stands_for, None if linear.bias is None else linear.bias.double())
    # The roundings of one product are independent: some √inputs of them add up.
    largest = x.abs().amax().double() * stands_for.abs().amax() * inputs**0.5
    bound = 4 * largest * 2**-16 + 1e-6 * wanted.abs().max() + 1e-28  # what is smaller counts as zero
    assert (packed(x) - wanted).abs().max() <= bound
    assert close(packed(x[None].bfloat16())[0], wanted, 5e-2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_not_finite_stays_so(kind: str) -> None:
    """So that extreme weights of a blend are told, not hidden."""
    packed = quantize(kind, nn.Linear(64, 32, bias=False))
    for tokens in (1, 5):
        for value in (torch.inf, -torch.inf, torch.nan):
            x = drawn(tokens, 64)
            x[0, 40] = value
            y = packed(x)
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_token_is_computed_alone(kind: str) -> None:
    """Its numbers are the same whatever stands beside it, but for the order of a sum; among so many that torch computes
    them, but for the rounding of activations."""
    linear = nn.Linear(64, 96, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    module = NativeLinear(native(), linear) if kind == "bfloat16" else quantize(kind, linear)
    x = drawn(FEW + 200, 64) * torch.linspace(-3, 3, FEW + 200).exp()[:, None]
    alone = torch.cat([module(row[None]) for row in x])
    size = alone.abs().amax(dim=1, keepdim=True)
    assert ((module(x[:FEW]) - alone[:FEW]).abs() <= 2e-6 * size[:FEW]).all()
    assert ((module(x) - alone).abs() <= (1e-2 if kind == "bfloat16" else 1e-4) * size).all()


@settings(deadline=None)
@given(BUILD, SIZE, SIZE, SIZE, SIZE, st.integers(0, 3))
def test_low_rank(build: str, tokens: int, inputs: int, rank: int, outputs: int, zeros: int) -> None:
    x, a, v = drawn(tokens, inputs), drawn(rank, inputs, seed=1), drawn(tokens, rank, seed=2)
    v[:, :zeros] = 0  # adapters of other rows
    b, y = drawn(rank, outputs, seed=3), drawn(tokens, outputs, seed=4)
    wanted = y.double() + ((x.double() @ a.double().T) * v) @ b.double()
    native(build).low_rank(x, a, v, b, y)
    assert close(y, wanted, 2e-6)


ATTENTION = (
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 8, 10, 64]), st.booleans(),
    st.sampled_from([None, 1, 7]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip


@settings(deadline=None)
@given(BUILD, *ATTENTION, st.data())
def test_attention_is_that_of_torch(
    build: str,
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
    starts = data.draw(st.lists(st.integers(0, 50), min_size=rows, max_size=rows))
    heads = groups * shared
    weights = drawn(heads + groups, dim, seed=9) if normed else None
    layer: Any = SimpleNamespace(qk_norm=weights, window=window)  # of a Layer, what attention looks at
    angle = drawn(rows, dim // 2, seed=7)
    turn = (torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1))
    qkv = drawn(rows, (heads + 2 * groups) * dim, seed=8)
    shape = CHeads(heads, groups, dim, 1e-5, dim**-0.5)
    owner: Any = None  # of adapters, which attention does not look at
    outs = []
    for ours in (NativeLayers(native(build), owner, [], shape, torch.empty(0)), None):
        between = Between(Sizes(heads, groups, dim, 1e-5), F.silu, ours)
        cache = KVCache([LayerShape(groups, dim, dim, dtype, torch.device("cpu"))], 1 << 24, 64)
        taken = [row for row in (cache.take(60) for _ in range(rows)) if row is not None]
        block = taken[0].block
        for number, kept in enumerate(block.tensors):
            kept.copy_(drawn(*kept.shape, seed=number).to(dtype))
        step = Pass([Piece(row, [1], start) for row, start in zip(taken, starts, strict=True)], torch.device("cpu"))
        outs.append((between.attend(step, 0, layer, qkv.clone(), turn), *block.tensors))
    for one, other in zip(*outs, strict=True):
        assert close(one.float(), other.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@settings(deadline=None, max_examples=30)
@given(
    BUILD, st.integers(1, 3), st.sampled_from([8, 40, 72]), st.sampled_from([9, 64]), st.integers(1, 20), st.booleans(),
    st.sampled_from([1.0, 100.0, 3e4]), st.sampled_from([(), ("q_proj", "down_proj"), ("o_proj", "gate_proj", "up_proj")]),
)  # fmt: skip
def test_a_step_in_one_call_is_the_layers_by_torch(
    build: str, layers: int, size: int, inner: int, rows: int, biased: bool, spread: float, adapted: tuple[str, ...]
) -> None:
    """spread: of the gates, so that their exponentials overflow."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=size, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=biased, mlp_bias=biased,
    )  # fmt: skip
    logits = []
    for way in (native(build), None):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight *= spread
        paths = [path for path in module_shapes(model) if path.rpartition(".")[2] in adapted]
        ranks, scalings = [3] * len(paths), [0.7] * len(paths)
        adapters = [random_adapter(name, model, paths, ranks, scalings, seed=5) for name in ("ab" if paths else "")]
        lora = LoraModel(model, adapters)
        forward = LlamaForward(lora, None, way)
        cache = KVCache(forward.layers, 1 << 24, 64)
        taken = [row for row in (cache.take(60) for _ in range(rows)) if row is not None]
        blends = [Blend({"a": 0.1 * row, "b": 1.0} if adapters and row % 3 else {}) for row in range(rows)]
        for at in range(3):
            step = Pass([Piece(row, [at + 2], at) for row in taken], torch.device("cpu"))
            with torch.inference_mode(), lora.use([blends[i] for i in step.order], step.counts) as mix:
                logits.append(forward(step, mix)[torch.tensor(step.order).argsort()])
    for one, other in zip(logits[:3], logits[3:], strict=True):
        assert close(one, other, 1e-5)


def test_it_can_be_turned_off_and_does_without_a_compiler(tmp_path: Path) -> None:
    code = "from model_compose.native import kernels; print(kernels())"
    for change in ({"MODEL_COMPOSE_NATIVE": "0"}, {"CC": "/bin/false"}, {"CC": str(tmp_path / "missing")}):
        environment = {**os.environ, **change, "XDG_CACHE_HOME": str(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert ran.stdout == "None\n"
    assert not list(tmp_path.glob("**/*.so"))
