"""What one device has to hold for a model, and whether it has that much free. A driver's own arithmetic fills it in."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model_compose.engines.devices import size_text
from model_compose.errors import LoadError

log = logging.getLogger(__name__)

LEAST_TOKENS = 256
"""Less context than this is not worth starting for: `check_fits` wants a KV cache for so many tokens."""


@dataclass(frozen=True)
class Needs:
    """What one device has to hold, in bytes, and what it has free before that (None: nobody can tell).

    kept: factors of adapters as stored, for folding and for adapters whose turn on the device comes later. folded: the
    second copy of the weights that the default blend's fold touches; 0 where the originals are mapped and give way.
    full_rank: the copy of those that the blend of full rank touches, which is always there.
    loading: the base before it is quantised, where it is converted whole; else 0.
    working: what a step holds besides; an estimate. smaller: settings that would shrink the base, and to what.
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
        """Bytes of the adapters that are on the device at once, at most."""
        return sum(sorted(self.adapters.values(), reverse=True)[: self.adapters_at_once])

    @property
    def weights(self) -> int:
        """All that is there before the first request."""
        return self.base + self.adapters_held + self.kept + self.folded + self.full_rank

    @property
    def least(self) -> int:
        """What must be there: the weights but for the fold of `fold: auto`, and the least KV cache; or loading's peak."""
        served = self.weights - (self.folded if self.fold == "auto" else 0) + self.kv_least
        return max(served, self.loading + self.kept if self.loading else 0)

    @property
    def tokens(self) -> int:
        """How many tokens the KV cache holds."""
        return self.kv_cache // self.kv_per_token if self.kv_per_token else 0

    @property
    def least_tokens(self) -> int:
        return min(self.context, LEAST_TOKENS)

    @property
    def missing(self) -> int:
        """Bytes too few for `least`."""
        return 0 if self.free is None else max(0, self.least - self.free)


def check_fits(needs: Needs) -> None:
    """Raises LoadError where the weights and the least KV cache exceed what the device has free."""
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
    mapped = " (the base is mapped from its files, and would be read from disk for every token)" if needs.mapped else ""
    raise LoadError(
        f"{needs.model} does not fit on {needs.device}: {listed} are {size_text(needs.least)}, and "
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
    """The longest context in tokens: `context`, or what a KV cache of `budget` bytes holds for a text, with a warning.

    token_bytes: of keys and values, for each token. holds: how many tokens the cache has for one text. least: how many one
    text needs. rows: into how many equal parts the cache is divided. Raises LoadError if it holds fewer than `least`.
    """
    each = f" for each of {rows} texts" if rows > 1 else ""
    if holds < least:
        fewer = ", a smaller max_batch_size" if rows > 1 else ""
        raise LoadError(
            f"a KV cache of {size_text(budget)} holds {holds} tokens of this model{each}, which takes "
            f"{size_text(token_bytes)} for each token, and one text needs {least}; set a larger kv_cache{fewer}, or a "
            "smaller max_context"
        )
    if holds < context:
        log.warning(
            "the KV cache of %s holds %d tokens%s, so prompt and answer together are limited to these instead of %d",
            size_text(budget), holds, each, context,
        )  # fmt: skip
    return min(context, holds)
