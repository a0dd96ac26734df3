"""One forward pass over a flat batch: which tokens it has, and their attention to what each row has cached.

A flat batch has the tokens of all rows in one line, so every linear layer is one product for prompts and single tokens
alike. Only attention looks at rows. Neighbouring rows of a block that decode attend in one call; each piece of a prompt
attends in a call of its own.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_compose.engines.huggingface.cache import Row


@dataclass(frozen=True)
class Piece:
    """Some new tokens of one row. They follow the `start` tokens that the row has cached.

    long: whether the row's text is longer than the length at which the model's rotary embedding changes (rotary.py).
    """

    row: Row
    tokens: Collection[int]
    start: int
    long: bool = False


@dataclass(frozen=True)
class Scoring:
    """How attention computes its scores from q·k.

    scaling: multiplies q·k; 1/√dim if None. window: how many tokens back a token looks, itself included. cap: if not 0,
    a score becomes cap · tanh(score / cap). sinks: (heads,), the scores of a key that takes part in every softmax and
    has no value.
    """

    scaling: float | None = None
    window: int | None = None
    cap: float = 0.0
    sinks: Tensor | None = None


class Decode:
    """Neighbouring rows of a block that decode. The pass's tokens from number `at` on are theirs, one for each row."""

    def __init__(self, at: int, rows: list[Row], starts: list[int], device: torch.device) -> None:
        self.block, first, count = rows[0].block, rows[0].index, len(rows)
        self.tokens, self.rows, self.longest = slice(at, at + count), slice(first, first + count), max(starts) + 1
        self._row_index = torch.arange(first, first + count, device=device)
        self.starts = torch.tensor(starts, device=device)
        self._ragged = min(starts) + 1 < self.longest
        self._masks: dict[int | None, Tensor | None] = {}

    def store(self, kept: Tensor, new: Tensor) -> Tensor:
        """Writes `new` (n, heads, dim) behind what the n rows have cached.

        Returns a view of them (n, heads, longest, dim).
        """
        if len(new) == 1:  # indexing by a tensor would take longer than the copy
            kept[self.rows.start, :, self.longest - 1] = new[0]
        else:
            kept[self._row_index, :, self.starts] = new.to(kept.dtype)
        return kept[self.rows, :, : self.longest]

    def mask(self, window: int | None) -> Tensor | None:
        """(n, 1, 1, longest): true where a row may look. None if all rows may look everywhere."""
        if window not in self._masks:
            keys, at = torch.arange(self.longest, device=self.starts.device), self.starts[:, None, None, None]
            if window is not None and window < self.longest:
                self._masks[window] = (keys <= at) & (keys > at - window)
            else:
                self._masks[window] = keys <= at if self._ragged else None
        return self._masks[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        n, heads, dim = q.shape
        groups = k.shape[1]
        # Query heads that share a key head take the place of several queries, so that no key has to be repeated.
        sinks = None if how.sinks is None else how.sinks.view(groups, -1, 1)
        out = _scores(q.view(n, groups, heads // groups, dim), k, v, self.mask(how.window), how, sinks)
        return out.reshape(n, heads, v.shape[-1])


class Prefill:
    """A piece of one prompt. Its tokens are those of the pass from number `at` on."""

    def __init__(self, at: int, piece: Piece, device: torch.device) -> None:
        self.block, self._row, self._start = piece.row.block, piece.row.index, piece.start
        self.tokens, self._end = slice(at, at + len(piece.tokens)), piece.start + len(piece.tokens)
        self._device = device
        self._masks: dict[int | None, Tensor] = {}

    def store(self, kept: Tensor, new: Tensor) -> Tensor:
        """Writes `new` (tokens, heads, dim) behind what the row has cached.

        Returns a view of the row (1, heads, end, dim).
        """
        kept[self._row, :, self._start : self._end] = new.transpose(0, 1)
        return kept[self._row : self._row + 1, :, : self._end]

    def mask(self, window: int | None) -> Tensor:
        """(tokens, end): true where a token may look."""
        if window not in self._masks:
            keys = torch.arange(self._end, device=self._device)
            at = torch.arange(self._start, self._end, device=self._device)[:, None]
            self._masks[window] = keys <= at if window is None else (keys <= at) & (keys > at - window)
        return self._masks[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        everywhere = self._start == 0 and (how.window is None or how.window >= self._end)
        plain = everywhere and not how.cap and how.sinks is None
        mask = None if plain else self.mask(how.window)
        sinks = None if how.sinks is None else how.sinks.view(-1, 1, 1)
        return _scores(q.transpose(0, 1)[None], k, v, mask, how, sinks, causal=plain)[0].transpose(0, 1)


class Pass:
    """The tokens of one forward pass in their order, and `attend` for its layers.

    order: the numbers of the given pieces, in the order in which the pass has them. last: the number of each piece's
    last token. groups: the tokens that attend in one call.
    """

    def __init__(self, pieces: list[Piece], device: torch.device) -> None:
        singles = [i for i, piece in enumerate(pieces) if len(piece.tokens) == 1]
        singles.sort(key=lambda i: (id(pieces[i].row.block), pieces[i].row.index))
        self.order = singles + [i for i, piece in enumerate(pieces) if len(piece.tokens) > 1]
        ordered = [pieces[i] for i in self.order]
        self.counts = [len(piece.tokens) for piece in ordered]
        self.tokens = torch.tensor([token for piece in ordered for token in piece.tokens], device=device)
        self.positions = torch.cat([torch.arange(p.start, p.start + len(p.tokens)) for p in ordered]).to(device)
        self.last = torch.tensor(self.counts).cumsum(0).to(device) - 1
        self.groups = _groups(ordered, device)
        self._long, self._device = [piece.long for piece in ordered], device

    @property
    def long(self) -> Tensor:
        """(tokens,): the `long` of each token's piece."""
        return torch.tensor(self._long).repeat_interleave(torch.tensor(self.counts)).to(self._device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        """q (tokens, heads, dim), k and v (tokens, key heads, dim) of a layer -> (tokens, heads, value dim).

        Stores k and v in the cache.
        """
        parts = [attend_group(group, layer, q, k, v, how) for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_group(group: Decode | Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
    """`Pass.attend` for one group. q, k, v: of the whole pass. The cache may have a narrower dtype than they have."""
    keys = group.store(group.block.keys[layer], k[group.tokens]).to(k.dtype)
    values = group.store(group.block.values[layer], v[group.tokens]).to(v.dtype)
    return group.attend(q[group.tokens], keys, values, how)


def _groups(pieces: list[Piece], device: torch.device) -> list[Decode | Prefill]:
    """The groups of a pass.

    Single tokens come first in `pieces`; those of neighbouring rows of a block become one group.
    """
    groups: list[Decode | Prefill] = []
    run: list[Piece] = []
    at = 0
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        if len(piece.tokens) > 1:
            groups.append(Prefill(at, piece, device))
            at += len(piece.tokens)
            continue
        run.append(piece)
        row = piece.row
        if after is None or len(after.tokens) > 1 or (after.row.block, after.row.index) != (row.block, row.index + 1):
            groups.append(Decode(at, [p.row for p in run], [p.start for p in run], device))
            at += len(run)
            run = []
    return groups


def _scores(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: Scoring, sinks: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Attention of q (n, heads, queries, dim) to k and v (n, key heads, keys, dim). mask: true where a query may look.

    sinks: in the shape of a column of the scores, (heads, queries or 1, 1).
    """
    if not how.cap and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=how.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if how.scaling is None else how.scaling)
    if how.cap:
        scores = how.cap * torch.tanh(scores / how.cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : k.shape[2]] @ v
