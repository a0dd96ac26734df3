"""TIES: trim each adapter, elect a sign for each entry, and average the adapters that have that sign.

    T_i = top(D_i)                                 the entries of largest magnitude (see magnitude_prune.py)
    γ = sgn(Σ T_i)                                 for majority_sign_method frequency: sgn(Σ sgn(T_i)); 0 counts as +
    Σ_{i: sgn T_i = γ} w_i T_i  /  |{i: sgn T_i = γ}|

Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708. The paper has no weight per adapter, only one factor for the
result. We apply the weights as PEFT's `ties` does: the vote does not use them, and the mean divides by the number of
adapters that agree, not by the sum of their weights, so that a weight scales an adapter as in the exact sum. (mergekit
multiplies by the weights before the vote, and divides by the sum of the weights that agree.)
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank
from model_compose.lora.methods.magnitude_prune import top

if TYPE_CHECKING:
    from torch import Tensor

Majority = Literal["total", "frequency"]
"""What elects an entry's sign: "total", the sum of the adapters' values, or "frequency", the most frequent sign."""


class Ties(FullRank):
    """For each entry, the mean over the adapters whose trimmed entry has the elected sign."""

    method: Literal["ties"] = Field(default="ties", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of each module's entries to keep")
    majority_sign_method: Majority = Field(
        default="total", description="What elects an entry's sign: the sum of the values, or the most frequent sign"
    )

    def combine(self, deltas: "list[Tensor]", weights: list[float], *, key: str) -> "Tensor":
        return disjoint_mean([top(delta, self.density) for delta in deltas], weights, self.majority_sign_method)


def disjoint_mean(trimmed: "list[Tensor]", weights: list[float], majority: Majority) -> "Tensor":
    """For each entry, the mean of w_i T_i over the adapters whose T_i has the elected sign; 0 if there is none."""
    import torch

    votes = torch.zeros_like(trimmed[0])
    for delta in trimmed:
        votes += delta if majority == "total" else delta.sign()
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = delta.sign() == elected
        total += weight * delta * agrees
        count += agrees
    return total / count.clamp_(min=1)
