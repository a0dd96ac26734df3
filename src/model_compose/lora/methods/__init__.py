"""Approximate ways to combine adapters, as alternatives to the exact sum. Each has a file, with its formula and its paper.

A method works on the deltas D_i = s_i B_i A_i of one module, (out, in) in float32. It never treats A and B separately,
since applying a method to A and to B does not give what the method gives for their product. To add a method, add a file
here and a line to METHODS.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from model_compose.registry import Registry
from model_compose.schema import Options

if TYPE_CHECKING:
    from torch import Tensor


class Method(Options):
    """A way to combine adapters other than the exact sum. Its fields are its options in the YAML, where `method` names it.

    A method is given only the adapters whose weight is not 0, sorted by name.
    """

    approximate: ClassVar[bool] = True
    method: str


class FullRank(Method):
    """A method whose result has full rank, so that it is not a LoRA. It can be served by folding it into the base's
    weights, or exported as a merged model."""

    @abstractmethod
    def combine(self, deltas: "list[Tensor]", weights: list[float], *, key: str) -> "Tensor":
        """The tensor, (out, in) in float32, to add to the weight of one module.

        deltas: at least one tensor, (out, in) in float32; they must not be changed. key: the module's path. A method that
        draws random numbers seeds them by it, so that the result does not depend on the order of the modules.
        """


class LowRank(Method):
    """A method whose result is one ordinary LoRA again, which every engine can load as an adapter."""

    rank: int

    @abstractmethod
    def compress(self, a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
        """The result's factors of one module, A and B in float32.

        a: (R, in), b: (out, R), in float32; their product b a is the exact weighted sum.
        """


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
