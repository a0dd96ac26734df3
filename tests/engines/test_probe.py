"""What a model's code may not do: each case is a model that is served, with one thing changed in its code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PhimoeConfig

from model_compose.engines.huggingface.forward import NAME, TransformersForward
from model_compose.errors import AdapterError, LoadError
from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.layers import LoraModel
from tests.architectures import SIZES, tiny_config

CPU = torch.device("cpu")


def gemma() -> Any:
    torch.manual_seed(0)
    config: Any = tiny_config("gemma")
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()


def test_a_keyword_that_attention_does_not_know_is_refused_by_name() -> None:
    model = gemma()
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"position_bias": torch.zeros(4), "unused": None}), with_kwargs=True
    )
    with pytest.raises(LoadError, match=r"tiny \(GemmaForCausalLM\) gives attention 'position_bias' in layer 1, which"):
        TransformersForward(model, CPU, "tiny")


def test_a_changed_mask_is_refused() -> None:
    model = gemma()
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"attention_mask": given["attention_mask"].float()}), with_kwargs=True
    )
    with pytest.raises(LoadError, match="gives attention a mask of its own in layer 0"):
        TransformersForward(model, CPU, "tiny")


def test_a_window_that_the_mask_does_not_have_is_refused() -> None:
    """Phi-3.5-MoE names a window as long as its context, which is none; a shorter one is not in its mask."""
    for window, context in ((128, 128), (8, 128)):
        config = PhimoeConfig(**SIZES, num_local_experts=2, pad_token_id=0, sliding_window=window)
        assert config.max_position_embeddings == context
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
        if window == context:
            TransformersForward(model, CPU, "tiny")
            continue
        with pytest.raises(LoadError, match="in another way than causally within the window that it names"):
            TransformersForward(model, CPU, "tiny")


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, :-1]], dim=1)


@pytest.mark.parametrize(
    "mixes", [lambda x: x + 0.5 * shifted(x), lambda x: x / x.norm(), lambda x: x - x.mean(1, True)]
)
def test_code_that_brings_tokens_together_outside_attention_is_refused(mixes: Callable[[Tensor], Tensor]) -> None:
    model = gemma()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: mixes(output))
    with pytest.raises(LoadError, match="computes a token from more than its own position and attention"):
        TransformersForward(model, CPU, "tiny")


def test_a_module_that_is_given_some_of_the_tokens_takes_no_adapter() -> None:
    """As experts are that are modules of their own."""
    model = gemma()
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :1]), whole(x[:, 1:])], dim=1)
    unfit = TransformersForward(model, CPU, "tiny").unfit
    assert set(unfit) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(unfit.values()) == {"it was given 4 tokens of 5"}


def test_an_adapter_for_such_a_module_is_refused_at_runtime_too() -> None:
    lora, path = LoraModel(gemma()), "model.layers.1.mlp.up_proj"
    lora.refuse({path: "it was given 4 tokens of 5"})
    late = LoraAdapter("late", {path: Factors(torch.ones(2, 32), torch.ones(48, 2), 1.0)}, "")
    with pytest.raises(AdapterError, match=r"'late': it acts on model\.layers\.1\.mlp\.up_proj.*given 4 tokens of 5"):
        lora.load(late)
    assert lora.names == ()


def test_masks_are_as_before_when_the_probe_is_over() -> None:
    from transformers import AttentionMaskInterface

    TransformersForward(gemma(), CPU, "tiny")
    assert NAME not in AttentionMaskInterface._global_mapping
