"""The live way: what the adapters in use add to a module's output, ((x Aᵀ) ⊙ v) Bᵀ.

A and B hold the factors of all adapters in use, one after the other. v holds, for each token, its request's w_i·s_i,
repeated r_i times. So other weights need only another v; only another choice of adapters needs new A and B.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.blend import Blend
from model_compose.native import FEW, Kernels, kernels

Place = tuple[torch.device, torch.dtype]


@dataclass(frozen=True, eq=False)
class Layout:
    """For each of a stack's R rank positions: the name of its adapter, and that adapter's scaling; and where v is needed.

    Two layouts are equal only if they are the same object: v is looked up by its layout in every module, and comparing
    hundreds of positions would take longer than computing v. `Layouts` gives equal stacks the same object.
    """

    adapters: tuple[str, ...]
    scalings: tuple[float, ...]
    device: torch.device


class Layouts:
    """The layouts of a model's stacks.

    Stacks with the same positions share one Layout, so a pass computes their v once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, ...], tuple[float, ...], torch.device], Layout] = {}

    def of(self, adapters: tuple[str, ...], scalings: tuple[float, ...], device: torch.device) -> Layout:
        return self._known.setdefault((adapters, scalings, device), Layout(adapters, scalings, device))

    def forget(self) -> None:
        """Stacks that are made from now on share no layout with earlier ones."""
        self._known.clear()


@dataclass(frozen=True, eq=False)
class Selection:
    """The names of the adapters that are stacked.

    Two selections are equal only if they are the same object. A stack belongs to the selection for which it was made:
    an adapter that is unloaded and loaded again may have the same name and other factors.
    """

    names: frozenset[str]


class Mix:
    """The weights of every row of a batch. Rows may differ.

    counts: how many tokens each row has, if the batch is flat (all tokens in one line). selection: the adapters whose
    factors are multiplied; those with a non-zero weight in some row are among them.
    """

    def __init__(self, rows: Collection[Blend], counts: Collection[int] | None = None) -> None:
        self.active = frozenset(name for blend in rows for name in blend.active)
        self.selection = Selection(self.active)
        self._columns = {name: column for column, name in enumerate(sorted(self.active))}
        # The last column is for adapters that are selected although no row uses them.
        self._weights = torch.tensor(
            [[blend.weights.get(name, 0.0) for name in self._columns] + [0.0] for blend in rows]
        )
        self._counts = None if counts is None else torch.tensor(list(counts))
        self._scales: dict[tuple[Layout, bool], Tensor] = {}

    def scales(self, layout: Layout, tokens: int) -> Tensor:
        """v in float32: (rows, 1, R), or (tokens, R) for a flat batch.

        tokens: how many tokens a flat batch has in this module. Equals the row count once only each row's last token
        remains.
        """
        each = self._counts is not None and tokens != len(self._weights)
        v = self._scales.get((layout, each))
        if v is None:
            columns = [self._columns.get(name, -1) for name in layout.adapters]
            v = self._weights[:, columns] * torch.tensor(layout.scalings)
            if self._counts is None:
                v = v[:, None]
            elif each:
                v = v.repeat_interleave(self._counts, dim=0)
            self._scales[layout, each] = v = v.to(layout.device)
        return v


@dataclass(frozen=True)
class Stack:
    """The factors of all selected adapters that act on one branch and compute on one device in one dtype.

    a: (R, in), or (vocabulary, R) for an embedding; b: (R, out). R = Σ r_i.
    """

    a: Tensor
    b: Tensor
    layout: Layout


