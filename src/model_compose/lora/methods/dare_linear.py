"""DARE: drop entries at random, rescale the rest, and sum.

    Σ w_i · m_i ⊙ D_i / density        m_i is 1 with probability `density`, else 0; the expected value is the exact sum

Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099. The same as PEFT's `dare_linear`, but on
deltas. A mask depends only on the seed, the module's path and the adapter's place in the list, so a YAML file gives the
same weights each time it is loaded.
"""

import hashlib
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from model_compose.lora.methods import FullRank

if TYPE_CHECKING:
    from torch import Tensor


class DareLinear(FullRank):
    """The weighted sum of the adapters with entries dropped at random and the rest rescaled."""

    method: Literal["dare_linear"] = Field(default="dare_linear", description="The method's name")
    density: float = Field(gt=0, le=1, description="The share of entries to keep, chosen at random")
    seed: int = Field(default=0, ge=0, description="Decides which entries are dropped")

    def combine(self, deltas: "list[Tensor]", weights: list[float], *, key: str) -> "Tensor":
        parts = zip(drop(deltas, self.density, self.seed, key), weights, strict=True)
        first, weight = next(parts)
        total = first.mul_(weight)
        for delta, weight in parts:
            total.add_(delta, alpha=weight)
        return total


def drop(deltas: "list[Tensor]", density: float, seed: int, key: str) -> "list[Tensor]":
    """New tensors m_i ⊙ D_i / density. The masks are drawn on the CPU, so that they do not depend on the device."""
    import torch

    dropped = []
    for place, delta in enumerate(deltas):
        generator = torch.Generator().manual_seed(seed_of(seed, key, place))
        mask = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
        dropped.append(delta * mask.to(delta.device) / density)
    return dropped


def seed_of(seed: int, key: str, place: int) -> int:
    """The seed of one mask: for the module `key` and the adapter at index `place` among those that adapt this module."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}:{place}".encode()).digest()[:8])
