"""SVD: the LoRA of a given rank that is nearest to the weighted sum.

    Σ w_i D_i = U S Vᵀ,   result U_r S_r V_rᵀ        the r largest singular values; of all matrices of rank r, the nearest

Eckart and Young, https://doi.org/10.1007/BF02288367. The sum is B A of small rank R, so no (out, in) matrix is formed: with
B = Q_b R_b and Aᵀ = Q_a R_a, the decomposition of R_b R_aᵀ, (R, R), turned by Q_b and Q_a is that of the sum.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import LowRank

if TYPE_CHECKING:
    from torch import Tensor


class Svd(LowRank):
    """The weighted sum, compressed to a rank."""

    method: Literal["svd"] = Field(default="svd", description="The method's name")
    rank: int = Field(
        ge=1, description="The rank of the result in every module; where the sum has no larger rank, it stays as it is"
    )

    def compress(self, a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
        import torch

        if len(a) <= self.rank:
            return a, b
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[: self.rank].sqrt()
        return (root[:, None] * (vt[: self.rank] @ q_a.T)).float(), (q_b @ u[:, : self.rank] * root).float()
