"""Blends: which adapters at which weights, how they are named and resolved, their identity, and their stacked form."""

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
    """y = W x + Σ weights[i] · s_i · B_i (A_i x). Adapters that are not listed have weight 0; {} is the bare base.

    name: what the blend is called, where it has a name. Only the non-zero weights matter (`active`).
    method: how the adapters are combined, where it is not by that sum.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None
    method: Method | None = None

    @property
    def active(self) -> dict[str, float]:
        """The adapters with non-zero weight, sorted by name."""
        return {name: weight for name, weight in sorted(self.weights.items()) if weight != 0}

    @property
    def full_rank(self) -> bool:
        """Whether it is no LoRA, and thus runs folded into the weights only."""
        return isinstance(self.method, FullRank)

    @property
    def low_rank(self) -> bool:
        """Whether it is another LoRA than the sum, which has to be made before it runs."""
        return isinstance(self.method, LowRank)

    def equals(self, other: "Blend") -> bool:
        """Whether both are the same function, whatever they are called."""
        return self.method == other.method and self.active == other.active

    @property
    def described(self) -> str:
        """For messages: 'merged' (ties)."""
        name = f"'{self.name}'" if self.name else "without a name"
        return name if self.method is None else f"{name} ({self.method.method})"

    def identity(self, base: str, adapters: Mapping[str, str]) -> str:
        """A digest over the base's identity, each active adapter's content digest, the weights and the method.

        Whatever is cached per blend is keyed by it. 16 hexadecimal digits.
        """
        method = "exact" if self.method is None else self.method.model_dump()
        parts = [method, base, *([adapters[name], repr(float(weight))] for name, weight in self.active.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Blends:
    """All blends that one component knows: its adapters' names, the named blends, and the default."""

    adapters: tuple[str, ...]
    named: Mapping[str, Blend]
    default: Blend

    @property
    def full_rank(self) -> tuple[Blend, ...]:
        """The named blends that are no LoRA; where one function has several names, once."""
        return _different(blend for blend in self.named.values() if blend.full_rank)

    @property
    def low_rank(self) -> tuple[Blend, ...]:
        """The named blends that are another LoRA than the sum; each function once."""
        return _different(blend for blend in self.named.values() if blend.low_rank)

    def resolve(self, value: Any, *, place: str = "blend") -> Blend:
        """A request's blend: None and "" are the default, a string is a named blend or one adapter at weight 1, a mapping
        is {adapter: weight} and replaces the default whole.

        Raises InputError naming `place` and the known names.
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
            raise self._unknown(value, place, (*self.named, *self.adapters), "blend")
        if isinstance(value, Mapping):
            if names_method(value):
                raise InputError(
                    f"{place}: a request mixes by weights alone; a blend by a method ({', '.join(METHODS)}) stands in the "
                    "file under 'blends', and a request says its name",
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
    """Whether a mapping says {method: ties, …}. An adapter may be called "method": its weight is a number, or looks it."""
    method = value.get("method")
    if not isinstance(method, str):
        return False
    try:
        finite_number(method)
    except PydanticCustomError:
        return True
    return False


def stack(blend: Blend, adapters: Mapping[str, LoraAdapter]) -> LoraAdapter:
    """The blend as one ordinary LoRA: A = [A_i] of (Σ r_i, in), B = [w_i s_i B_i] of (out, Σ r_i), scaling 1; float32.

    Exact, since the stacked product is the sum of the products; a method of low rank makes of it what it does. What engines
    without weighted blends load. Raises InputError for a method whose result is no LoRA.
    """
    if blend.full_rank:
        raise InputError(
            f"the blend {blend.described} has full rank and is no LoRA: it runs folded (driver: huggingface), or as an "
            "exported merged model",
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
    """One module's factors, each with its weight, as one pair."""
    import torch

    a = torch.cat([factors.a.float() for factors, _ in parts])
    b = torch.cat([factors.b.float() * (weight * factors.scaling) for factors, weight in parts], dim=1)
    if isinstance(method, LowRank):
        a, b = method.compress(a, b)
    return Factors(a, b, 1.0, parts[0][0].embedding)


def delta(
    blend: Blend, adapters: Mapping[str, LoraAdapter], path: str, device: "torch.device | None" = None
) -> "torch.Tensor | None":
    """What the blend adds to the weight of one module: Σ w_i s_i B_i A_i, or what its method makes of the s_i B_i A_i;
    (out, in), float32, on `device` (where the factors are if None); None if it adds nothing.

    Conv1D and Embedding keep their weight the other way round: add the transposed delta.
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
