"""Approximate methods equal independent implementations on dense deltas: PEFT's merge_utils and torch.linalg.svd."""

import copy
import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from pydantic import ValidationError
from torch import Tensor

from model_compose.errors import InputError
from model_compose.lora import methods
from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.blend import Blend, delta, stack
from model_compose.lora.layers import LoraModel
from model_compose.lora.methods import METHODS, FullRank, LowRank, Method
from model_compose.lora.methods.dare_linear import DareLinear, seed_of
from model_compose.lora.methods.dare_ties import DareTies
from model_compose.lora.methods.magnitude_prune import MagnitudePrune
from model_compose.lora.methods.svd import Svd
from model_compose.lora.methods.ties import Ties
from tests.lora.oracle import TOLERANCE, error, random_adapter
from tests.lora.test_layers import base

PATH = "model.layers.0.self_attn.q_proj"
EXAMPLES: dict[str, Method] = {
    "ties": Ties(density=0.3),
    "dare_linear": DareLinear(density=0.6),
    "dare_ties": DareTies(density=0.6, majority_sign_method="frequency"),
    "magnitude_prune": MagnitudePrune(density=0.25),
    "svd": Svd(rank=3),
}
FULL_RANK = [name for name, method in EXAMPLES.items() if isinstance(method, FullRank)]


def random_deltas(count: int, shape: tuple[int, int] = (12, 17), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def adapters(*ranks: int, paths: Collection[str] = (PATH,), scaling: float = 2.0) -> dict[str, LoraAdapter]:
    """One adapter for each rank, named a, b, …"""
    return {
        name: random_adapter(name, base("llama"), paths, [rank] * len(paths), [scaling] * len(paths), seed=ord(name))
        for name, rank in zip("abcd", ranks, strict=False)
    }


def pefts(method: Method, deltas: list[Tensor], weights: list[float], key: str) -> Tensor:
    """The result of PEFT's implementation. PEFT draws its masks from torch's default generator, so we seed that one."""
    options = method.model_dump(exclude={"method", "seed"})
    if method.method in ("ties", "magnitude_prune"):
        merged: Tensor = getattr(merge_utils, method.method)(list(deltas), torch.tensor(weights), **options)
        return merged
    seeds = iter(seed_of(getattr(method, "seed"), key, place) for place in range(len(deltas)))  # noqa: B009
    prune = merge_utils.prune

    def seeded(*arguments: Any, **named: Any) -> Tensor:
        torch.manual_seed(next(seeds))
        pruned: Tensor = prune(*arguments, **named)
        return pruned

    merge_utils.prune = seeded
    try:
        merged = getattr(merge_utils, method.method)(list(deltas), torch.tensor(weights), **options)
    finally:
        merge_utils.prune = prune
    return merged


def test_a_method_has_the_same_name_everywhere() -> None:
    assert list(EXAMPLES) == list(METHODS)
    for name in METHODS:
        assert METHODS[name].model_fields["method"].default == name
        assert importlib.import_module(f"{methods.__name__}.{name}").__doc__
        assert "https://" in (importlib.import_module(f"{methods.__name__}.{name}").__doc__ or "")
        assert METHODS[name].approximate
        assert issubclass(METHODS[name], FullRank | LowRank)
    files = {path.stem for path in Path(str(methods.__file__)).parent.glob("*.py")} - {"__init__"}
    assert files == set(METHODS)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 4), density=st.floats(0.05, 0.99), seed=st.integers(0, 99),
    majority=st.sampled_from(["total", "frequency"]),
    weights=st.lists(st.floats(-2, 2).filter(bool), min_size=4, max_size=4),
)  # fmt: skip
def test_full_rank_methods_equal_pefts_on_deltas(
    count: int, density: float, seed: int, majority: Any, weights: list[float]
) -> None:
    deltas, weights = random_deltas(count, seed=seed), weights[:count]
    before = copy.deepcopy(deltas)
    for method in (
        Ties(density=density, majority_sign_method=majority),
        MagnitudePrune(density=density),
        DareLinear(density=density, seed=seed),
        DareTies(density=density, majority_sign_method=majority, seed=seed),
    ):
        ours = method.combine(deltas, weights, key="some.module")
        assert torch.allclose(ours, pefts(method, deltas, weights, "some.module"), atol=1e-5)
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True))


def test_at_density_1_pruning_and_dropping_leave_the_sum() -> None:
    deltas, weights = random_deltas(3), [0.7, -1.3, 0.2]
    total = torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).sum(dim=0)
    for method in (MagnitudePrune(density=1), DareLinear(density=1)):
        assert torch.allclose(method.combine(deltas, weights, key=""), total, atol=1e-6)


def test_ties_of_adapters_that_agree_is_their_mean() -> None:
    deltas = [delta.abs() for delta in random_deltas(3)]
    mean = torch.stack(deltas).mean(dim=0)
    for majority in ("total", "frequency"):
        method = Ties.model_validate({"density": 1, "majority_sign_method": majority})
        assert torch.allclose(method.combine(deltas, [1.0] * 3, key=""), mean, atol=1e-6)
        signs = method.combine([-delta for delta in deltas], [1.0] * 3, key="")
        assert torch.allclose(signs, -mean, atol=1e-6)


