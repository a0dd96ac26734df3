"""Compares adapters: how large each one is, and how much they act in the same directions. Everything is float64.

ΔW = s B A of a module is never multiplied out, which would take an (out, in) matrix. Norms and inner products are
computed from small products of the factors, angles between subspaces from orthonormal bases.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model_compose.errors import AdapterError
from model_compose.lora.adapter import Factors, LoraAdapter

if TYPE_CHECKING:
    import torch

Matrix = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Place:
    """Where a module is in the model.

    order: sorts embeddings first, then the layers by number, then the modules after them. layer: the layer's number, or
    the module's own name if it belongs to no layer. target: the last part of its path (q_proj).
    """

    order: tuple[int, int]
    layer: str
    target: str


@dataclass(frozen=True)
class Overlap:
    """How much two subspaces of a module's input (or output) space coincide, as a mean over modules.

    value: φ of `overlap`, from 0 (orthogonal) to 1 (one subspace contains the other). by_chance: the expected φ of two
    random subspaces with the same dimensions.
    """

    value: float
    by_chance: float


@dataclass(frozen=True)
class Pair:
    """Two adapters compared.

    modules: how many modules both adapt. cosine: between their whole updates, from -1 to 1; None if one of them is zero.
    inputs: the overlap of the rows of A (the directions that they read). outputs: the overlap of the columns of B (the
    directions that they write). Both are None if there is no module where both updates are nonzero.
    """

    one: str
    other: str
    modules: int
    cosine: float | None
    inputs: Overlap | None
    outputs: Overlap | None


@dataclass(frozen=True)
class Geometry:
    """The comparison of n adapters. grams: for each place, the (n, n) matrix of inner products ⟨ΔW_i, ΔW_j⟩, summed over
    the modules of that place."""

    names: tuple[str, ...]
    grams: Mapping[Place, Matrix]
    pairs: tuple[Pair, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that any adapter touches, in the order of the model."""
        return tuple(dict.fromkeys(place.layer for place in sorted(self.grams)))

    @property
    def targets(self) -> tuple[str, ...]:
        """The target modules that any adapter touches, in the order of the model."""
        return tuple(dict.fromkeys(place.target for place in sorted(self.grams)))

    def gram(self, *, layer: str | None = None, target: str | None = None) -> Matrix:
        """The inner products ⟨ΔW_i, ΔW_j⟩, (n, n), summed over one layer, one target or, if neither is given, all."""
        found = [
            gram
            for place, gram in self.grams.items()
            if layer in (None, place.layer) and target in (None, place.target)
        ]
        return np.sum(found, axis=0) if found else np.zeros((len(self.names), len(self.names)))

    def norms(self, *, layer: str | None = None, target: str | None = None) -> dict[str, float]:
        """‖ΔW‖_F of each adapter."""
        diagonal = np.sqrt(np.maximum(np.diagonal(self.gram(layer=layer, target=target)), 0))
        return dict(zip(self.names, diagonal.tolist(), strict=True))

    def shares(self, weights: Mapping[str, float], *, layer: str | None = None) -> dict[str, float]:
        """‖w ΔW‖_F of each adapter, divided by the sum over all adapters: the shares add up to 1, or are all 0."""
        sizes = {name: abs(weights.get(name, 0.0)) * norm for name, norm in self.norms(layer=layer).items()}
        total = sum(sizes.values())
        return {name: size / total if total else 0.0 for name, size in sizes.items()}

    def blend_norm(self, weights: Mapping[str, float], *, layer: str | None = None) -> float:
        """‖Σ w ΔW‖_F of the blend. The more the updates point in different directions, the smaller it is than the sum of
        their norms."""
        w = np.array([weights.get(name, 0.0) for name in self.names])
        return float(np.sqrt(max(float(w @ self.gram(layer=layer) @ w), 0.0)))


