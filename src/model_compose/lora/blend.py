"""Blends: adapters with weights, and what follows from them. Resolves a request's blend, gives each blend its identity, and
computes a blend as one stacked adapter or as deltas of weights.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from model_compose.errors import InputError, Keys
from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.lora.methods import METHODS, FullRank, LowRank, Method
from model_compose.schema import LONGEST_NAME, finite_number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blend:
    """y = W x + Σ weights[i] · s_i · B_i (A_i x).

    weights: by adapter. An adapter that is missing has weight 0, so {} is the bare base. name: the blend's name; None if it
    has none. method: how the adapters are combined; None means by this sum.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None
    method: Method | None = None

    @property
    def active(self) -> dict[str, float]:
        """The weights that are not 0, sorted by the adapters' names. Only these affect the result."""
        return {name: weight for name, weight in sorted(self.weights.items()) if weight != 0}

    @property
    def full_rank(self) -> bool:
        """Whether the result is not a LoRA, so that it can only run folded into the base's weights."""
        return isinstance(self.method, FullRank)

    @property
    def low_rank(self) -> bool:
        """Whether the result is a LoRA other than the weighted sum. That LoRA must be computed before it can run."""
        return isinstance(self.method, LowRank)

    def equals(self, other: "Blend") -> bool:
        """Whether both blends compute the same function. Their names may differ."""
        return self.method == other.method and self.active == other.active

    @property
    def described(self) -> str:
        """The blend's name and method in messages: 'merged' (ties)."""
        name = f"'{self.name}'" if self.name else "without a name"
        return name if self.method is None else f"{name} ({self.method.method})"

    def identity(self, base: str, adapters: Mapping[str, str]) -> str:
        """A digest of the base, the active adapters, their weights and the method: 16 hexadecimal digits.

        Caches use it as the blend's key. base: the base's identity. adapters: the digest of each adapter's content, by
        name.
        """
        method = "exact" if self.method is None else self.method.model_dump()
        parts = [method, base, *([adapters[name], repr(float(weight))] for name, weight in self.active.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Blends:
    """The blends of one component: the named ones, the default, and by `resolve` any weights of its adapters."""

    adapters: tuple[str, ...]
    named: Mapping[str, Blend]
    default: Blend

    @property
    def full_rank(self) -> tuple[Blend, ...]:
        """The named blends whose result is not a LoRA. Blends that compute the same function appear once."""
        return _different(blend for blend in self.named.values() if blend.full_rank)

    @property
    def low_rank(self) -> tuple[Blend, ...]:
        """The named blends whose result is a LoRA other than the sum. Blends that compute the same function appear once."""
        return _different(blend for blend in self.named.values() if blend.low_rank)

    def resolve(self, value: Any, *, place: str = "blend") -> Blend:
        """The blend that a request asks for.

        None and "" mean the default. A string names the default or another blend, or one adapter with weight 1. A mapping
        {adapter: weight} replaces all weights of the default. Raises InputError, which names `place` and the known names.
        """
        if value is None or value == "":
            return self.default
        if isinstance(value, Blend):
            return value
        if isinstance(value, str):
            if value in self.named:
                return self.named[value]
            if value in self.adapters:
                return Blend({value: 1.0}, value)
            if value == self.default.name:
                return self.default
            default = (self.default.name,) if self.default.name else ()
            raise self._unknown(value, place, (*default, *self.named, *self.adapters), "blend")
        if isinstance(value, Mapping):
            if names_method(value):
                raise InputError(
                    f"{place}: a request can give weights, but no method ({', '.join(METHODS)}); define the blend in the "
                    "file under 'blends', and send its name",
                    field=f"{place}.method",
                    at=("method",),
                )
            return Blend({str(name): self._weight(name, weight, place) for name, weight in value.items()})
        raise InputError(f"{place} must be a name or a mapping of adapters to weights, not {value!r}", field=place)

    def _weight(self, name: object, weight: object, place: str) -> float:
        if name not in self.adapters:
            raise self._unknown(str(name), place, self.adapters, "adapter", at=(str(name),))
        try:
            return finite_number(weight)
        except PydanticCustomError as error:
            message = f"{place}.{name}: {error.message()}"
            raise InputError(message, field=f"{place}.{name}", at=(str(name),)) from None

    @staticmethod
    def _unknown(name: str, place: str, known: Iterable[str], what: str, at: Keys = ()) -> InputError:
        known, name = list(known), name[:LONGEST_NAME]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        listing = f"known: {', '.join(known)}" if known else f"this component has no {what}s"
        return InputError(f"{place}: unknown {what} '{name}'; {hint}{listing}", field=place, at=at)


def _different(blends: Iterable[Blend]) -> tuple[Blend, ...]:
    found: list[Blend] = []
    for blend in blends:
        if not any(blend.equals(other) for other in found):
            found.append(blend)
    return tuple(found)


def names_method(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping names a method, as in {method: ties, …}.

    An adapter may be called "method" too. In that case the value is its weight: a number, or a text that is one.
    """
    method = value.get("method")
    if not isinstance(method, str):
        return False
    try:
        finite_number(method)
    except PydanticCustomError:
        return True
    return False


def stack(blend: Blend, adapters: Mapping[str, LoraAdapter]) -> LoraAdapter:
    """The blend as one ordinary LoRA, for engines that know no weights: A = [A_i] of shape (Σ r_i, in), B = [w_i s_i B_i]
    of shape (out, Σ r_i), scaling 1, in float32.

    This is exact, since the product of the stacks is the sum of the products. A low-rank method then computes its own A and
    B from the stacks. Raises InputError for a method whose result is not a LoRA.
    """
    if blend.full_rank:
        raise InputError(
            f"the blend {blend.described} has full rank and is not a LoRA; serve it with driver: huggingface, which folds "
            "it into the weights, or export a merged model",
            field="blend",
        )
    used = [(adapters[name], weight) for name, weight in blend.active.items()]
    modules = {}
    for path in sorted({path for adapter, _ in used for path in adapter.modules}):
        parts = [(adapter.modules[path], weight) for adapter, weight in used if path in adapter.modules]
        modules[path] = _stacked(parts, blend.method)
    content = repr([(adapter.digest, weight) for adapter, weight in used])
    digest = hashlib.sha256((content + (repr(blend.method) if blend.method else "")).encode()).hexdigest()
    bases = {adapter.base for adapter, _ in used}
    return LoraAdapter(blend.name or "blend", modules, digest, bases.pop() if len(bases) == 1 else None)


def _stacked(parts: list[tuple[Factors, float]], method: Method | None) -> Factors:
    """The factors of one module over all adapters as one pair. parts: each adapter's factors and weight."""
    import torch

    a = torch.cat([factors.a.float() for factors, _ in parts])
    b = torch.cat([factors.b.float() * (weight * factors.scaling) for factors, weight in parts], dim=1)
    if isinstance(method, LowRank):
        a, b = method.compress(a, b)
    return Factors(a, b, 1.0, parts[0][0].embedding)


def delta(
    blend: Blend, adapters: Mapping[str, LoraAdapter], path: str, device: "torch.device | None" = None
) -> "torch.Tensor | None":
    """What the blend adds to the weight of the module at `path`: (out, in), float32. None if it adds nothing.

    This is Σ w_i s_i B_i A_i, or what the blend's method computes from the s_i B_i A_i. device: where to compute; None
    means where the factors are. Conv1D and Embedding store their weight transposed, so transpose the delta for them.
    """
    parts = [
        (adapters[name].modules[path], weight)
        for name, weight in blend.active.items()
        if path in adapters[name].modules
    ]
    if not parts:
        return None
    if isinstance(blend.method, FullRank):
        deltas = [factors.product(device=device) for factors, _ in parts]
        return blend.method.combine(deltas, [weight for _, weight in parts], key=path)
    if isinstance(blend.method, LowRank):
        return _stacked(parts, blend.method).product(device=device)
    total = None
    for factors, weight in parts:
        part = factors.product(weight, device)
        total = part if total is None else total.add_(part)
    return total
