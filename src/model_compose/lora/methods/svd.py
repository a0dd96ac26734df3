"""SVD: the LoRA of a given rank r that is nearest to the weighted sum (in the Frobenius norm).

    Σ w_i D_i = U S Vᵀ,   result U_r S_r V_rᵀ        U_r, S_r and V_r belong to the r largest singular values

Eckart and Young, https://doi.org/10.1007/BF02288367. The sum is B A with a small rank R, so no (out, in) matrix is formed.
With the QR decompositions B = Q_b R_b and Aᵀ = Q_a R_a, we take the SVD of the (R, R) matrix R_b R_aᵀ = u S vᵀ; then
U = Q_b u and V = Q_a v.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import LowRank

if TYPE_CHECKING:
    from torch import Tensor


class Svd(LowRank):
    """The weighted sum, compressed to a given rank."""

    method: Literal["svd"] = Field(default="svd", description="The method's name")
    rank: int = Field(ge=1, description="The result's rank in every module; a sum of lower rank stays exact")

    def compress(self, a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
        import torch

        if len(a) <= self.rank:
            return a, b
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[: self.rank].sqrt()
        return (root[:, None] * (vt[: self.rank] @ q_a.T)).float(), (q_b @ u[:, : self.rank] * root).float()
