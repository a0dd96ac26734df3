"""DARE with TIES: DARE's random drop instead of TIES' trimming, then TIES' sign election and mean.

    T_i = m_i ⊙ D_i / density        (see dare_linear.py), then γ and the mean as in ties.py

Yu et al., https://arxiv.org/abs/2311.03099, and Yadav et al., https://arxiv.org/abs/2306.01708. The same as PEFT's
`dare_ties`, but on deltas.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank
from model_compose.lora.methods.dare_linear import drop
from model_compose.lora.methods.ties import Majority, disjoint_mean

if TYPE_CHECKING:
    from torch import Tensor


class DareTies(FullRank):
    """For each entry, the mean over the adapters whose entry was kept and has the elected sign."""

    method: Literal["dare_ties"] = Field(default="dare_ties", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of entries to keep, chosen at random")
    majority_sign_method: Majority = Field(
        default="total", description="What elects an entry's sign: the sum of the values, or the most frequent sign"
    )
    seed: int = Field(default=0, ge=0, description="Decides which entries are dropped")

    def combine(self, deltas: "list[Tensor]", weights: list[float], *, key: str) -> "Tensor":
        return disjoint_mean(drop(deltas, self.density, self.seed, key), weights, self.majority_sign_method)
