"""The KV cache: keys and values of the running sequences, within a budget of bytes.

Memory consists of blocks with a few rows of equal capacity. A sequence has one row and moves to a larger one as it
grows. The used rows of a block lie together, so attention reads views and copies nothing. Rows of very different
lengths are in different blocks, so short rows are not padded to the longest. This module knows nothing of tokens or
blends.
"""

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

SMALLEST = 64
"""Capacity of the smallest rows in tokens. Each larger kind of row has twice the capacity."""

ROWS = 8
"""The most rows of a block."""

BLOCK_SHARE = 8
"""A block of several rows takes at most one of this many parts of the budget."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps for each token: heads × key_dim keys and heads × value_dim values."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Row:
    """The place of one sequence:

    row `index` of a block. Block and index change when the cache moves rows to close a gap.
    """

    def __init__(self, block: "Block", index: int) -> None:
        self.block, self.index = block, index

    def views(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the first `tokens` keys and values of a layer: (heads, tokens, dim) each."""
        block = self.block
        return block.keys[layer][self.index, :, :tokens], block.values[layer][self.index, :, :tokens]


class Block:
    """keys[layer], values[layer]: (rows, heads, capacity, dim). Rows 0..len(used)-1 are in use."""

    def __init__(self, layers: Collection[LayerShape], rows: int, capacity: int) -> None:
        # Zeros, since attention multiplies the value of a masked position by 0, and 0 · NaN is NaN.
        self.keys, self.values = (
            [torch.zeros(rows, s.heads, capacity, dim(s), dtype=s.dtype, device=s.device) for s in layers]
            for dim in (attrgetter("key_dim"), attrgetter("value_dim"))
        )
        self.pointers = [
            (ctypes.c_void_p * len(kept))(*(t.data_ptr() for t in kept)) for kept in (self.keys, self.values)
        ]
        """The addresses of all layers' keys, and of all layers' values, for native code."""
        self.rows, self.capacity = rows, capacity
        self.used: list[Row] = []
        self._touched = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def take(self) -> Row:
        row = Row(self, len(self.used))
        self.used.append(row)
        if row.index < self._touched:  # a sequence that failed may have left NaN
            for kept in self.tensors:
                kept[row.index].zero_()
        self._touched = max(self._touched, len(self.used))
        return row


class KVCache:
    """Hands out rows. budget: bytes for rows and prefixes. spent: how many of these bytes are used."""

    def __init__(self, layers: Collection[LayerShape], budget: int, context: int) -> None:
        self._layers, self.budget, self._context = layers, budget, context
        self.token_bytes = sum(shape.token_bytes for shape in layers)
        self.spent = 0
        self._blocks: dict[int, list[Block]] = {}

    @property
    def blocks(self) -> list[Block]:
        return [block for blocks in self._blocks.values() for block in blocks]

    def capacity(self, tokens: int) -> int:
        """The capacity of the smallest kind of row that holds this many tokens."""
        size = SMALLEST
        while size < tokens:
            size *= 2
        return min(size, -(-self._context // SMALLEST) * SMALLEST)

    def take(self, tokens: int) -> Row | None:
        """A row for this many tokens. None if the budget has no room for it."""
        capacity = self.capacity(tokens)
        blocks = self._blocks.setdefault(capacity, [])
        if not blocks or len(blocks[-1].used) == blocks[-1].rows:
            row_bytes = capacity * self.token_bytes
            left = (self.budget - self.spent) // row_bytes
            rows = min(ROWS, left, max(1, self.budget // BLOCK_SHARE // row_bytes))
            if rows < 1:
                return None
            blocks.append(Block(self._layers, rows, capacity))
            self.spent += rows * row_bytes
        return blocks[-1].take()

    def grow(self, row: Row, tokens: int, used: int) -> Row | None:
        """A row for `tokens` tokens that holds the first `used` of `row`; `row` itself if it is large enough. None if the
        budget has no room."""
        if tokens <= row.block.capacity:
            return row
        larger = self.take(tokens)
        if larger is not None:
            copy(row, larger, used)
            self.give_back(row)
        return larger

    def give_back(self, row: Row) -> None:
        """Takes a row back. The last row of its kind moves to its place; a block without rows gives its memory back."""
        blocks = self._blocks[row.block.capacity]
        last = blocks[-1].used[-1]
        if last is not row:
            for theirs, mine in zip(last.block.tensors, row.block.tensors, strict=True):
                mine[row.index] = theirs[last.index]
            row.block.used[row.index] = last
        blocks[-1].used.pop()
        last.block, last.index = row.block, row.index
        if not blocks[-1].used:
            self.spent -= blocks[-1].rows * blocks[-1].capacity * self.token_bytes
            blocks.pop()


def copy(source: Row, target: Row, tokens: int) -> None:
    """Copies the first `tokens` keys and values of all layers."""
    for layer in range(len(source.block.keys)):
        for mine, theirs in zip(source.views(layer, tokens), target.views(layer, tokens), strict=True):
            theirs.copy_(mine)
