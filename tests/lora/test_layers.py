"""The live, folded and stacked ways of running a blend equal the float64 dense sum, for every kind of module and base."""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig, Qwen2Config

from model_compose.errors import AdapterError
from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.blend import Blend, stack
from model_compose.lora.layers import IDLE_USES, LoraModel, Placement, module_shapes
from model_compose.lora.live import Layouts, Mix, Selection
from tests import tiny
from tests.lora.oracle import TOLERANCE, dense, error, random_adapter

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 64,
}  # fmt: skip
BASES = {
    "llama": tiny.llama_config(vocab_size=90),
    "llama-tied": tiny.llama_config(vocab_size=90, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL),
    "qwen": Qwen2Config(**SMALL),
    "gemma": Gemma2Config(**SMALL, head_dim=8),
    "gpt2": GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=4),
}
WEIGHTS = st.floats(-1, 2).map(lambda weight: round(weight, 3))


@functools.cache
def pristine(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BASES[family]).eval().requires_grad_(False)


def base(family: str) -> Any:
    return copy.deepcopy(pristine(family))


@st.composite
def adapters_and_rows(draw: st.DrawFn, model: Any) -> tuple[list[LoraAdapter], list[Blend]]:
    """2 to 4 adapters with different ranks, scalings (some of rsLoRA) and targets, and a blend for each of 1 to 3 rows."""
    shapes = module_shapes(model)
    adapters = []
    for number in range(draw(st.integers(2, 4))):
        paths = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=6, unique=True))
        ranks = [draw(st.integers(1, 8)) for _ in paths]
        alpha = draw(st.sampled_from([1, 8, 16]))
        rslora = draw(st.booleans())
        scalings = [alpha / (math.sqrt(rank) if rslora else rank) for rank in ranks]
        adapters.append(random_adapter(f"a{number}", model, paths, ranks, scalings, seed=draw(st.integers(0, 99))))
    names = [adapter.name for adapter in adapters]
    blend = st.dictionaries(st.sampled_from(names), WEIGHTS | st.just(0.0)).map(Blend)
    return adapters, draw(st.lists(blend, min_size=1, max_size=3))


@pytest.mark.parametrize("family", BASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_way_equals_the_dense_sum(family: str, data: st.DataObject) -> None:
    model = base(family)
    adapters, rows = data.draw(adapters_and_rows(model))
    ids = torch.randint(0, 90, (len(rows), 9), generator=torch.Generator().manual_seed(1))
    references = [dense(model, adapters, blend.weights) for blend in rows]
    expected = torch.cat([reference(ids[i : i + 1]).logits for i, reference in enumerate(references)])

    lora = LoraModel(model, adapters)
    with torch.inference_mode():
        with lora.use(rows):  # every row its own blend, in one batch
            live = model(ids).logits
        assert error(live, expected) <= TOLERANCE
        for row, blend in enumerate(rows):
            one = ids[row : row + 1]
            lora.fold(blend)
            assert error(model(one).logits, expected[row : row + 1]) <= TOLERANCE
            lora.unfold()
            stacked = LoraModel(base(family), [stack(blend, lora.adapters)]) if blend.active else None
            if stacked is not None:
                with stacked.use([Blend({stacked.names[0]: 1.0})]):
                    assert error(stacked.model(one).logits, expected[row : row + 1]) <= TOLERANCE


def test_unfold_restores_the_weights_bit_for_bit() -> None:
    model = base("llama-tied").bfloat16()
    adapter = random_adapter("a", model, sorted(module_shapes(model)), [2] * 16, [1.0] * 16, seed=3)
    lora = LoraModel(model, [adapter])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.fold(Blend({"a": 1.0}))
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) >= 16
    lora.fold(Blend({"a": -0.5}))  # a second fold starts from the originals, not from the first
    lora.unfold()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_folding_an_embedding_leaves_the_tied_head_alone() -> None:
    model = base("llama-tied")
    adapter = random_adapter("a", model, ["model.embed_tokens"], [4], [2.0], seed=3)
    lora = LoraModel(model, [adapter])
    head = model.lm_head.weight.clone()
    lora.fold(Blend({"a": 1.0}))
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)


def two_adapters() -> tuple[LoraModel, str]:
    model = base("llama")
    path = "model.layers.0.self_attn.q_proj"
    return LoraModel(model, [random_adapter(name, model, [path], [4], [2.0], seed=5) for name in "ab"]), path


