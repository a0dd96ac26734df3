"""The lean decoder's layers by native code: those of a step that only decodes in one call, and else their attention."""

from collections.abc import Callable, Iterator, Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model_compose.engines.huggingface.attention import Decode, Pass
from model_compose.engines.huggingface.quantized import NativeLinear
from model_compose.lora.layers import LoraModel, Projection
from model_compose.lora.live import Layout, Mix
from model_compose.native import FEW, KINDS, CLayer, CProjection, CCacheRows, CHeads, CStack, Kernels

if TYPE_CHECKING:
    from model_compose.engines.huggingface.decoder import Layer, Turn


@dataclass(frozen=True)
class Table:
    """The layers as native code reads them, with pointers to weights and adapters. layouts: of its stacks, by number.

    swaps, stack: what must be as it was for the pointers to hold. kept: keeps alive what they point to.
    """

    layers: Any
    layouts: tuple[Layout, ...]
    swaps: int
    stack: frozenset[str] | None
    kept: tuple[Any, ...]


class NativeLayers:
    """layers: of the decoder. norm: the last one."""

    def __init__(
        self, native: Kernels, lora: LoraModel, layers: Sequence["Layer"], shape: CHeads, norm: Tensor
    ) -> None:  # fmt: skip
        self._native, self._lora, self._layers, self._shape, self._norm = native, lora, layers, shape, norm
        self._table: Table | None = None

    def decode(self, x: Tensor, step: Pass, turn: "Turn", mix: Mix | None) -> Tensor | None:
        """x (tokens, size), overwritten -> the last layer's output, normed. None where it takes more than one call: a step
        with prompts, or adapters on another device or in another dtype."""
        groups = [group for group in step.groups if isinstance(group, Decode)]
        if len(groups) < len(step.groups) or len(x) > FEW:
            return None
        stack = None if mix is None else mix.stack
        table = self._table
        if table is None or table.swaps != self._lora.swaps or table.stack is not stack:
            table = self._table = self._read(mix, stack)
        if table.layers is None:
            return None
        scales = [mix.scales(layout, len(x)) for layout in table.layouts] if mix is not None else []
        runs = [_run(group) for group in groups]
        return self._native.decode(table.layers, scales, runs, self._shape, turn, self._norm, x)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x, self._native.add_norm(x, y, weight, self._shape.eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        return self._native.silu_mul(gate_up)

    def attend(self, group: Decode, number: int, layer: "Layer", qkv: Tensor, turn: "Turn", out: Tensor) -> None:
        self._native.attend(_run(group), number, self._shape, layer.qk_norm, layer.window, qkv, *turn, out)

    def _read(self, mix: Mix | None, stack: frozenset[str] | None) -> Table:
        kept: list[Any] = []
        layouts: dict[int, tuple[int, Layout]] = {}

        def stack_of(projection: Projection) -> CStack | None:
            stacks = [] if mix is None else projection.branch.stacked(mix)
            if not stacks:
                return CStack()
            only = stacks[0]
            if len(stacks) > 1 or only.a.dtype != torch.float32 or only.a.device.type != "cpu":
                return None
            kept.append(only)
            number, _ = layouts.setdefault(id(only.layout), (len(layouts), only.layout))
            return CStack(only.a.data_ptr(), only.b.data_ptr(), len(only.a), number)

        rows = [_layer(layer, stack_of, kept.append) for layer in self._layers]
        whole = [row for row in rows if row is not None]
        layers = (CLayer * len(rows))(*whole) if len(whole) == len(rows) else None
        return Table(layers, tuple(layout for _, layout in layouts.values()), self._lora.swaps, stack, tuple(kept))


def _layer(
    layer: "Layer", stack_of: Callable[[Projection], CStack | None], keep: Callable[[Any], None]
) -> CLayer | None:
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


def _run(group: Decode) -> CCacheRows:
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