def test_ties_leaves_out_the_minority() -> None:
    one, two, three = (torch.tensor([[value]]) for value in (1.0, 2.0, -5.0))
    by_total, by_number = Ties(density=1), Ties(density=1, majority_sign_method="frequency")
    assert by_total.combine([one, two, three], [1.0, 1.0, 0.5], key="").item() == -2.5
    assert by_number.combine([one, two, three], [1.0, 1.0, 0.5], key="").item() == 1.5


def test_the_mean_of_many_dare_results_is_the_exact_sum() -> None:
    deltas, weights = random_deltas(2, (8, 8)), [0.7, 0.5]
    total = 0.7 * deltas[0] + 0.5 * deltas[1]
    draws = torch.stack([DareLinear(density=0.4, seed=seed).combine(deltas, weights, key="m") for seed in range(2000)])
    spread = draws.std(dim=0) / 2000**0.5
    assert ((draws.mean(dim=0) - total).abs() < 5 * spread + 1e-6).all()


def test_dares_masks_depend_only_on_seed_module_and_adapter() -> None:
    deltas, weights = random_deltas(2), [1.0, 1.0]

    def drawn(seed: int, key: str) -> Tensor:
        return DareLinear(density=0.5, seed=seed).combine(deltas, weights, key=key)

    first = drawn(0, "m")
    torch.rand(5)  # other draws do not matter
    assert torch.equal(drawn(0, "m"), first)
    assert not torch.equal(drawn(1, "m"), first)
    assert not torch.equal(drawn(0, "n"), first)
    same = DareLinear(density=0.5).combine([deltas[0]] * 2, [1.0, -1.0], key="m")
    assert same.abs().max() > 0, "each adapter has its own mask"


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=3), rank=st.integers(1, 40), data=st.data()
)  # fmt: skip
def test_svd_is_the_truncated_svd_of_the_dense_sum(ranks: list[int], rank: int, data: st.DataObject) -> None:
    """Also if the stacked rank is larger than the module's width, 32."""
    loaded = adapters(*ranks)
    blend = Blend({name: data.draw(st.floats(0.2, 2)) for name in loaded})
    compressed = Blend(blend.weights, method=Svd(rank=rank))
    whole = delta(blend, loaded, PATH)
    assert whole is not None
    u, s, vt = torch.linalg.svd(whole.double(), full_matrices=False)
    nearest = u[:, :rank] * s[:rank] @ vt[:rank]
    factors = stack(compressed, loaded).modules[PATH]
    assert factors.rank <= max(rank, 32)
    assert error(factors.product(), nearest) <= TOLERANCE
    ours = delta(compressed, loaded, PATH)
    assert ours is not None
    assert torch.equal(ours, factors.product())


def test_svd_at_the_full_rank_is_the_exact_stack() -> None:
    loaded, weights = adapters(3, 5), {"a": 0.7, "b": -1.2}
    exact, same = stack(Blend(weights), loaded), stack(Blend(weights, method=Svd(rank=8)), loaded)
    assert torch.equal(exact.modules[PATH].a, same.modules[PATH].a)
    assert torch.equal(exact.modules[PATH].b, same.modules[PATH].b)
    assert exact.digest != same.digest


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_adapter_with_weight_0_does_not_count(name: str) -> None:
    loaded, method = adapters(4, 4, 4), EXAMPLES[name]
    with_it = delta(Blend({"a": 0.7, "c": 0.0, "b": 1.1}, method=method), loaded, PATH)
    without = delta(Blend({"b": 1.1, "a": 0.7}, method=method), loaded, PATH)
    exact = delta(Blend({"b": 1.1, "a": 0.7}), loaded, PATH)
    assert with_it is not None
    assert without is not None
    assert exact is not None
    assert torch.equal(with_it, without)
    assert not torch.allclose(with_it, exact, atol=1e-4)
    assert delta(Blend({"a": 0.0}, method=method), loaded, PATH) is None
    assert delta(Blend({"a": 1.0}, method=method), loaded, "model.layers.1.self_attn.q_proj") is None


@pytest.mark.parametrize("name", FULL_RANK)
def test_full_rank_methods_get_scaled_deltas_and_cannot_be_stacked(name: str) -> None:
    """The scaling is part of the delta: with half the alpha, a method gets half the delta."""
    loaded, method = adapters(4, 2), EXAMPLES[name]
    assert isinstance(method, FullRank)
    blend = Blend({"a": 0.7, "b": -0.5}, "mix", method)
    dense = [2.0 * (loaded[one].modules[PATH].b @ loaded[one].modules[PATH].a) for one in "ab"]
    ours = delta(blend, loaded, PATH)
    assert ours is not None
    assert torch.allclose(ours, pefts(method, dense, [0.7, -0.5], PATH), atol=1e-6)
    with pytest.raises(InputError, match=rf"the blend 'mix' \({name}\) has full rank and is not a LoRA"):
        stack(blend, loaded)


