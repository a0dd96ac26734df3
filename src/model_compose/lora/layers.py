"""The live and the folded way of running a blend on a torch model.

Live: a forward hook on each adapted module adds ((x Aᵀ) ⊙ v) Bᵀ, where A and B stack the module's adapters once at load
and v holds w_i·s_i repeated r_i times for each row of the batch. Changing weights touches no factor.

Folded: W + Σ w s B A, summed in float32 and rounded once to W's dtype. The originals stay referenced (mapped, where the
checkpoint is mapped) and are put back on unfold; nothing is ever subtracted.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_compose.errors import AdapterError
from model_compose.lora.adapter import LoraAdapter, ModuleShape, check
from model_compose.lora.blend import Blend

MADV_PAGEOUT = 21
"""<asm-generic/mman-common.h>; Linux 5.4 and newer."""

FOLD_ROWS_BYTES = 64 << 20
"""A fold works on row blocks whose float32 sum is at most this large, so that memory stays flat."""


@dataclass(frozen=True)
class Placement:
    """Where and in which dtype one adapter computes; None is the base module's own."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Layout:
    """For each of a branch's R rank positions: which adapter it belongs to (its index) and that adapter's scaling.

    Modules with equal layouts share the rows of v, which are then computed once a step.
    """

    adapters: tuple[int, ...]
    scalings: tuple[float, ...]


class Mix:
    """The weights of every row of a batch: a (rows, adapters) matrix. Rows may differ; a zero costs nothing where the
    whole column is zero."""

    def __init__(self, rows: Sequence[Blend], names: Sequence[str]) -> None:
        self.weights = torch.tensor([[blend.weights.get(name, 0.0) for name in names] for blend in rows])
        self.active = frozenset(torch.nonzero(self.weights.any(dim=0)).flatten().tolist())
        self._spans: dict[tuple[Layout, torch.device], list[tuple[slice, Tensor]]] = {}

    def spans(self, layout: Layout, device: torch.device) -> list[tuple[slice, Tensor]]:
        """The runs of rank positions whose adapter is in use, each with its v of shape (rows, 1, positions), float32."""
        key = (layout, device)
        if key not in self._spans:
            v = self.weights[:, list(layout.adapters)] * torch.tensor(layout.scalings)
            self._spans[key] = [
                (span, v[:, None, span].to(device)) for span in _runs([i in self.active for i in layout.adapters])
            ]
        return self._spans[key]


