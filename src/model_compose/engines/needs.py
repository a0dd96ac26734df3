"""The memory that a model needs on one device, and the check whether the device has it free. A driver computes the
numbers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model_compose.engines.devices import size_text
from model_compose.errors import LoadError

log = logging.getLogger(__name__)

LEAST_TOKENS = 256
"""The smallest useful context: `check_fits` requires room for a KV cache of so many tokens."""


@dataclass(frozen=True)
class Needs:
    """The memory that one device must hold, in bytes, and what it has free before that (None: unknown).

    base: the base's weights; mapped: whether they are mapped from the checkpoint's files. adapters: the factors of each
    adapter in its compute dtype; adapters_at_once: how many of them are on the device at a time (None: all).
    kept: the adapters' factors as stored, in main memory, for folding and for adapters that are not on the device.
    folded: a second copy of the weights that folding the default blend changes; 0 if the originals are mapped, since they
    are then paged out. fold: the option of that name. full_rank: a copy, always there, of the weights that the blend of
    full rank changes. loading: the whole base before it is quantised, if it must be converted as a whole; else 0.
    context: tokens of a prompt with its answer at most. kv_per_token: the KV cache's bytes per token; kv_cache: its bytes;
    kv_least: the least bytes with which the model starts; kv_given: whether the user set the size.
    working: further memory while a step computes (an estimate). smaller: settings that would make the base smaller, each
    with the bytes of the base then.
    """

    model: str
    device: str
    free: int | None
    base: int = 0
    mapped: bool = False
    adapters: Mapping[str, int] = field(default_factory=dict)
    adapters_at_once: int | None = None
    kept: int = 0
    folded: int = 0
    full_rank: int = 0
    loading: int = 0
    fold: Literal["auto", "never", "always"] = "never"
    context: int = 0
    kv_per_token: int = 0
    kv_cache: int = 0
    kv_least: int = 0
    kv_given: bool = False
    working: int = 0
    smaller: Mapping[str, int] = field(default_factory=dict)

    @property
    def adapters_held(self) -> int:
        """The most bytes of adapters that are on the device at one time."""
        return sum(sorted(self.adapters.values(), reverse=True)[: self.adapters_at_once])

    @property
    def weights(self) -> int:
        """The bytes that are taken before the first request."""
        return self.base + self.adapters_held + self.kept + self.folded + self.full_rank

    @property
    def least(self) -> int:
        """The bytes without which the model cannot start: the weights (without the copy of `fold: auto`, which is optional)
        and the least KV cache, or the peak while loading if that is more."""
        served = self.weights - (self.folded if self.fold == "auto" else 0) + self.kv_least
        return max(served, self.loading + self.kept if self.loading else 0)

    @property
    def tokens(self) -> int:
        """The number of tokens that the KV cache can hold."""
        return self.kv_cache // self.kv_per_token if self.kv_per_token else 0

    @property
    def least_tokens(self) -> int:
        """The tokens of the least KV cache."""
        return min(self.context, LEAST_TOKENS)

    @property
    def missing(self) -> int:
        """How many bytes the device lacks for `least`; 0 if it has enough, or if its free memory is unknown."""
        return 0 if self.free is None else max(0, self.least - self.free)


def check_fits(needs: Needs) -> None:
    """Raise LoadError if the weights and the least KV cache need more than the device has free."""
    if not needs.missing:
        return
    assert needs.free is not None
    parts = {
        "the base": needs.base,
        "adapters": needs.adapters_held + needs.kept,
        "folded weights": needs.folded if needs.fold == "always" else 0,
        "the weights of the blend of full rank": needs.full_rank,
        "a KV cache" if needs.kv_given else f"a KV cache of {needs.least_tokens} tokens": needs.kv_least,
    }
    if needs.least > sum(parts.values()):
        parts = {"the base before it is quantised": needs.loading, "adapters": needs.kept}
    listed = " + ".join(f"{what} {size_text(size)}" for what, size in parts.items() if size)
    mapped = " (the base is mapped from its files and would be read from disk for every token)" if needs.mapped else ""
    raise LoadError(
        f"{needs.model} does not fit on {needs.device}: {listed} are {size_text(needs.least)}, but only "
        f"{size_text(needs.free)} are free, {size_text(needs.missing)} too few{mapped}; {_remedy(needs)}"
    )


def _remedy(needs: Needs) -> str:
    if needs.kv_given and needs.missing < needs.kv_least:
        return f"set kv_cache to at most {size_text(needs.kv_least - needs.missing)}"
    if needs.fold == "always" and needs.missing <= needs.folded:
        return "set fold: never"
    settings = [f"{setting} (the base: {size_text(size)})" for setting, size in needs.smaller.items()]
    return f"set {' or '.join([*settings, 'another device'])}, or use a smaller model"


def limit_context(budget: int, token_bytes: int, holds: int, context: int, least: int, *, rows: int = 1) -> int:
    """The longest context in tokens: `context`, or fewer if a KV cache of `budget` bytes cannot hold that many for one text
    (this logs a warning).

    token_bytes: the bytes of one token's keys and values. holds: the tokens that the cache can hold for one text.
    least: the tokens that one text needs. rows: into how many equal parts the cache is divided. Raises LoadError if
    holds < least.
    """
    each = f" for each of {rows} texts" if rows > 1 else ""
    if holds < least:
        fewer = ", a smaller max_batch_size" if rows > 1 else ""
        raise LoadError(
            f"a KV cache of {size_text(budget)} holds {holds} tokens of this model{each} ({size_text(token_bytes)} per "
            f"token), but one text needs {least}; set a larger kv_cache{fewer}, or a smaller max_context"
        )
    if holds < context:
        log.warning(
            "the KV cache of %s holds %d tokens%s, so a prompt with its answer can have only this many, instead of %d",
            size_text(budget), holds, each, context,
        )  # fmt: skip
    return min(context, holds)