class Branch:
    """What the adapters add to one module, or to several fused modules that read the same input.

    members: the modules' paths, each with its columns of the output. width: of the output. adapters: all loaded
    adapters by name; the owner changes this mapping as adapters come and go. layouts: shared by all branches of a
    model. scale: a factor for all that the adapters add.
    """

    def __init__(
        self, members: Mapping[str, slice], width: int, adapters: Mapping[str, "Placed"], *,
        layouts: Layouts, embedding: bool = False, scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._layouts = layouts
        self._members, self._width, self._adapters = members, width, adapters
        self._embedding, self._scale = embedding, scale
        self._resident: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._selection: Selection | None = None
        self.stacks: list[Stack] = []

    def add(self, x: Tensor, y: Tensor, mix: Mix) -> Tensor:
        """y + ((x Aᵀ) ⊙ v) Bᵀ, in place if dtype and device allow it. x: (…, in), or token ids; y: (…, out)."""
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
            if z.ndim == 2 and v.ndim == 3:  # some modules (a shared expert) get rows · tokens in one line
                v = v[:, 0].repeat_interleave(len(z) // len(v), dim=0)
            z = z.mul_(v) if z.dtype == v.dtype and z.ndim == v.ndim == 2 else (z * v).to(z.dtype)
            if z.ndim == y.ndim == 2 and y.dtype == z.dtype and y.device == z.device:
                y.addmm_(z, stack.b, alpha=self._scale)
            else:
                y = (y + (z @ stack.b * self._scale).to(y.device)).to(y.dtype)
        return y

    def stacked(self, mix: Mix) -> list[Stack]:
        """The stacks of the mix's selection for this branch: one for each device and dtype."""
        if self._selection != mix.selection:
            self._restack(mix.selection)
        return self.stacks

    def drop(self, adapter: str) -> None:
        """Frees an adapter's factors on their device. It must not be selected, unless it is never used again."""
        for path in self._members:
            self._resident.pop((adapter, path), None)
        if self._selection is not None and adapter in self._selection.names:
            self.stacks, self._selection = [], None

    def _restack(self, selection: Selection) -> None:
        groups: dict[Place, list[tuple[str, str, Factors]]] = {}
        for path in self._members:
            for name in sorted(selection.names):
                if path in self._adapters[name].adapter.modules:
                    part = (path, name, self._adapters[name].adapter.modules[path])
                    groups.setdefault(self._adapters[name].place, []).append(part)
        self.stacks = [self._stack(parts, place) for place, parts in groups.items()]
        self._selection = selection

    def _stack(self, parts: list[tuple[str, str, Factors]], place: Place) -> Stack:
        device, dtype = place
        layout = self._layouts.of(
            tuple(name for _, name, factors in parts for _ in range(factors.rank)),
            tuple(factors.scaling for _, _, factors in parts for _ in range(factors.rank)),
            device,
        )
        pairs = [self._on_device(path, name, factors, place) for path, name, factors in parts]
        a = torch.cat([a for a, _ in pairs], dim=1 if self._embedding else 0)
        # Fused modules: an adapter of one member adds 0 to the columns of the others.
        b = torch.zeros(len(layout.adapters), self._width, device=device, dtype=dtype)
        start = 0
        for (path, _, factors), (_, part) in zip(parts, pairs, strict=True):
            b[start : start + factors.rank, self._members[path]] = part
            start += factors.rank
        return Stack(a, b, layout)

    def _on_device(self, path: str, name: str, factors: Factors, place: Place) -> tuple[Tensor, Tensor]:
        """One adapter's A as a stack holds it, and its Bᵀ. They are moved once and stay until `drop`."""
        if (name, path) not in self._resident:
            a = factors.a.T if self._embedding else factors.a
            self._resident[name, path] = (a.to(*place), factors.b.T.to(*place))
        return self._resident[name, path]


def _for_few(x: Tensor, y: Tensor, a: Tensor) -> Kernels | None:
    """Native code, which takes one call where torch takes three; None unless the tokens are few, on a CPU, in float32."""
    few = x.ndim == 2 and len(x) <= FEW and x.dtype == y.dtype == a.dtype == torch.float32
    on_cpu = few and x.device.type == y.device.type == a.device.type == "cpu"
    return kernels() if on_cpu and x.is_contiguous() and y.is_contiguous() else None


@dataclass(frozen=True)
class Placed:
    """An adapter, and the device and dtype in which it computes."""

    adapter: LoraAdapter
    place: Place