def measure(
    adapters: Collection[LoraAdapter], progress: Callable[[int, int], None] = lambda done, total: None
) -> Geometry:
    """Compare adapters of one base, module by module, so that only one module's factors are in memory as float64.

    progress(done, total): called with the number of modules before each of them. Raises AdapterError if two adapters
    cannot belong to the same base, since a module's sizes differ.
    """
    _check_alike(adapters)
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    grams: dict[Place, Matrix] = {}
    overlaps: dict[tuple[int, int], list[tuple[Overlap | None, Overlap | None]]] = {
        pair: [] for pair in combinations(range(len(adapters)), 2)
    }
    for done, path in enumerate(paths):
        progress(done, len(paths))
        having = {i: adapter.modules[path] for i, adapter in enumerate(adapters) if path in adapter.modules}
        gram = grams.setdefault(place(path), np.zeros((len(adapters), len(adapters))))
        for i, one in having.items():
            for j, other in having.items():
                if i <= j:
                    gram[i, j] += (product := inner(one, other))
                    gram[j, i] += product if i != j else 0.0
        bases = {i: (basis(factors.a.T), basis(factors.b)) for i, factors in having.items()} if len(having) > 1 else {}
        for i, j in combinations(bases, 2):
            overlaps[i, j].append((overlap(bases[i][0], bases[j][0]), overlap(bases[i][1], bases[j][1])))
    names = tuple(adapter.name for adapter in adapters)
    whole = np.sum(list(grams.values()), axis=0)
    pairs = [_pair(names[i], names[j], whole[np.ix_((i, j), (i, j))], found) for (i, j), found in overlaps.items()]
    return Geometry(names, grams, tuple(pairs))


def _check_alike(adapters: Collection[LoraAdapter]) -> None:
    first: dict[str, tuple[str, tuple[int, int]]] = {}
    for adapter in adapters:
        for path, factors in adapter.modules.items():
            shape = (int(factors.b.shape[0]), int(factors.a.shape[1]))
            name, known = first.setdefault(path, (adapter.name, shape))
            if known != shape:
                raise AdapterError(
                    f"the adapters '{name}' and '{adapter.name}' belong to different base models: {path} is {known[0]} x "
                    f"{known[1]} in the first and {shape[0]} x {shape[1]} in the second; inspect them one at a time"
                )


def inner(one: Factors, other: Factors) -> float:
    """⟨s₁B₁A₁, s₂B₂A₂⟩ = s₁ s₂ tr((B₁ᵀB₂)(A₂A₁ᵀ)) for one module. Of an update with itself, this is ‖s B A‖²_F."""
    b = one.b.double().T @ other.b.double()
    a = one.a.double() @ other.a.double().T
    return one.scaling * other.scaling * float((b * a).sum())


def basis(matrix: "torch.Tensor") -> "torch.Tensor":
    """An orthonormal basis, (d, k), of the space that the columns of a (d, r) matrix span.

    k is the numerical rank (0 for a matrix of zeros): a singular value counts if it is above the largest one times
    max(d, r) times float64's epsilon.
    """
    import torch

    q, r = torch.linalg.qr(matrix.double())
    u, s, _ = torch.linalg.svd(r)
    cut = s.max() * max(matrix.shape) * torch.finfo(torch.float64).eps if len(s) else 0.0
    rank = int((s > cut).sum())
    columns: torch.Tensor = q @ u[:, :rank]
    return columns


def overlap(one: "torch.Tensor", other: "torch.Tensor") -> Overlap | None:
    """φ = ‖Q₁ᵀQ₂‖²_F / min(k₁, k₂): the mean squared cosine of the principal angles between two subspaces (Hu et al. 2021,
    arXiv 2106.09685, section 7.2, equation 4). Q₁ (d, k₁) and Q₂ (d, k₂) come from `basis`.

    For random subspaces of d dimensions, the expected value of ‖Q₁ᵀQ₂‖²_F is k₁k₂/d. None if k₁ or k₂ is 0.
    """
    d, one_rank = one.shape
    other_rank = other.shape[1]
    if not (one_rank and other_rank):
        return None
    smaller = min(one_rank, other_rank)
    return Overlap(float((one.T @ other).square().sum()) / smaller, one_rank * other_rank / d / smaller)


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def place(path: str) -> Place:
    """The place of a module path. The first number is the layer: model.layers.3.mlp.experts.5.w1 is w1 in layer 3."""
    match = _LAYER.search(path)
    target = path.rpartition(".")[2]
    if match:
        return Place((1, int(match[1])), match[1], target)
    return Place((0 if re.search("emb|wte|wpe", path) else 2, 0), target, target)


def _pair(one: str, other: str, gram: Matrix, found: Collection[tuple[Overlap | None, Overlap | None]]) -> Pair:
    sizes = float(np.sqrt(gram[0, 0] * gram[1, 1]))
    cosine = float(np.clip(gram[0, 1] / sizes, -1, 1)) if sizes > 0 else None
    inputs, outputs = (_mean(side) for side in ([x for x, _ in found], [y for _, y in found]))
    return Pair(one, other, len(found), cosine, inputs, outputs)


def _mean(found: Iterable[Overlap | None]) -> Overlap | None:
    known: list[Any] = [(each.value, each.by_chance) for each in found if each is not None]
    return Overlap(*np.mean(known, axis=0).tolist()) if known else None
