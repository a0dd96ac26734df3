"""Logits of a pass from a lean decoder of the Llama family: the same function as transformers' code, in fewer operations.

q, k, v are one product, and so are gate and up; positions are rotated once for q and k together. It takes its weights
from a transformers model. Rotary embeddings, whatever their scaling, are that model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_compose.engines.huggingface.attention import Pass
from model_compose.engines.huggingface.cache import LayerShape
from model_compose.engines.huggingface.quantized import quantize
from model_compose.lora.layers import LoraModel, Projection
from model_compose.lora.live import Mix

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Layer:
    """One decoder layer. qk_norm: (heads + key heads, dim) where queries and keys are normalised (Qwen 3)."""

    norm: Tensor
    qkv: Projection
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    qk_norm: Tensor | None
    window: int | None


class LlamaForward:
    """quantization: int8 or int4, what the Linears' weights become."""

    def __init__(self, lora: LoraModel, quantization: str | None = None) -> None:
        def make(linear: nn.Linear, *, head: bool = False) -> nn.Module:
            return linear if quantization is None else quantize(quantization, linear, head=head)

        model: Any = lora.model
        config, inner = model.config, model.model
        first = inner.layers[0].self_attn
        self._heads, self._keys, self._dim = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self._eps, self._act, self._rotary = config.rms_norm_eps, inner.layers[0].mlp.act_fn, inner.rotary_emb
        self._layers = [self._layer(lora, number, layer, make) for number, layer in enumerate(inner.layers)]
        self._embed, self._norm = lora.embedding("model.embed_tokens"), inner.norm.weight
        self._head = lora.fuse(["lm_head"], partial(make, head=True))
        weight = inner.embed_tokens.weight
        shape = LayerShape(self._keys, self._dim, self._dim, weight.dtype, weight.device)
        self.layers = [shape] * len(self._layers)

    def _layer(self, lora: LoraModel, number: int, layer: Any, make: Callable[[nn.Linear], nn.Module]) -> Layer:
        path, attention = f"model.layers.{number}", layer.self_attn
        norm = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._keys
            norm = torch.stack([weight.data for weight in norms])
        return Layer(
            layer.input_layernorm.weight,
            lora.fuse([f"{path}.self_attn.{name}_proj" for name in "qkv"], make),
            lora.fuse([f"{path}.self_attn.o_proj"], make),
            layer.post_attention_layernorm.weight,
            lora.fuse([f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"], make),
            lora.fuse([f"{path}.mlp.down_proj"], make),
            norm,
            _window(attention),
        )

    @torch.inference_mode()
    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        tokens, heads, keys, dim = len(step.tokens), self._heads, self._keys, self._dim
        x = self._embed(step.tokens, mix)
        cos, sin = (part[0, :, None] for part in self._rotary(x[None], step.positions[None]))
        # Rotating halves is a roll, with the first half's sign in the sine.
        sin = torch.cat([-sin[..., : dim // 2], sin[..., dim // 2 :]], dim=-1)
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.norm, self._eps), mix).view(tokens, -1, dim)
            qk = qkv[:, : heads + keys]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (dim,), None, self._eps) * layer.qk_norm
            qk = torch.addcmul(qk * cos, torch.roll(qk, dim // 2, -1), sin)
            attended = step.attend(number, qk[:, :heads], qk[:, heads:], qkv[:, heads + keys :], window=layer.window)
            x = x + layer.out(attended.reshape(tokens, heads * dim), mix)
            gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self._eps), mix).chunk(2, -1)
            x = x + layer.down(self._act(gate) * up, mix)
        return self._head(F.rms_norm(x[step.last], x.shape[-1:], self._norm, self._eps), mix)


def takes(model: nn.Module) -> bool:
    """Whether the lean decoder computes this model."""
    return type(model).__name__ in ARCHITECTURES


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    # Mistral has one for all layers, in its config; Llama's config has none.
    return getattr(attention.config, "sliding_window", None)
