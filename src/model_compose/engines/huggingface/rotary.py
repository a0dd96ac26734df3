"""Rotary embeddings that change with the length of a text: longrope, as in Phi-3, Phi-4 and other models of 128k tokens.

Such a model has two sets of factors: one for texts up to the length of its first training, and one for all positions of
longer texts. transformers chooses the set by the highest position of a call. In our passes that position may belong to
another row, and a row may be longer than the piece of it that is read. So here each token gets the set that fits its
whole row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_compose.errors import LoadError

Rotary = Callable[..., tuple[Tensor, ...]]
"""(x, positions (…, tokens)) -> cosine and sine, (…, tokens, dim) each. It reads only the dtype and device of x."""


def longrope_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "longrope" in _kinds(module)]


def switch_length(model: nn.Module, name: str) -> int | None:
    """The length of the longest text that has the first set of factors. None if the model has only one set.

    Raises LoadError if several modules change at different lengths.
    """
    lengths = {
        int(parameters["original_max_position_embeddings"])
        for module in longrope_modules(model)
        for parameters in _parameters(module)
        if parameters.get("rope_type") == "longrope"
    }
    if len(lengths) > 1:
        raise LoadError(
            f"{name} has several rotary embeddings with longrope, whose original_max_position_embeddings differ "
            f"({', '.join(map(str, sorted(lengths)))}); the embedded engine serves models where they agree"
        )
    return next(iter(lengths), None)


def rotate_by_row(
    rotary: Rotary, switch: int, long: Tensor, x: Tensor, positions: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Cosine and sine. long: (tokens,), true for the tokens of rows that are longer than `switch`."""
    # The module chooses by the highest position, so we add a position beyond the switch, or clamp all to lie below.
    beyond = positions.new_full((*positions.shape[:-1], 1), switch)
    second = rotary(x, torch.cat([positions, beyond], dim=-1), **options)
    first = rotary(x, positions.clamp(max=switch - 1), **options)
    return tuple(torch.where(long[:, None], b[..., :-1, :], a) for a, b in zip(first, second, strict=True))


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """The kinds of rotary embedding that a module computes: one, or one for each type of layer."""
    kinds: Any = getattr(module, "rope_type", None)
    return tuple(kinds.values()) if isinstance(kinds, dict) else (kinds,) if isinstance(kinds, str) else ()


def _parameters(module: nn.Module) -> list[dict[str, Any]]:
    config: Any = module.config
    found: dict[str, Any] = config.rope_parameters
    return [found] if "rope_type" in found else list(found.values())
