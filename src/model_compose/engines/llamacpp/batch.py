"""The scheduler for llama.cpp: it decides which blend has its turn, and runs one pass for all texts of that blend.

A pass of llama.cpp can only have one blend, so blends take turns of several passes. In a turn, all texts of the blend share
a batch. Texts join in the order of their arrival.

When a text has ended, its row keeps the keys and values for later texts of the same blend with the same beginning. If room
is needed, these rows are freed first; then the youngest running text is preempted and computed again later.
"""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from model_compose.engines.llamacpp.llama import Llama, Piece
from model_compose.engines.prompts import common
from model_compose.engines.stepping.scheduler import Scheduler, Work
from model_compose.engines.stepping.sequence import Sequence

TURN = 8
"""The passes in a blend's turn. A change of blend costs llama.cpp about as much as a pass of a small model."""


@dataclass(frozen=True)
class Kept:
    """The content of a row whose text has ended. Only texts with the same blend identity may use it."""

    row: int
    identity: str
    tokens: list[int]


class Batch(Scheduler):
    """max_rows: the most texts that run at once. tokens_per_step: the most tokens in a pass, over all texts."""

    def __init__(self, llama: Llama, *, max_rows: int, tokens_per_step: int) -> None:
        super().__init__()
        self._llama, self._tokens_per_step = llama, tokens_per_step
        self._free = list(range(max_rows))
        self._rows: dict[Sequence, int] = {}
        self._kept: list[Kept] = []  # the oldest first
        self.prefix_queries = self.prefix_hits = 0
        self._turn, self._passes = "", 0

    @property
    def used(self) -> int:
        """The KV cache cells (one for each token) that running texts fill."""
        return sum(sequence.cached for sequence in self.running)

    def step(self) -> None:
        """Make one pass for the blend whose turn it is."""
        self._drop_done()
        self._admit()
        if self.running and (work := self._make_room(self._choose())):
            self._run(work)
        self._drop_done()

    def _admit(self) -> None:
        """Give waiting sequences a row, oldest first, as long as there is room.

        A sequence waits if another one with the same beginning is being read, since it can then share that one's cells.
        """
        while self.waiting and (self._free or self._kept):
            sequence = self.waiting[0]
            fits = self.used + len(sequence.tokens) <= self._llama.cells or not self.running
            if not fits or self._is_worth_waiting(sequence):
                return
            row, shared = self._take_row(sequence)
            self._rows[sequence], sequence.cached = row, shared
            self.running.append(self.waiting.popleft())
            if not sequence.generated:
                sequence.reused = shared
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += shared

    def _take_row(self, sequence: Sequence) -> tuple[int, int]:
        """A row for the sequence, and how many of its tokens the row holds already."""
        donor, shared = self._donor(sequence)
        if not self._free:
            others = [kept for kept in self._kept if kept.row != donor]
            if not others:  # the only row left is the donor's own
                self._kept.clear()
                self._llama.cut(donor, shared)
                return donor, shared
            self._drop(others[0])
        row = self._free.pop()
        if shared:
            self._llama.copy(donor, row, shared)
        return row, shared

    @property
    def _shares_prefixes(self) -> bool:
        return self._llama.can_copy

    def _donor(self, sequence: Sequence) -> tuple[int, int]:
        """The row of the same blend with the longest common beginning, and the number of tokens in common (0: none)."""
        if not self._llama.can_copy:
            return -1, 0
        held = [(kept.row, kept.tokens) for kept in self._kept if kept.identity == sequence.identity]
        held += [(self._rows[s], s.tokens[: s.cached]) for s in self.running if s.identity == sequence.identity]
        wanted = sequence.tokens[:-1]  # the last token must be computed for its logits
        shared = [(common(tokens, wanted), row) for row, tokens in held]
        tokens, row = max(shared, default=(0, -1))
        return row, tokens

    def _choose(self) -> list[Work]:
        """The work for a pass of the blend whose turn it is: one token of each text that decodes, and as many tokens of
        prompts as fit."""
        identities = list(dict.fromkeys(sequence.identity for sequence in self.running))
        if self._turn not in identities or self._passes >= TURN:
            at = identities.index(self._turn) + 1 if self._turn in identities else 0
            self._turn, self._passes = identities[at % len(identities)], 0
        self._passes += 1
        mine = sorted((s for s in self.running if s.identity == self._turn), key=lambda s: s.pending > 1)
        work, left = [], self._tokens_per_step
        for sequence in mine:
            if tokens := min(sequence.pending, left):
                work.append((sequence, tokens))
                left -= tokens
        return work

    def _make_room(self, work: list[Work]) -> list[Work]:
        """Free cells until the work fits, and return the work that is left. Rows of ended texts are freed first; then the
        youngest running texts are preempted.

        Cells that rows share are counted for each of them, so there may be more room than computed here, but never less.
        """
        while self.used + sum(tokens for _, tokens in work) > self._llama.cells - sum(
            len(k.tokens) for k in self._kept
        ):
            if self._kept:
                self._drop(self._kept[0])
                continue
            youngest = self.running[-1]  # never the only text: its context is at most the number of cells
            self._release(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            work = [each for each in work if each[0] is not youngest]
        return work

    def _compute(self, work: list[Work]) -> tuple[Tensor, list[int]]:
        self._llama.use(work[0][0].blend.active)
        pieces = []
        for sequence, count in work:
            start = sequence.cached
            pieces.append(Piece(self._rows[sequence], sequence.tokens[start : start + count], start))
        return self._llama.compute(pieces), list(range(len(work)))

    def _drop_done(self) -> None:
        """Remove sequences that have ended or whose reader has left."""
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.done)
        for sequence in [sequence for sequence in self.running if sequence.done]:
            if self._llama.can_copy and sequence.cached and not sequence.failed:
                kept = Kept(self._rows.pop(sequence), sequence.identity, sequence.tokens[: sequence.cached])
                self._kept.append(kept)
                self.running.remove(sequence)
            else:
                self._release(sequence)
        self._unload_retired()

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(self._rows.pop(sequence))
        sequence.cached = 0

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._give_back(kept.row)

    def _give_back(self, row: int) -> None:
        self._llama.cut(row, 0)
        self._free.append(row)

    def _unload(self, adapter: str) -> None:
        self._llama.free_adapter(adapter)
