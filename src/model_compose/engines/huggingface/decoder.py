"""Logits of a pass from a lean decoder of the Llama family: the same function as transformers' code, in fewer operations.

q, k and v are one product, and so are gate and up; q and k are rotated together. It takes its weights from a
transformers model. Rotary embeddings, whatever their scaling, are that model's own. On a CPU, native code runs a
decode-only step in one call (`NativeLayers`). In other steps it computes the products, and the attention of the rows
that decode. Activations are float32 then.
"""

from collections.abc import Callable, Iterable, Iterator
from ctypes import addressof
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_compose.engines.huggingface.attention import Decode, Pass, Scoring, attend_group
from model_compose.engines.huggingface.cache import LayerShape
from model_compose.engines.huggingface.quantized import NativeLinear, quantize
from model_compose.engines.huggingface.rotary import rotate_by_row, switch_length
from model_compose.lora.layers import LoraModel, Projection
from model_compose.lora.live import Layout, Mix, Selection
from model_compose.native import FEW, KINDS, CCacheRows, CHeads, CLayer, CProjection, CStack, Kernels, kernels

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Layer:
    """One decoder layer. qk_norm: (heads + key heads, dim), for models that normalise queries and keys (Qwen 3)."""

    norm: Tensor
    qkv: Projection
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    qk_norm: Tensor | None
    window: int | None


Turn = tuple[Tensor, Tensor]
"""Cosine and sine for each token, (tokens, dim); the sine of the first half negative."""