def test_changing_weights_rebuilds_nothing() -> None:
    lora, path = two_adapters()

    def run(*rows: Blend) -> list[int]:
        """The addresses of the stacked factors after a pass with these blends."""
        with torch.inference_mode(), lora.use(rows):
            lora.model(torch.arange(5)[None].repeat(len(rows), 1))
        stacks = lora._sites[path].branch.stacks
        return [tensor.data_ptr() for stack in stacks for tensor in (stack.a, stack.b)]

    first = run(Blend({"a": 0.3, "b": 1.0}))
    assert first == run(Blend({"a": 1.5, "b": -1})) == run(Blend({"b": 2}), Blend({"a": 1})) == run(Blend({"a": 0.1}))


def test_adapters_that_no_request_uses_leave_the_stack() -> None:
    """After IDLE_USES passes without an adapter, products no longer include that adapter."""
    lora, path = two_adapters()
    branch = lora._sites[path].branch

    def run(blend: Blend) -> set[str]:
        with torch.inference_mode(), lora.use([blend]):
            lora.model(torch.arange(5)[None])
        return {name for stack in branch.stacks for name in stack.layout.adapters}

    assert run(Blend({"a": 0.0, "b": 1.0})) == {"b"}
    assert run(Blend({"a": 1.0})) == {"a", "b"}
    for _ in range(IDLE_USES):
        run(Blend({"a": 1.0}))
    assert run(Blend({"a": 1.0})) == {"a"}


