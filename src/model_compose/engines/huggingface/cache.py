"""The KV cache of a batch: one row a sequence, rows of different lengths side by side.

Rows 0..n-1 are the sequences in use, always without a gap, so a decode step reads views and copies nothing. A row that
leaves is replaced by the last one. Memory follows the number of rows and the longest of them, one layer at a time.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STEP_TOKENS = 64
"""Capacity is a multiple of this."""


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, capacity, dim). `update` writes where the cache's `place` says."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: "RowCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of (n, heads, tokens, dim); returns all of those rows, padded to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        first, count, longest = cache.first, key_states.shape[0], cache.longest
        self._reserve(first + count, longest)
        rows = slice(first, first + count)
        views = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if count == 1:
                start = cache.starts[0]
                kept[first, :, start : start + new.shape[2]] = new[0]
            else:  # a decode step: one token a row, each at its own position
                kept[cache.row_index, :, cache.start_index] = new[:, :, 0]
            views.append(kept[rows, :, :longest])
        return views[0], views[1]

    def _reserve(self, rows: int, tokens: int) -> None:
        """Makes room for so many rows and tokens, with some to spare so that growing is seldom."""
        have_rows, _, have_tokens, _ = self.keys.shape
        if rows <= have_rows and tokens <= have_tokens:
            return
        if rows > have_rows:
            rows = min(max(rows, 2 * have_rows), self._cache.max_rows)
        if tokens > have_tokens:
            tokens = -(-max(tokens, have_tokens * 5 // 4) // STEP_TOKENS) * STEP_TOKENS
        self.keys, self.values = (
            self._grown(old, max(rows, have_rows), max(tokens, have_tokens)) for old in (self.keys, self.values)
        )

    @staticmethod
    def _grown(old: Tensor, rows: int, tokens: int) -> Tensor:
        # Zeros, not uninitialised memory: a masked position counts 0 times its value, and 0 times NaN is NaN.
        new = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def move(self, source: int, target: int, tokens: int) -> None:
        for kept in (self.keys, self.values) if self.is_initialized else ():
            kept[target, :, :tokens] = kept[source, :, :tokens]
            kept[target, :, tokens:] = 0

    def wipe(self, row: int) -> None:
        for kept in (self.keys, self.values) if self.is_initialized else ():
            kept[row : row + 1] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.longest, 0

    def get_seq_length(self) -> int:
        return self._cache.starts[0] if self._cache.starts else 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """`place` says which rows the next forward pass is about, and where each of them stands."""

    def __init__(self, layers: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.first = 0
        self.starts: list[int] = []
        self.longest = 0
        self.row_index = self.start_index = torch.empty(0, dtype=torch.long)
        self._rows = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self._rows])

    def place(self, first: int, starts: list[int], tokens: int, device: torch.device) -> None:
        """Rows first.. with `starts[i]` tokens cached each; `tokens` new ones follow."""
        self.first, self.starts = first, starts
        self.longest = max(starts) + tokens
        self.row_index = torch.arange(first, first + len(starts), device=device)
        self.start_index = torch.tensor(starts, device=device)

    def clear(self) -> None:
        """Gives all memory back; no row is in use."""
        for layer in self._rows:
            layer.keys = layer.values = torch.empty(0)
            layer.is_initialized = False

    def wipe(self, row: int) -> None:
        """Forgets a row. What a failed sequence left there may be NaN, and 0 times NaN is NaN where a mask hides it."""
        for layer in self._rows:
            layer.wipe(row)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies a row's first `tokens` tokens onto another row, and wipes the rest of that."""
        if tokens:  # a row without any may not exist yet
            for layer in self._rows:
                layer.move(source, target, tokens)
