"""Magnitude pruning: the weighted sum of each adapter's largest entries.

    Σ w_i · top(D_i)        of n entries, top keeps the ⌊density · n⌋ with the largest magnitude and sets the others to 0

Han et al., https://arxiv.org/abs/1506.02626; in merging, it is the first step of TIES. The same as PEFT's
`magnitude_prune`, but on deltas.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank

if TYPE_CHECKING:
    from torch import Tensor


class MagnitudePrune(FullRank):
    """The weighted sum of each adapter's largest entries."""

    method: Literal["magnitude_prune"] = Field(default="magnitude_prune", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of each module's entries to keep")

    def combine(self, deltas: "list[Tensor]", weights: list[float], *, key: str) -> "Tensor":
        pruned = (top(delta, self.density).mul_(weight) for delta, weight in zip(deltas, weights, strict=True))
        total = next(pruned)
        for part in pruned:
            total += part
        return total


def top(delta: "Tensor", density: float) -> "Tensor":
    """A new tensor with the ⌊density · n⌋ entries of largest magnitude, and 0 elsewhere."""
    flat = delta.flatten()
    kept = flat.abs().topk(int(density * len(flat)), sorted=False).indices
    return flat.new_zeros(len(flat)).index_copy_(0, kept, flat[kept]).view_as(delta)
