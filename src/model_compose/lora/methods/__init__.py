"""Approximate ways to combine adapters, beside the exact sum. One file each, with its formula and its paper.

They work on the deltas D_i = s_i B_i A_i of one module, (out, in) in float32, never on A and B apart: what a method does to
A and to B is not what it does to their product. A new one is one file here plus its line in METHODS.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from model_compose.registry import Registry
from model_compose.schema import Options

if TYPE_CHECKING:
    from torch import Tensor


class Method(Options):
    """A way to combine that is not the sum. Its fields are its options in the YAML; `method` is its name there.

    Only adapters with a weight other than 0 come to it, in the order of their names.
    """

    approximate: ClassVar[bool] = True
    method: str


class FullRank(Method):
    """Its result has no small rank, so it is no LoRA: it runs folded into the weights, or as a merged model."""

    @abstractmethod
    def combine(self, deltas: "Sequence[Tensor]", weights: Sequence[float], *, key: str) -> "Tensor":
        """What is added to the weight of one module. deltas: (out, in), float32, at least one; left as they are.

        key: the module's path, which seeds what is random, so that the order of the modules does not matter.
        """


class LowRank(Method):
    """Its result is one ordinary LoRA again, which runs wherever an adapter does."""

    rank: int

    @abstractmethod
    def compress(self, a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
        """a (R, in) and b (out, R), float32, whose product is the exact sum of one module -> those of the result."""


METHODS: Registry[type[Method]] = Registry(
    "method",
    "model_compose.methods",
    {
        "ties": "model_compose.lora.methods.ties:Ties",
        "dare_linear": "model_compose.lora.methods.dare_linear:DareLinear",
        "dare_ties": "model_compose.lora.methods.dare_ties:DareTies",
        "magnitude_prune": "model_compose.lora.methods.magnitude_prune:MagnitudePrune",
        "svd": "model_compose.lora.methods.svd:Svd",
    },
)