def test_at_most_max_on_device_adapters_stay_on_the_device() -> None:
    model = base("llama")
    path = "model.layers.0.self_attn.q_proj"
    adapters = [random_adapter(name, model, [path], [4], [2.0], seed=5) for name in "abcd"]
    lora = LoraModel(model, adapters, max_on_device=2)
    ids = torch.arange(5)[None]
    for name in "abcdab":
        with torch.inference_mode(), lora.use([Blend({name: 1.0})]):
            model(ids)
        assert len(lora._sites[path].branch._resident) <= 2
    with torch.inference_mode(), lora.use([Blend(dict.fromkeys("abc", 1.0))]):  # a request that needs more gets them
        ours = model(ids).logits
    assert error(ours, dense(base("llama"), adapters, dict.fromkeys("abc", 1.0))(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_fused_projection_equals_its_separate_linears(family: str) -> None:
    model = base(family)
    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    adapters = [
        random_adapter("a", model, paths, [4, 2, 3], [2.0, 1.0, 0.5], seed=5),
        random_adapter("b", model, paths[2:], [5], [2.0], seed=6),
    ]
    blends = [Blend({"a": 0.5}), Blend(), Blend({"a": -1.0, "b": 2.0})]
    counts = [2, 1, 3]
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    parts = []
    with torch.inference_mode():
        for blend, piece in zip(blends, torch.split(x, counts), strict=True):
            reference = dense(model, adapters, blend.weights)
            parts.append(torch.cat([reference.get_submodule(path)(piece.double()) for path in paths], dim=-1))
        lora = LoraModel(model, adapters)
        projection = lora.fuse(paths)
        with lora.use(blends, counts) as mix:
            assert error(projection(x, mix), torch.cat(parts)) <= TOLERANCE
        lora.fold(blends[2])
        with lora.use([blends[2]], [3]) as mix:
            assert mix is None
            assert error(projection(x[3:], mix), parts[2]) <= TOLERANCE
        lora.unfold(keep=True)
        with lora.use(blends, counts) as mix:
            assert error(projection(x, mix), torch.cat(parts)) <= TOLERANCE
        lora.fold(blends[2])  # takes the folded weights that `keep` kept
        assert error(projection(x[3:], None), parts[2]) <= TOLERANCE


def test_a_fold_that_runs_out_of_memory_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base("llama")
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    lora = LoraModel(model, [random_adapter("a", model, paths, [4, 4], [2.0, 2.0], seed=1)])
    ids = torch.arange(5)[None]
    folded, count = LoraModel._folded, iter(range(2))

    def short(self: LoraModel, *arguments: Any) -> torch.Tensor:
        if next(count) == 1:
            raise MemoryError
        return folded(self, *arguments)

    monkeypatch.setattr(LoraModel, "_folded", short)
    with torch.inference_mode():
        before = model(ids).logits
        with pytest.raises(MemoryError):
            lora.fold(Blend({"a": 1.0}))
        assert torch.equal(model(ids).logits, before)
    assert lora.folded is None


def test_adapters_can_be_loaded_and_unloaded() -> None:
    model = base("llama")
    path = "model.layers.0.self_attn.q_proj"
    one, two = (random_adapter(name, model, [path], [4], [2.0], seed=ord(name)) for name in "ab")
    lora = LoraModel(model, [one])
    ids = torch.arange(5)[None]
    with torch.inference_mode(), lora.use([Blend({"a": 1.0})]):
        alone = model(ids).logits
    lora.load(two)
    with torch.inference_mode(), lora.use([Blend({"a": 0.5, "b": 1.0})]):
        both = model(ids).logits
    assert error(both, dense(base("llama"), [one, two], {"a": 0.5, "b": 1.0})(ids).logits) <= TOLERANCE
    lora.unload("b")
    assert lora.names == ("a",)
    with torch.inference_mode(), lora.use([Blend({"a": 1.0})]):
        assert torch.equal(model(ids).logits, alone)
    with pytest.raises(AdapterError, match="adapter 'odd'"):
        lora.load(LoraAdapter("odd", {path: Factors(torch.zeros(4, 64), torch.zeros(32, 4), 1.0)}, "d"))
    assert lora.names == ("a",)


def test_a_name_that_is_loaded_again_brings_its_new_factors() -> None:
    """The selection has the same names as before, so only its identity says that the stacks are old."""
    model = base("llama")
    path = "model.layers.0.self_attn.q_proj"
    old, new = (random_adapter("a", model, [path], [4], [2.0], seed=seed) for seed in (1, 2))
    ids, blend = torch.arange(5)[None], Blend({"a": 1.0})
    lora = LoraModel(model, [old])
    for adapter in (old, new):
        with torch.inference_mode(), lora.use([blend]):
            ours = model(ids).logits
        assert error(ours, dense(base("llama"), [adapter], blend.weights)(ids).logits) <= TOLERANCE
        lora.unload("a")
        lora.load(new)


def test_selections_and_layouts_are_equal_only_to_themselves() -> None:
    assert Selection(frozenset("a")) != Selection(frozenset("a"))
    cpu, known = torch.device("cpu"), Layouts()
    one = known.of(("a",), (1.0,), cpu)
    assert one == known.of(("a",), (1.0,), cpu)
    assert one != known.of(("a",), (2.0,), cpu)
    known.forget()
    assert one != known.of(("a",), (1.0,), cpu)


def test_a_layout_that_is_gone_is_not_taken_for_a_new_one() -> None:
    """New objects soon get the address, and so the id(), of one that was freed."""
    mix, cpu = Mix([Blend({"a": 0.5})], [1]), torch.device("cpu")
    assert mix.scales(Layouts().of(("a",), (1.0,), cpu), 1).item() == 0.5
    new = [Layouts().of(("a",), (3.0,), cpu) for _ in range(1000)]
    assert all(mix.scales(layout, 1).item() == 1.5 for layout in new)


def test_an_adapter_computes_in_its_own_precision() -> None:
    """float32 factors on a bfloat16 base compute in float32; only the final sum is rounded to bfloat16."""
    model = base("llama").bfloat16()
    adapter = random_adapter("a", model, ["lm_head"], [4], [2.0], seed=5)
    exact = LoraModel(model, [adapter], {"a": Placement(dtype=torch.float32)})
    with torch.no_grad():
        hidden = model.model(torch.arange(6)[None]).last_hidden_state
        with exact.use([Blend({"a": 1.3})]):
            ours = model.lm_head(hidden)
    factors = adapter.modules["lm_head"]
    base_part = torch.nn.functional.linear(hidden, model.lm_head.weight)
    delta = 1.3 * 2.0 * (hidden.double() @ factors.a.double().T @ factors.b.double().T)
    assert torch.equal(ours, (base_part.double() + delta).bfloat16()) or error(ours, base_part.double() + delta) < 4e-3
    assert ours.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("path", "a", "b", "words"),
    [
        ("model.layers.0.self_attn.q_proj", (4, 64), (32, 4), ["q_proj", "(4, 64)", "32 inputs and 32 outputs"]),
        ("model.layers.9.self_attn.q_proj", (4, 32), (32, 4), ["no module 'model.layers.9.self_attn.q_proj'"]),
        ("model.norm", (4, 32), (32, 4), ["no module 'model.norm'"]),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_by_name(
    path: str, a: tuple[int, int], b: tuple[int, int], words: list[str]
) -> None:
    adapter = LoraAdapter("odd", {path: Factors(torch.zeros(a), torch.zeros(b), 1.0)}, "d", base="some/base")
    with pytest.raises(AdapterError) as caught:
        LoraModel(base("llama"), [adapter])
    assert "adapter 'odd'" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_modules_whose_input_has_rows_and_tokens_flattened() -> None:
    """The shared expert of Qwen2-MoE gets (rows * tokens, in). Each row must still have its own blend."""
    model = base("llama")
    adapter = random_adapter("a", model, ["lm_head"], [3], [1.5], seed=4)
    lora, rows = LoraModel(model, [adapter]), [Blend({"a": 0.5}), Blend({"a": -2.0})]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), lora.use(rows):
        assert torch.allclose(model.lm_head(x.flatten(0, 1)), model.lm_head(x).flatten(0, 1), atol=1e-6)
