"""Norms, inner products and angles from the factors are those of the dense updates, computed by numpy alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.geometry import Geometry, basis, inner, measure, overlap, place

PATHS = ("model.embed_tokens", "model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.2.v_proj", "lm_head")
SHAPES = {path: (5 + i, 7 - i) for i, path in enumerate(PATHS)}
"""(out, in)"""


WEIGHT = st.integers(-2000, 2000).map(lambda thousandths: thousandths / 1000)
"""A multiple of 0.001: a smaller weight's square could underflow to 0."""


@st.composite
def adapters(draw: st.DrawFn, name: str) -> LoraAdapter:
    """Random modules of random ranks, dtypes and sizes. Some updates are zero ("zero"), and some have a lower rank than
    their factors' shapes say ("twin", with two equal columns)."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    modules = {}
    for path in draw(st.sets(st.sampled_from(PATHS), min_size=1)):
        out, inputs = SHAPES[path]
        rank = draw(st.integers(1, 9))
        b, a = random.normal(size=(out, rank)), random.normal(size=(rank, inputs))
        kind = draw(st.sampled_from(["plain", "plain", "zero", "twin"]))
        if kind == "zero":
            b[:] = 0
        if kind == "twin":
            b[:, -1] = b[:, 0]
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        scale = 10.0 ** draw(st.integers(-3, 2))
        parts = torch.tensor(a * scale).to(dtype), torch.tensor(b).to(dtype)
        modules[path] = Factors(*parts, draw(st.floats(0.1, 4)))
    return LoraAdapter(name, modules, name)


def dense(adapter: LoraAdapter, path: str) -> Any:
    if path not in adapter.modules:
        return np.zeros(SHAPES[path])
    factors = adapter.modules[path]
    return factors.scaling * factors.b.double().numpy() @ factors.a.double().numpy()


def whole(adapter: LoraAdapter) -> Any:
    return np.concatenate([dense(adapter, path).ravel() for path in PATHS])


def projector(matrix: Any) -> Any:
    return matrix @ np.linalg.pinv(matrix, rcond=1e-12)


@settings(max_examples=150, deadline=None)
@given(adapters("one"), adapters("other"), WEIGHT, WEIGHT)
def test_norms_shares_and_cosines_are_those_of_the_dense_updates(
    one: LoraAdapter, other: LoraAdapter, w: float, v: float
) -> None:
    made = measure([one, other])
    a, b = whole(one), whole(other)
    weights = {"one": w, "other": v}
    assert list(made.norms().values()) == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)])
    scale = np.linalg.norm(a) * abs(w) + np.linalg.norm(b) * abs(v)
    assert made.blend_norm(weights) == pytest.approx(np.linalg.norm(w * a + v * b), abs=float(1e-7 * scale))
    shares = made.shares(weights)
    assert list(shares.values()) == pytest.approx(
        [abs(w) * np.linalg.norm(a) / scale, abs(v) * np.linalg.norm(b) / scale] if scale else [0, 0]
    )
    for path in {*one.modules, *other.modules}:
        found = made.norms(layer=place(path).layer)
        assert found == pytest.approx({each.name: np.linalg.norm(dense(each, path)) for each in (one, other)})
    (pair,) = made.pairs
    if np.linalg.norm(a) * np.linalg.norm(b):
        assert pair.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    else:
        assert pair.cosine is None
    assert pair.modules == len(one.modules.keys() & other.modules.keys())


@settings(max_examples=150, deadline=None)
@given(adapters("one"), adapters("other"))
def test_overlaps_are_those_of_the_projectors(one: LoraAdapter, other: LoraAdapter) -> None:
    """tr(P₁P₂) = ‖Q₁ᵀQ₂‖²_F, where P₁ and P₂ project onto the two subspaces."""
    sides: dict[str, list[float]] = {"inputs": [], "outputs": []}
    for path in one.modules.keys() & other.modules.keys():
        for side in sides:
            both = [each.modules[path] for each in (one, other)]
            p, q = (projector((f.a.T if side == "inputs" else f.b).double().numpy()) for f in both)
            ranks = [round(np.trace(each)) for each in (p, q)]
            if min(ranks):
                sides[side].append(np.trace(p @ q) / min(ranks))
    (pair,) = measure([one, other]).pairs
    for side, expected in sides.items():
        found = getattr(pair, side)
        assert (found is None) == (not expected)
        if found is not None:
            assert found.value == pytest.approx(np.mean(expected), abs=1e-9)
            assert 0 <= found.value <= 1 + 1e-12


def test_the_overlap_of_equal_contained_and_orthogonal_subspaces() -> None:
    """The overlap is 1 for another basis of the same subspace and for a larger subspace that contains it, and 0 for an
    orthogonal one."""
    torch.manual_seed(0)
    b = torch.randn(40, 4, dtype=torch.float64)
    same, wider = basis(b @ torch.randn(4, 4, dtype=torch.float64)), basis(torch.cat([b, torch.randn(40, 3)], dim=1))
    apart = torch.linalg.qr(b, mode="complete")[0][:, 4:9]
    for other, expected in ((same, 1.0), (wider, 1.0), (apart, 0.0)):
        found = overlap(basis(b), other)
        assert found is not None
        assert found.value == pytest.approx(expected, abs=1e-12)


def test_random_subspaces_overlap_by_chance() -> None:
    torch.manual_seed(0)
    found = [overlap(basis(torch.randn(64, 8)), basis(torch.randn(64, 4))) for _ in range(200)]
    assert found[0] is not None
    assert found[0].by_chance == 8 / 64
    assert np.mean([each.value for each in found if each]) == pytest.approx(8 / 64, rel=0.05)


def test_the_same_adapter_cancels_itself() -> None:
    torch.manual_seed(0)
    factors = Factors(torch.randn(3, 7), torch.randn(5, 3), 2.0)
    pair = [LoraAdapter(name, {"layers.0.q_proj": factors}, name) for name in "ab"]
    made = measure(pair)
    norm = math.sqrt(inner(factors, factors))
    assert made.pairs[0].cosine == pytest.approx(1.0)
    assert made.blend_norm({"a": 1.0, "b": 1.0}) == pytest.approx(2 * norm)
    assert made.blend_norm({"a": 1.0, "b": -1.0}) < 1e-6 * norm
    assert made.shares({"a": 1.0, "b": -1.0}) == {"a": 0.5, "b": 0.5}


def test_layers_are_listed_in_the_order_of_the_model() -> None:
    torch.manual_seed(0)
    modules = {path: Factors(torch.randn(2, i), torch.randn(o, 2), 1.0) for path, (o, i) in SHAPES.items()}
    made = measure([LoraAdapter("x", modules, "x")])
    assert made.layers == ("embed_tokens", "0", "2", "10", "lm_head")
    assert made.targets == ("embed_tokens", "q_proj", "v_proj", "lm_head")
    assert place("model.layers.3.mlp.experts.5.w1").layer == "3"
    assert place("transformer.h.3.attn.c_attn").target == "c_attn"
    squares = sum(norm["x"] ** 2 for norm in (made.norms(target=target) for target in made.targets))
    assert made.norms()["x"] == pytest.approx(math.sqrt(squares))
    assert Geometry((), {}, ()).layers == ()
