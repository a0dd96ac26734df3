"""The live way: what the adapters in use add to a module's output, ((x Aᵀ) ⊙ v) Bᵀ.

A and B stack the adapters in use, and v holds w_i·s_i repeated r_i times for each token's request, so changing weights
touches no factor; another set of adapters in use is stacked anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.blend import Blend
from model_compose.native import FEW, Kernels, kernels

Place = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class Layout:
    """For each of a stack's R rank positions: the name of its adapter, and that adapter's scaling; and where it computes.

    Stacks with equal layouts share one Layout and thereby the rows of v, which are computed once a pass.
    """

    adapters: tuple[str, ...]
    scalings: tuple[float, ...]
    device: torch.device


class Mix:
    """The weights of every row of a batch. Rows may differ.

    counts: where the batch is flat (all tokens in one line), how many of them belong to each row.
    stack: the adapters whose factors are multiplied: at least those with a non-zero weight somewhere.
    """

    def __init__(self, rows: Sequence[Blend], counts: Sequence[int] | None = None) -> None:
        self.active = frozenset(name for blend in rows for name in blend.active)
        self.stack = self.active
        self._columns = {name: column for column, name in enumerate(sorted(self.active))}
        # The last column is for adapters that are in the stack without a request.
        self._weights = torch.tensor(
            [[blend.weights.get(name, 0.0) for name in self._columns] + [0.0] for blend in rows]
        )
        self._counts = None if counts is None else torch.tensor(counts)
        self._scales: dict[tuple[int, bool], Tensor] = {}

    def scales(self, layout: Layout, tokens: int) -> Tensor:
        """v in float32: (rows, 1, R), or (tokens, R) for a flat batch.

        tokens: how many a flat batch has here; one for each row where a model goes on with the last ones alone.
        """
        each = self._counts is not None and tokens != len(self._weights)
        key = (id(layout), each)  # layouts are shared objects: hashing their hundreds of parts would cost more than v
        v = self._scales.get(key)
        if v is None:
            columns = [self._columns.get(name, -1) for name in layout.adapters]
            v = self._weights[:, columns] * torch.tensor(layout.scalings)
            if self._counts is None:
                v = v[:, None]
            elif each:
                v = v.repeat_interleave(self._counts, dim=0)
            self._scales[key] = v = v.to(layout.device)
        return v


@dataclass(frozen=True)
class Stack:
    """Adapters of one branch that compute on one device in one dtype. a: (R, in), for an embedding (vocabulary, R);
    b: (R, out). R = Σ r_i."""

    a: Tensor
    b: Tensor
    layout: Layout


class Branch:
    """What the adapters add to one module, or to several fused ones that read the same input.

    members: the modules' paths with the columns of the output that are theirs. adapters: those that are loaded, by name,
    each with its place; the owner changes the mapping as adapters come and go. layouts: those that all branches share.
    """

    def __init__(
        self, members: Mapping[str, slice], width: int, adapters: Mapping[str, "Placed"], *,
        layouts: dict[Layout, Layout], embedding: bool = False, scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._layouts = layouts
        self._members, self._width, self._adapters = members, width, adapters
        self._embedding, self._scale = embedding, scale
        self._resident: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._of: frozenset[str] | None = None
        self.stacks: list[Stack] = []

    def add(self, x: Tensor, y: Tensor, mix: Mix) -> Tensor:
        """y + ((x Aᵀ) ⊙ v) Bᵀ, in place where dtype and device allow it. x: (…, in), or token ids; y: (…, out)."""
        for stack in self.stacked(mix):
            a = stack.a
            if native := _for_few(x, y, a):
                v = mix.scales(stack.layout, len(x))
                if v.shape == (len(x), len(a)):
                    native.low_rank(x, a, v, stack.b, y)
                    continue
            inner = x if x.device == a.device else x.to(a.device)
            if self._embedding:
                z = F.embedding(inner, a)
            else:
                z = F.linear(inner if inner.dtype == a.dtype else inner.to(a.dtype), a)
            v = mix.scales(stack.layout, z.shape[-2])
            if z.ndim == 2 and v.ndim == 3:  # some modules (a shared expert) see rows * tokens in one line
                v = v[:, 0].repeat_interleave(len(z) // len(v), dim=0)
            z = z.mul_(v) if z.dtype == v.dtype and z.ndim == v.ndim == 2 else (z * v).to(z.dtype)
            if z.ndim == y.ndim == 2 and y.dtype == z.dtype and y.device == z.device:
                y.addmm_(z, stack.b, alpha=self._scale)
            else:
                y = (y + (z @ stack.b * self._scale).to(y.device)).to(y.dtype)
        return y

    def stacked(self, mix: Mix) -> list[Stack]:
        """The adapters of `mix.stack` that act here, one stack for each device and dtype."""
        if self._of is not mix.stack:
            self._restack(mix.stack)
        return self.stacks

    def drop(self, adapter: str) -> None:
        """Forgets an adapter's factors on their device; it is in no stack, or never asked for again."""
        for path in self._members:
            self._resident.pop((adapter, path), None)
        if self._of is not None and adapter in self._of:
            self.stacks, self._of = [], None

    def _restack(self, names: frozenset[str]) -> None:
        groups: dict[Place, list[tuple[str, str, Factors]]] = {}
        for path in self._members:
            for name in sorted(names):
                if path in self._adapters[name].adapter.modules:
                    part = (path, name, self._adapters[name].adapter.modules[path])
                    groups.setdefault(self._adapters[name].place, []).append(part)
        self.stacks = [self._stack(parts, place) for place, parts in groups.items()]
        self._of = names

    def _stack(self, parts: list[tuple[str, str, Factors]], place: Place) -> Stack:
        layout = Layout(
            tuple(name for _, name, factors in parts for _ in range(factors.rank)),
            tuple(factors.scaling for _, _, factors in parts for _ in range(factors.rank)),
            place[0],
        )
        layout = self._layouts.setdefault(layout, layout)
        pairs = [self._on_device(path, name, factors, place) for path, name, factors in parts]
        a = torch.cat([a for a, _ in pairs], dim=1 if self._embedding else 0)
        device, dtype = place
        b = torch.zeros(len(layout.adapters), self._width, device=device, dtype=dtype)
        start = 0
        for (path, _, factors), (_, part) in zip(parts, pairs, strict=True):
            b[start : start + factors.rank, self._members[path]] = part
            start += factors.rank
        return Stack(a, b, layout)

    def _on_device(self, path: str, name: str, factors: Factors, place: Place) -> tuple[Tensor, Tensor]:
        """One adapter's A, as a stack holds it, and Bᵀ: moved once, kept until it is dropped."""
        if (name, path) not in self._resident:
            a = factors.a.T if self._embedding else factors.a
            self._resident[name, path] = (a.to(*place), factors.b.T.to(*place))
        return self._resident[name, path]


def _for_few(x: Tensor, y: Tensor, a: Tensor) -> Kernels | None:
    """For a step of few tokens on a CPU, one call of native code in the place of three; None is torch's way."""
    few = x.ndim == 2 and len(x) <= FEW and x.dtype == y.dtype == a.dtype == torch.float32
    on_cpu = few and x.device.type == y.device.type == a.device.type == "cpu"
    return kernels() if on_cpu and x.is_contiguous() and y.is_contiguous() else None


@dataclass(frozen=True)
class Placed:
    """An adapter, and where and in which dtype it computes."""

    adapter: LoraAdapter
    place: Place
