"""Linears for CPUs, computed by native code or by torch's kernels, with int8 or int4 weights if wanted.

Only the weights are quantised. Each row of a batch is computed on its own: rows share no scale. Adapters are added
outside of these modules, in their own precision.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_compose.engines.devices import multiplies_bfloat16
from model_compose.native import FEW, GROUP, Affine, Kernels, kernels

WIDE = 96
"""From this many rows on, int8 weights are expanded and multiplied in float32:

torch's int8 kernel is made for few rows.
"""


class NativeLinear(nn.Linear):
    """A Linear that native code computes. Input and output are float32, whatever the weight is.

    packed: the weight in fewer bits; if None, the Linear's own weight is used. torch computes calls of many tokens: in
    bfloat16 if the weight is bfloat16 and the processor has instructions for it, else in float32.
    """

    def __init__(self, native: Kernels, linear: nn.Linear, packed: Affine | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        self.weight = linear.weight if packed is None else nn.Parameter(torch.empty(0), requires_grad=False)
        self._native, self._packed = native, packed
        self._bfloat16 = linear.weight.dtype == torch.bfloat16 and packed is None and multiplies_bfloat16()

    @property
    def affine(self) -> Affine:
        """The weight as it is now: a fold replaces it."""
        if self._packed is not None:
            return replace(self._packed, bias=self.bias)
        return Affine(self.weight.data, self.in_features, bias=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        rows = x.reshape(-1, self.in_features).float().contiguous()
        y = self._native.linear(rows, self.affine) if len(rows) <= FEW else self._multiply_many(rows)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        if self._bfloat16:
            y = F.linear(rows.bfloat16(), self.weight).float()
            return y if self.bias is None else y.add_(self.bias)
        plain = self._packed is None and self.weight.dtype == torch.float32
        return F.linear(rows, self.weight if plain else self._native.expand(self.affine), self.bias)


class QuantizedLinear(nn.Linear):
    """A Linear whose weight is kept in fewer bits, by torch's kernels. They take and return bfloat16.

    It keeps the sizes and the bias of the nn.Linear; `weight` is empty.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        y = self.multiply(x.reshape(-1, self.in_features).bfloat16())
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), bfloat16."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """w = q · s with q in -127..127 and one scale s for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        self.scales = (weight.abs().amax(dim=1) / 127).clamp_(min=1e-12).bfloat16()
        self.packed = (weight / self.scales[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)

    def multiply(self, x: Tensor) -> Tensor:
        if len(x) < WIDE:
            return torch._weight_int8pack_mm(x, self.packed, self.scales)
        return F.linear(x.float(), self.packed.float() * self.scales[:, None].float()).bfloat16()


class Int4Linear(QuantizedLinear):
    """w = (q - 8) · s + z with q in 0..15, and one scale s and one offset z for each group of inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        q, scales, offsets = quantize_groups(linear.weight.detach().float())
        self.packed = torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        self.scales_and_offsets = torch.stack([scales.T, offsets.T], dim=-1).bfloat16().contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales_and_offsets)


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest 4-bit groups of a float32 weight (out, in): q in 0..15 (out, in), scales and offsets (out, in / GROUP),
    with w ≈ (q - 8) · scale + offset.

    Each group takes the better of two grids: one goes from its least to its greatest value in 15 steps; the other has
    zero in the middle, and its value of largest size is 8 steps from there. These are the grids of GGUF's Q4_1 and
    Q4_0, so weights that come from such blocks are not rounded a second time.
    """
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp_(min=1e-12)
    largest = torch.where(high > -low, high, low)
    grids = [(step, low + 8 * step), (torch.where(largest == 0, step, largest / -8), torch.zeros_like(low))]
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, float("inf"))
    for scale, offset in grids:
        q = ((groups - offset) / scale).round_().add_(8).clamp_(0, 15)
        error = ((q - 8) * scale + offset - groups).square_().sum(dim=-1, keepdim=True)
        better = error < least
        best = (
            (q, scale, offset)
            if best is None
            else tuple(  # type: ignore[assignment]
                torch.where(better, new, old) for new, old in zip((q, scale, offset), best, strict=True)
            )
        )
        least = torch.minimum(least, error)
    assert best is not None
    q, scale, offset = best
    return q.view_as(weight), scale[..., 0], offset[..., 0]


def quantize(kind: str, linear: nn.Linear, *, head: bool = False) -> nn.Module:
    """The Linear in int8 or int4.

    Output heads are always int8, and so are Linears whose shape the int4 kernel cannot take.
    """
    native = kernels()
    four = kind == "int4" and not head and linear.in_features % GROUP == 0 and linear.out_features % GROUP == 0
    if native is not None:
        return NativeLinear(native, linear, (_packed4 if four else _packed8)(linear.weight.detach().float()))
    return Int4Linear(linear) if four else Int8Linear(linear)


def _packed8(weight: Tensor) -> Affine:
    scales = (weight.abs().amax(dim=1) / 127).clamp_(min=1e-12)
    q = (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Affine(F.pad(q, (0, -weight.shape[1] % GROUP)).contiguous(), weight.shape[1], scales)


def _packed4(weight: Tensor) -> Affine:
    q, scales, offsets = quantize_groups(weight)
    halves = q.to(torch.uint8).view(len(q), -1, 2, GROUP // 2)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).view(len(q), -1)
    return Affine(packed, weight.shape[1], torch.stack([scales, offsets - 8 * scales]))


def quantize_modules(model: nn.Module, kind: str) -> None:
    """Replaces all Linears of a model by quantised ones."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, quantize(kind, module, head=module is head))
