"""DARE's random drop in the place of TIES' trimming, then TIES' vote and mean.

    T_i = m_i ⊙ D_i / density        (see dare_linear.py), then γ and the mean as in ties.py

Yu et al., https://arxiv.org/abs/2311.03099, with Yadav et al., https://arxiv.org/abs/2306.01708. As PEFT's `dare_ties`, on
deltas.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank
from model_compose.lora.methods.dare_linear import drop
from model_compose.lora.methods.ties import Majority, disjoint_mean

if TYPE_CHECKING:
    from torch import Tensor


class DareTies(FullRank):
    """For each entry, the mean of the adapters that were not dropped there and agree with the majority's sign."""

    method: Literal["dare_ties"] = Field(default="dare_ties", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of entries that is kept, at random")
    majority_sign_method: Majority = Field(
        default="total", description="What elects a sign: the sum of the values, or how many have it"
    )
    seed: int = Field(default=0, ge=0, description="Another seed drops other entries")

    def combine(self, deltas: "Sequence[Tensor]", weights: Sequence[float], *, key: str) -> "Tensor":
        return disjoint_mean(drop(deltas, self.density, self.seed, key), weights, self.majority_sign_method)