def test_the_identity_depends_on_the_method_and_its_options() -> None:
    digests, weights = {"a": "d1", "b": "d2"}, {"a": 0.7, "b": 0.5}
    kinds: list[Method | None] = [
        None, Ties(density=0.3), Ties(density=0.2), Ties(density=0.3, majority_sign_method="frequency"), Svd(rank=3),
        DareLinear(density=0.3), DareLinear(density=0.3, seed=1), MagnitudePrune(density=0.3), Svd(rank=4),
    ]  # fmt: skip
    assert len({Blend(weights, "x", kind).identity("base", digests) for kind in kinds}) == len(kinds)
    named = Blend(weights, "y", Ties(density=0.3)).identity("base", digests)
    assert named == Blend(weights, "x", Ties(density=0.3)).identity("base", digests)
    # Exact blends keep the identity that they had before methods existed, so caches stay valid.
    assert Blend(weights).identity("base", digests) == "1346620fdb8b9df8"


def test_options_are_checked() -> None:
    for options in ({"density": 0}, {"density": 1.1}, {}, {"density": 0.5, "rank": 3}):
        with pytest.raises(ValidationError):
            Ties.model_validate(options)
    with pytest.raises(ValidationError):
        Svd.model_validate({"rank": 0})


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_folded_way_adds_the_delta_to_every_kind_of_module(family: str, name: str) -> None:
    """Linear, Conv1D, and an embedding that is tied to the head."""
    model = base(family)
    paths = (
        [PATH, "model.layers.1.mlp.down_proj", "model.embed_tokens"]
        if family == "llama-tied"
        else ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.wte"]
    )
    loaded = {one: random_adapter(one, model, paths, [4] * 3, [2.0] * 3, seed=ord(one)) for one in "ab"}
    blend = Blend({"a": 0.7, "b": -0.5}, "mix", EXAMPLES[name])
    lora = LoraModel(model, loaded.values())
    before = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    head = model.lm_head.weight.clone()
    lora.fold(blend)
    for path in paths:
        added = delta(blend, loaded, path)
        assert added is not None
        linear = path in (PATH, "model.layers.1.mlp.down_proj")
        expected = before[path].double() + (added if linear else added.T).double()
        assert error(model.get_submodule(path).weight, expected) <= TOLERANCE
    assert torch.equal(model.lm_head.weight, head)
    lora.unfold()
    assert all(torch.equal(model.get_submodule(path).weight, before[path]) for path in paths)


def test_a_fold_rounds_once_from_float32() -> None:
    model = base("llama").bfloat16()
    loaded = adapters(4, 2)
    blend = Blend({"a": 0.7, "b": 0.5}, "mix", Ties(density=0.5))
    lora = LoraModel(model, loaded.values())
    weight = model.get_submodule(PATH).weight.detach().clone()
    lora.fold(blend)
    added = delta(blend, loaded, PATH)
    assert added is not None
    assert torch.equal(model.get_submodule(PATH).weight, (weight.float() + added).bfloat16())


def test_folds_of_several_methods_are_kept_at_once() -> None:
    """Each blend has its own copy of the weights: swapping between them computes nothing, and the originals come back."""
    model = base("llama")
    loaded = adapters(4, 2)
    lora = LoraModel(model, loaded.values())
    merged, total = Blend({"a": 0.7, "b": 0.5}, "mix", Ties(density=0.5)), Blend({"a": 1.0})
    original = model.get_submodule(PATH).weight.detach().clone()

    def weight(blend: Blend | None) -> Tensor:
        if blend is None:
            lora.unfold(keep=True)
        else:
            lora.fold(blend)
        tensor: Tensor = model.get_submodule(PATH).weight
        return tensor.data

    first, second = weight(merged), weight(total)
    assert torch.equal(weight(None), original)
    assert lora.keeps(merged)
    assert lora.keeps(total)
    for blend, kept in [(merged, first), (total, second), (merged, first), (None, original), (total, second)]:
        assert torch.equal(weight(blend), kept)
        assert blend is None or weight(blend).data_ptr() == kept.data_ptr()
    other = Blend({"b": 1.0})
    weight(other)  # another sum replaces the copy of the first sum
    weight(None)
    assert lora.keeps(merged)
    assert lora.keeps(other)
    assert not lora.keeps(total)
    lora.unload("a")
    assert not lora.keeps(merged)
    assert lora.keeps(other)
    lora.fold(Blend({"b": 0.5}, method=Ties(density=0.5)))
    lora.unload("b")
    assert torch.equal(weight(None), original)
    assert not lora.keeps(other)


def test_only_sums_run_live() -> None:
    lora = LoraModel(base("llama"), adapters(4, 2).values())
    with pytest.raises(AssertionError, match="only sums run live"), lora.use([Blend({"a": 1.0}, method=Svd(rank=1))]):
        pass


def test_embeddings_compress_too() -> None:
    path = "model.embed_tokens"
    loaded = adapters(4, 6, paths=[path])
    compressed = stack(Blend({"a": 1.0, "b": 0.5}, method=Svd(rank=2)), loaded).modules[path]
    assert compressed.embedding
    assert (compressed.a.shape, compressed.b.shape) == ((2, 90), (32, 2))
    assert isinstance(compressed, Factors)
