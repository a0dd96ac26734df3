"""TIES: trim each adapter, elect a sign for each entry, and average those that have it.

    T_i = top(D_i)                                 the entries of largest size (see magnitude_prune.py)
    γ = sgn(Σ T_i)                                 for majority_sign_method frequency: sgn(Σ sgn(T_i)); 0 counts as +
    Σ_{i: sgn T_i = γ} w_i T_i  /  |{i: sgn T_i = γ}|

Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708, which has no weights but one factor for the whole. They stand
where PEFT's `ties` has them: the adapters vote without them, and the mean divides by how many agree, not by Σ w_i, so a
weight scales as in the sum. (mergekit multiplies before the vote, and divides by the weights of those that agree.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank
from model_compose.lora.methods.magnitude_prune import top

if TYPE_CHECKING:
    from torch import Tensor

Majority = Literal["total", "frequency"]
"""What elects a sign: the sum of the values, or the number of those that have it."""


class Ties(FullRank):
    """For each entry, the mean of the adapters' largest changes that agree with the majority's sign."""

    method: Literal["ties"] = Field(default="ties", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of each module's entries that is kept")
    majority_sign_method: Majority = Field(
        default="total", description="What elects a sign: the sum of the values, or how many have it"
    )

    def combine(self, deltas: "Sequence[Tensor]", weights: Sequence[float], *, key: str) -> "Tensor":
        return disjoint_mean([top(delta, self.density) for delta in deltas], weights, self.majority_sign_method)


def disjoint_mean(trimmed: "Sequence[Tensor]", weights: Sequence[float], majority: Majority) -> "Tensor":
    """For each entry, the mean of w_i T_i over those T_i that have the elected sign; 0 where none has it."""
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
