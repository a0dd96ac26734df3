"""Live, folded and stacked ways against the float64 dense sum, for every kind of module and base."""

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
from model_compose.lora.layers import LoraModel, Mix, Placement, module_shapes
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
    """2 to 4 adapters of different ranks, scalings (rsLoRA's among them) and targets; a different blend for each row."""
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


def test_unfold_restores_the_very_weights() -> None:
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


def test_changing_weights_rebuilds_nothing() -> None:
    model = base("llama")
    adapters = [random_adapter(name, model, ["model.layers.0.self_attn.q_proj"], [4], [2.0], seed=5) for name in "ab"]
    lora = LoraModel(model, adapters)
    ids = torch.arange(5)[None]

    def run(blend: Blend) -> set[int]:
        """The memory of every tensor with storage that lives after a forward pass under the blend."""
        with torch.inference_mode(), lora.use([blend]):
            model(ids)
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        branches = [branch for hook in hooks for branch in hook.__closure__[0].cell_contents]
        return {tensor.data_ptr() for branch in branches for tensor in (branch.a, branch.b)}

    assert run(Blend({"a": 0.3})) == run(Blend({"a": 1.5, "b": -1})) == run(Blend())


def test_zero_weight_costs_nothing() -> None:
    """No product is formed with an adapter whose weight is 0, in however many rows."""
    mix = Mix([Blend({"a": 0.0, "b": 1.0}), Blend({"c": 2.0})], ("a", "b", "c"))
    from model_compose.lora.layers import Layout

    layout = Layout((0, 0, 1, 2, 2), (1.0,) * 5)
    spans = mix.spans(layout, torch.device("cpu"))
    assert [span for span, _ in spans] == [slice(2, 5)]
    assert spans[0][1].tolist() == [[[1.0, 0.0, 0.0]], [[0.0, 2.0, 2.0]]]


def test_an_adapter_computes_in_its_own_precision() -> None:
    """float32 factors on a bfloat16 base keep their precision until the sum is rounded once."""
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
def test_what_does_not_fit_is_refused_by_name(
    path: str, a: tuple[int, int], b: tuple[int, int], words: list[str]
) -> None:
    adapter = LoraAdapter("odd", {path: Factors(torch.zeros(a), torch.zeros(b), 1.0)}, "d", base="some/base")
    with pytest.raises(AdapterError) as caught:
        LoraModel(base("llama"), [adapter])
    assert "adapter 'odd'" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_modules_that_see_rows_and_tokens_flattened() -> None:
    """As the shared expert of Qwen2-MoE does: (rows * tokens, in), still with the blend of each row."""
    model = base("llama")
    adapter = random_adapter("a", model, ["lm_head"], [3], [1.5], seed=4)
    lora, rows = LoraModel(model, [adapter]), [Blend({"a": 0.5}), Blend({"a": -2.0})]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), lora.use(rows):
        assert torch.allclose(model.lm_head(x.flatten(0, 1)), model.lm_head(x).flatten(0, 1), atol=1e-6)
