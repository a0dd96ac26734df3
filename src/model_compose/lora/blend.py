"""Blends: which adapters at which weights, how they are named and resolved, their identity, and their stacked form."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from model_compose.errors import InputError
from model_compose.lora.adapter import Factors, LoraAdapter
from model_compose.schema import finite_number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blend:
    """y = W x + Σ weights[i] · s_i · B_i (A_i x). Adapters that are not listed have weight 0; {} is the bare base.

    name: what the blend is called, where it has a name. Only the non-zero weights matter (`active`).
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None

    @property
    def active(self) -> dict[str, float]:
        """The adapters with non-zero weight, sorted by name."""
        return {name: weight for name, weight in sorted(self.weights.items()) if weight != 0}

    def identity(self, base: str, adapters: Mapping[str, str]) -> str:
        """A digest over the base's identity, each active adapter's content digest, the weights and the method.

        Whatever is cached per blend is keyed by it. 16 hexadecimal digits.
        """
        parts = ["exact", base, *([adapters[name], repr(float(weight))] for name, weight in self.active.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Blends:
    """All blends that one component knows: its adapters' names, the named blends, and the default."""

    adapters: tuple[str, ...]
    named: Mapping[str, Blend]
    default: Blend

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
            return Blend({str(name): self._weight(name, weight, place) for name, weight in value.items()})
        raise InputError(f"{place} must be a name or a mapping of adapters to weights, not {value!r}", field=place)

    def _weight(self, name: object, weight: object, place: str) -> float:
        if name not in self.adapters:
            raise self._unknown(str(name), place, self.adapters, "adapter")
        try:
            return finite_number(weight)
        except PydanticCustomError as error:
            raise InputError(f"{place}.{name}: {error.message()}", field=f"{place}.{name}") from None

    @staticmethod
    def _unknown(name: str, place: str, known: Iterable[str], what: str) -> InputError:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        listing = f"known: {', '.join(known)}" if known else f"this component has no {what}s"
        return InputError(f"{place}: unknown {what} '{name}'; {hint}{listing}", field=place)


def stack(blend: Blend, adapters: Mapping[str, LoraAdapter]) -> LoraAdapter:
    """The blend as one ordinary LoRA: A = [A_i] of (Σ r_i, in), B = [w_i s_i B_i] of (out, Σ r_i), scaling 1; float32.

    Exact, since the stacked product is the sum of the products. What engines without weighted blends load.
    """
    import torch

    used = [(adapters[name], weight) for name, weight in blend.active.items()]
    modules = {}
    for path in sorted({path for adapter, _ in used for path in adapter.modules}):
        parts = [(adapter.modules[path], weight) for adapter, weight in used if path in adapter.modules]
        a = torch.cat([factors.a.float() for factors, _ in parts])
        b = torch.cat([factors.b.float() * (weight * factors.scaling) for factors, weight in parts], dim=1)
        modules[path] = Factors(a, b, 1.0, parts[0][0].embedding)
    digest = hashlib.sha256(repr([(adapter.digest, weight) for adapter, weight in used]).encode()).hexdigest()
    bases = {adapter.base for adapter, _ in used}
    return LoraAdapter(blend.name or "blend", modules, digest, bases.pop() if len(bases) == 1 else None)


def delta(blend: Blend, adapters: Mapping[str, LoraAdapter], path: str) -> "torch.Tensor | None":
    """What the blend adds to the weight of one module: Σ w_i s_i B_i A_i, (out, in), float32; None if it adds nothing.

    Conv1D and Embedding keep their weight the other way round: add the transposed delta.
    """
    total = None
    for name, weight in blend.active.items():
        if factors := adapters[name].modules.get(path):
            part = (weight * factors.scaling) * (factors.b.float() @ factors.a.float())
            total = part if total is None else total.add_(part)
    return total