class Branch:
    """The adapters of one module that compute on one device in one dtype, stacked.

    a: (R, in), for an embedding (vocabulary, R). b: (R, out). R = Σ r_i.
    """

    def __init__(self, a: Tensor, b: Tensor, layout: Layout, scale: float = 1.0, *, embedding: bool = False) -> None:
        self.a, self.b, self.layout, self.scale, self.embedding = a, b, layout, scale, embedding

    def delta(self, x: Tensor, mix: Mix) -> Tensor | None:
        """((x Aᵀ) ⊙ v) Bᵀ for x of (rows, tokens, in), or of token ids (rows, tokens); None where no adapter is in use."""
        total: Tensor | None = None
        for span, v in mix.spans(self.layout, self.a.device):
            if self.embedding:
                z = F.embedding(x.to(self.a.device), self.a[:, span])
            else:
                z = F.linear(x.to(self.a.device, self.a.dtype), self.a[span])
            if z.ndim == 2:  # some modules (experts) see (rows * tokens, in)
                v = v[:, 0].repeat_interleave(len(z) // len(v), dim=0)
            part = (z * v).to(z.dtype) @ self.b[span]
            total = part if total is None else total + part
        return total if total is None or self.scale == 1.0 else total * self.scale


class LoraModel:
    """A base model with its adapters attached: live by default, or with one blend folded into the weights.

    The base's module tree, names and parameters stay as they were; only forward hooks are added. One thread at a time.
    Raises AdapterError where an adapter does not fit.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[LoraAdapter], placements: Mapping[str, Placement] | None = None
    ) -> None:
        self.model, self.adapters = model, {adapter.name: adapter for adapter in adapters}
        self.names = tuple(self.adapters)
        self.folded: Blend | None = None
        self._mix: Mix | None = None
        self._originals: dict[str, Tensor] = {}
        shapes = module_shapes(model)
        for adapter in adapters:
            check(adapter, shapes)
            _check_copies(adapter, model)
        for path in sorted({path for adapter in adapters for path in adapter.modules}):
            self._attach(path, placements or {})

    @contextmanager
    def use(self, rows: Sequence[Blend]) -> Iterator[None]:
        """Within the block, row i of every forward pass gets rows[i]: live, or by the weights if that blend is folded."""
        if self.folded is None:
            mix = Mix(rows, self.names)
            self._mix = mix if mix.active else None
        else:
            assert all(row.active == self.folded.active for row in rows), "another blend is folded in"
        try:
            yield
        finally:
            self._mix = None

    def fold(self, blend: Blend) -> None:
        """Adds the blend into the weights; the live way then rests until `unfold`."""
        self.unfold()
        for path in sorted({path for name in blend.active for path in self.adapters[name].modules}):
            module = self.model.get_submodule(path)
            _untie(self.model, path)
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            self._originals[path] = weight.data
            weight.data = self._folded(weight.data, path, blend, transposed=_kind(module) != "linear")
            _page_out(self._originals[path])
        self.folded = blend

    def unfold(self) -> None:
        """Puts the original weights back."""
        for path, original in self._originals.items():
            weight = self.model.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            weight.data = original
        self._originals.clear()
        self.folded = None

    def _folded(self, weight: Tensor, path: str, blend: Blend, *, transposed: bool) -> Tensor:
        """A new tensor W + Σ w s B A (its transpose for Conv1D and embeddings, whose weights are (in, out))."""
        parts = [
            (self.adapters[name].modules[path], w)
            for name, w in blend.active.items()
            if path in self.adapters[name].modules
        ]
        a = torch.cat([factors.a.to(weight.device, torch.float32) for factors, _ in parts])
        b = torch.cat(
            [factors.b.to(weight.device, torch.float32) * (w * factors.scaling) for factors, w in parts], dim=1
        )
        left, right = (a.T, b.T) if transposed else (b, a)
        result = torch.empty_like(weight)
        step = max(1, FOLD_ROWS_BYTES // (4 * weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            result[rows] = torch.addmm(weight[rows].float(), left[rows], right)
        return result

    def _attach(self, path: str, placements: Mapping[str, Placement]) -> None:
        module = self.model.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, Tensor)
        compute = weight.dtype if weight.dtype.is_floating_point else torch.float32
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, name in enumerate(self.names):
            if path in self.adapters[name].modules:
                placement = placements.get(name, Placement())
                groups.setdefault((placement.device or weight.device, placement.dtype or compute), []).append(index)
        branches = [self._branch(module, path, members, *where) for where, members in groups.items()]

        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._mix is None:
                return None
            for branch in branches:
                delta = branch.delta(inputs[0], self._mix)
                if delta is not None:
                    output = (output + delta.to(output.device)).to(output.dtype)
            return output

        module.register_forward_hook(add)

    def _branch(
        self, module: nn.Module, path: str, members: list[int], device: torch.device, dtype: torch.dtype
    ) -> Branch:
        factors = [self.adapters[self.names[index]].modules[path] for index in members]
        layout = Layout(
            tuple(index for index, f in zip(members, factors, strict=True) for _ in range(f.rank)),
            tuple(f.scaling for f in factors for _ in range(f.rank)),
        )
        a = torch.cat([f.a.to(device, dtype) for f in factors])
        b = torch.cat([f.b.T.to(device, dtype) for f in factors])
        if not factors[0].embedding:
            return Branch(a, b, layout)
        # A scaled embedding (Gemma) multiplies its whole output, so the adapter's part as well.
        scale = float(getattr(module, "embed_scale", 1.0))
        return Branch(a.T.contiguous(), b, layout, scale, embedding=True)


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """The modules that LoRA can act on, by path: Linear, Conv1D, Embedding. Works on a model on the meta device."""
    shapes = {}
    for path, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            rows, columns = weight.shape[0], weight.shape[1]
            shapes[path] = ModuleShape(kind, columns, rows) if kind == "linear" else ModuleShape(kind, rows, columns)
    return shapes


def _kind(module: nn.Module) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _untie(model: nn.Module, path: str) -> None:
    """Gives the module a parameter of its own where another module shares it: a fold of one must not touch the other."""
    module = model.get_submodule(path)
    shared = [
        other for other in model.modules() if other is not module and other._parameters.get("weight") is module.weight
    ]
    if shared:
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)


def _page_out(tensor: Tensor) -> None:
    """Tells the kernel that a tensor will not be read for long: pages that are mapped from a checkpoint leave memory and
    come back from the file when read. Advice only; harmless for any other memory, and where the kernel has none."""
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)


def _check_copies(adapter: LoraAdapter, model: nn.Module) -> None:
    """PEFT may store the base's embedding along with its adapter; where it was trained, the sum would not be exact."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, copy in adapter.copies.items():
        weight = parameters.get(name)
        if (
            weight is None
            or weight.shape != copy.shape
            or not torch.equal(copy.to(weight.device, weight.dtype), weight)
        ):
            raise AdapterError(
                f"adapter '{adapter.name}': it brings its own '{name}', which differs from the base model's (a resized or "
                "trained embedding). Replaced weights cannot be weighted; such an adapter is refused."
            )


def _runs(flags: Sequence[bool]) -> list[slice]:
    """The maximal runs of true flags, as slices."""
    runs: list[slice] = []
    start = 0
    for position in range(len(flags) + 1):
        if position == len(flags) or not flags[position]:
            if start < position:
                runs.append(slice(start, position))
            start = position + 1
    return runs