class LlamaForward:
    """The lean decoder.

    quantization: int8 or int4, for the Linears' weights. native: from `native_for`; None: torch computes.
    """

    def __init__(self, lora: LoraModel, quantization: str | None = None, native: Kernels | None = None) -> None:
        def make(linear: nn.Linear, *, head: bool = False) -> nn.Module:
            if quantization is not None:
                return quantize(quantization, linear, head=head)
            return linear if native is None else NativeLinear(native, linear)

        model: Any = lora.model
        config, inner = model.config, model.model
        first = inner.layers[0].self_attn
        heads, keys, dim = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self._heads, self._keys, self._dim, self._rotary = heads, keys, dim, inner.rotary_emb
        self.switch = switch_length(model, type(model).__name__)
        self._dtype = None if native is None else torch.float32
        self._layers = [self._layer(lora, number, layer, make) for number, layer in enumerate(inner.layers)]
        self._embed, self._norm = lora.embedding("model.embed_tokens"), self._own(inner.norm.weight)
        self._head = lora.fuse(["lm_head"], partial(make, head=True))
        weight = inner.embed_tokens.weight
        shape = LayerShape(keys, dim, dim, weight.dtype, weight.device)
        self.layers = [shape] * len(self._layers)
        sizes_in_c = CHeads(heads, keys, dim, config.rms_norm_eps, dim**-0.5)
        self._native = None if native is None else NativeLayers(native, lora, self._layers, sizes_in_c, self._norm)
        sizes = Sizes(heads, keys, dim, config.rms_norm_eps)
        self._between = Between(sizes, inner.layers[0].mlp.act_fn, self._native)

    def _own(self, weight: Tensor) -> Tensor:
        """A small weight in the activations' dtype."""
        return weight.detach() if self._dtype is None else weight.detach().to(self._dtype).contiguous()

    def _layer(self, lora: LoraModel, number: int, layer: Any, make: Callable[[nn.Linear], nn.Module]) -> Layer:
        path, attention = f"model.layers.{number}", layer.self_attn
        norm = None
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * self._heads + [attention.k_norm.weight] * self._keys
            norm = self._own(torch.stack([weight.data for weight in norms]))
        return Layer(
            self._own(layer.input_layernorm.weight),
            lora.fuse([f"{path}.self_attn.{name}_proj" for name in "qkv"], make),
            lora.fuse([f"{path}.self_attn.o_proj"], make),
            self._own(layer.post_attention_layernorm.weight),
            lora.fuse([f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"], make),
            lora.fuse([f"{path}.mlp.down_proj"], make),
            norm,
            _window(attention),
        )

    @torch.inference_mode()
    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        between, dim = self._between, self._dim
        x, y = self._embed(step.tokens, mix), None
        rotary = self._rotary if self.switch is None else partial(rotate_by_row, self._rotary, self.switch, step.long)
        cosine, sine = (part[0] for part in rotary(x[None], step.positions[None]))
        # RoPE: swap the two halves; `sine` already carries the minus sign.
        turn = (cosine.contiguous(), torch.cat([-sine[:, : dim // 2], sine[:, dim // 2 :]], dim=-1))
        if self._native is not None:
            normed = self._native.decode(x, step, turn, mix)
            if normed is not None:
                return self._head(normed, mix)
        for number, layer in enumerate(self._layers):
            x, normed = between.add_norm(x, y, layer.norm)
            attended = between.attend(step, number, layer, layer.qkv(normed, mix), turn)
            x, normed = between.add_norm(x, layer.out(attended, mix), layer.mlp_norm)
            y = layer.down(between.gate(layer.gate_up(normed, mix)), mix)
        last = None if y is None else y[step.last]
        _, normed = between.add_norm(x[step.last], last, self._norm)
        return self._head(normed, mix)


# The layers, computed by native code.


@dataclass(frozen=True)
class Table:
    """The layers as native code reads them: pointers to weights and to the adapters' factors.

    layers: None if native code cannot add these adapters. layouts: of the stacks; a stack names its layout by its
    number here. swaps, selection: the pointers are valid as long as these are the same. kept: keeps alive what they
    point to.
    """

    layers: Any
    layouts: tuple[Layout, ...]
    swaps: int
    selection: Selection | None
    kept: tuple[Any, ...]


class NativeLayers:
    """Computes decode-only steps in one C call; in other steps, what lies between the products. norm: the last one."""

    def __init__(
        self, native: Kernels, lora: LoraModel, layers: Iterable[Layer], heads: CHeads, norm: Tensor
    ) -> None:  # fmt: skip
        self._native, self._lora, self._layers, self._heads, self._norm = native, lora, layers, heads, norm
        self._table: Table | None = None

    def decode(self, x: Tensor, step: Pass, turn: Turn, mix: Mix | None) -> Tensor | None:
        """All layers in one call. x: the embeddings (tokens, size), which are overwritten. Returns the last norm of the
        last layer's output.

        None if one call cannot do it: the step has prompts, or adapters compute on another device or in another dtype.
        """
        groups = [group for group in step.groups if isinstance(group, Decode)]
        if len(groups) < len(step.groups) or len(x) > FEW:
            return None
        selection = None if mix is None else mix.selection
        table = self._table
        if table is None or table.swaps != self._lora.swaps or table.selection != selection:
            table = self._table = self._read(mix, selection)
        if table.layers is None:
            return None
        scales = [mix.scales(layout, len(x)) for layout in table.layouts] if mix is not None else []
        rows = [_cache_rows(group) for group in groups]
        return self._native.decode(table.layers, scales, rows, self._heads, turn, self._norm, x)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x, self._native.add_norm(x, y, weight, self._heads.eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        return self._native.silu_mul(gate_up)

    def attend(self, group: Decode, number: int, layer: Layer, qkv: Tensor, turn: Turn, out: Tensor) -> None:
        self._native.attend(_cache_rows(group), number, self._heads, layer.qk_norm, layer.window, qkv, *turn, out)

    def _read(self, mix: Mix | None, selection: Selection | None) -> Table:
        kept: list[Any] = []
        numbers: dict[Layout, int] = {}

        def stack_of(projection: Projection) -> CStack | None:
            stacks = [] if mix is None else projection.branch.stacked(mix)
            if not stacks:
                return CStack()
            only = stacks[0]
            if len(stacks) > 1 or only.a.dtype != torch.float32 or only.a.device.type != "cpu":
                return None
            kept.append(only)
            number = numbers.setdefault(only.layout, len(numbers))
            return CStack(only.a.data_ptr(), only.b.data_ptr(), len(only.a), number)

        rows = [_layer(layer, stack_of, kept.append) for layer in self._layers]
        whole = [row for row in rows if row is not None]
        layers = (CLayer * len(rows))(*whole) if len(whole) == len(rows) else None
        return Table(layers, tuple(numbers), self._lora.swaps, selection, tuple(kept))


def _layer(layer: Layer, stack_of: Callable[[Projection], CStack | None], keep: Callable[[Any], None]) -> CLayer | None:
    def projections() -> Iterator[CProjection | None]:
        for projection in (layer.qkv, layer.out, layer.gate_up, layer.down):
            stack = stack_of(projection)
            assert isinstance(projection.module, NativeLinear)
            affine = projection.module.affine
            keep(affine)
            yield None if stack is None else CProjection(affine.c, stack)

    found = [projection for projection in projections() if projection is not None]
    if len(found) < 4:
        return None
    norm = None if layer.qk_norm is None else layer.qk_norm.data_ptr()
    return CLayer(layer.norm.data_ptr(), layer.mlp_norm.data_ptr(), norm, layer.window or 0, *found)


def _cache_rows(group: Decode) -> CCacheRows:
    block, tokens, rows = group.block, group.tokens, group.rows
    keys, values = block.pointers
    kind = KINDS[block.keys[0].dtype]
    count = tokens.stop - tokens.start
    return CCacheRows(
        tokens.start,
        count,
        rows.start,
        block.capacity,
        kind,
        group.starts.data_ptr(),
        addressof(keys),
        addressof(values),
    )


# What a layer computes between its products.


@dataclass(frozen=True)
class Sizes:
    """heads: of the queries; keys: heads of the keys, and of the values; dim: of a head; eps: of the norms."""

    heads: int
    keys: int
    dim: int
    eps: float


class Between:
    """What a layer computes between its products.

    act: the gate's activation. native: computes in place of torch, if given.
    """

    def __init__(self, sizes: Sizes, act: Callable[[Tensor], Tensor], native: NativeLayers | None = None) -> None:
        self._sizes, self._act, self._native = sizes, act, native

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its RMSNorm."""
        if self._native is not None:
            return self._native.add_norm(x, y, weight)
        x = x if y is None else x + y
        return x, F.rms_norm(x, x.shape[-1:], weight, self._sizes.eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 · size) -> (tokens, size)"""
        if self._native is not None:
            return self._native.gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self._act(gate) * up

    def attend(self, step: Pass, number: int, layer: Layer, qkv: Tensor, turn: Turn) -> Tensor:
        """(tokens, (heads + 2 · keys) · dim) -> (tokens, heads · dim)"""
        out = qkv.new_empty(len(qkv), self._sizes.heads * self._sizes.dim)
        rotated = None
        for group in step.groups:
            if self._native is not None and isinstance(group, Decode):
                self._native.attend(group, number, layer, qkv, turn, out)
                continue
            rotated = rotated or self._rotated(layer, qkv, turn)
            attended = attend_group(group, number, *rotated, Scoring(window=layer.window))
            out[group.tokens] = attended.reshape(-1, out.shape[1])
        return out

    def _rotated(self, layer: Layer, qkv: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (tokens, heads, dim) each."""
        heads, keys, dim = self._sizes.heads, self._sizes.keys, self._sizes.dim
        cosine, sine = (part[:, None] for part in turn)
        qkv = qkv.view(len(qkv), -1, dim)
        qk = qkv[:, : heads + keys]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (dim,), None, self._sizes.eps) * layer.qk_norm
        qk = torch.addcmul(qk * cosine, torch.roll(qk, dim // 2, -1), sine)
        return qk[:, :heads], qk[:, heads:], qkv[:, heads + keys :]


def native_for(model: nn.Module, device: torch.device) -> Kernels | None:
    """Native code, for a model that it can compute; None if torch must do it."""
    config: Any = model.config
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    fits = device.type == "cpu" and takes(model) and dtype in KINDS and config.hidden_act == "silu"
    return kernels() if fits else None


def takes(model: nn.Module) -> bool:
    """Whether the lean decoder computes this model. It does not if the config lets tokens look at later ones."""
    return type(model).__name__ in ARCHITECTURES and getattr(model.config, "is_causal", True) is True


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    # Mistral has one window for all layers, in its config; Llama has none.
    return getattr(attention.config, "sliding_window", None)
