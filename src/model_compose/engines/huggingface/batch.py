"""The scheduler: which sequences run, how many tokens of each, and one forward pass for all of them a step.

A step gives every sequence that decodes one token, and shares PREFILL_TOKENS among the prompts that are being read, so
that a long prompt stalls nobody and short ones overtake it. Sequences join in the order in which they came; one whose
blend runs folded only waits until all that run have its blend, and those behind it wait too, so that nobody starves. When
the KV cache is full, old prefixes go first, then the youngest sequence, which is computed again later.
"""

import logging
from collections import deque

from torch import Tensor

from model_compose.engines.huggingface.attention import Pass, Piece
from model_compose.engines.huggingface.cache import KVCache, Row, copy
from model_compose.engines.huggingface.forward import Forward
from model_compose.engines.huggingface.prefix import PrefixCache, paste
from model_compose.engines.prompts import common
from model_compose.engines.stepping.scheduler import Scheduler, Work
from model_compose.engines.stepping.sequence import Sequence
from model_compose.lora.layers import LoraModel

log = logging.getLogger(__name__)

PREFILL_TOKENS = 256
"""Prompt tokens a step, over all rows: the others wait no longer than these take."""

PIECE_TOKENS = 64
"""Least of a prompt in a step, if it has so many and they fit: many prompts at once are read some after the others."""

RESERVED_TOKENS = 64
"""A row starts with room for so many tokens behind its prompt, if that many may come."""

FOLD_AFTER = 256
"""Passes with one blend alone before `fold: auto` folds it: folding takes as long as some of them."""


class Batch(Scheduler):
    """lora and forward: the model. max_rows: sequences that run at once. auto_fold: fold what all of them use."""

    def __init__(
        self, lora: LoraModel, forward: Forward, cache: KVCache, *, max_rows: int, prefix_cache: bool = True,
        auto_fold: bool = False, max_adapters: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._lora, self._forward, self._cache = lora, forward, cache
        self._max_rows, self._max_adapters = max_rows, max_adapters
        self._auto_fold, self._same = auto_fold, 0
        self._rows: dict[Sequence, Row] = {}  # of the running sequences
        self.prefixes = PrefixCache(cache) if prefix_cache else None

    def computes(self, sequence: Sequence) -> bool:
        """Whether the sequence has a row of the KV cache. May be called from any thread."""
        return sequence in self._rows

    def step(self) -> None:
        """One forward pass: a token for each sequence that decodes, a piece of some prompts."""
        self._drop_done()
        work = self._decodes()
        work += self._prompts()
        if work:
            self._fold_or_not([sequence for sequence, _ in work])
            self._run(work)
        self._drop_done()

    def _decodes(self) -> list[Work]:
        """The running sequences that decode, each with room for its next token."""
        for sequence in list(self.running):  # the oldest first: it takes the room of younger ones
            if sequence in self.running and sequence.pending == 1:
                if self._is_long(sequence) and not sequence.long:  # what is cached was rotated by other factors
                    sequence.long, sequence.cached = True, 0
                self._reserve(sequence)
        return [(sequence, 1) for sequence in self.running if sequence.pending == 1]

    def _is_long(self, sequence: Sequence) -> bool:
        return self._forward.switch is not None and len(sequence.tokens) > self._forward.switch

    def _reserve(self, sequence: Sequence) -> None:
        """Makes room for all of the sequence's tokens: by letting prefixes go, then by preempting the youngest."""
        while (larger := self._cache.grow(self._rows[sequence], len(sequence.tokens), sequence.cached)) is None:
            if self.prefixes is not None and self.prefixes.drop_one():
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        self._rows[sequence] = larger

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue; its tokens stay, what was computed of them goes."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _prompts(self) -> list[Work]:
        """Pieces of prompts: the budget is shared evenly among those that are being read, but not in small pieces, as each
        costs attention of its own. The shortest go first; the oldest has a piece in any case, and what is left over."""
        self._admit()
        reading = [sequence for sequence in self.running if sequence.pending > 1]
        if not reading:
            return []
        oldest, *others = reading
        work, left = [], PREFILL_TOKENS
        kept = min(oldest.pending, PIECE_TOKENS)
        for number, sequence in enumerate(sorted(others, key=lambda s: s.pending)):
            share = max(PIECE_TOKENS, left // (len(reading) - number))
            tokens = min(sequence.pending, share, left - kept)
            if not tokens:
                break
            work.append((sequence, tokens))
            left -= tokens
        return [*work, (oldest, min(oldest.pending, left))]

    def _admit(self) -> None:
        """Gives waiting sequences a row, oldest first, as long as there is room for them.

        One whose prompt starts as that of another that is just being read waits for it, and others may pass meanwhile.
        """
        kept: list[Sequence] = []
        while self.waiting and len(self.running) < self._max_rows:
            sequence = self.waiting.popleft()
            sequence.long = self._is_long(sequence)
            if self._is_worth_waiting(sequence):
                kept.append(sequence)
                continue
            try:
                fits = self._goes_with_running(sequence) and self._give_row(sequence)
            except Exception as error:  # no memory for the row
                sequence.fail(error)
                if sequence in self._rows:
                    self._release(sequence)
                continue
            if not fits:
                kept.append(sequence)
                break
            self.running.append(sequence)
        self.waiting.extendleft(reversed(kept))

    @property
    def _shares_prefixes(self) -> bool:
        return self.prefixes is not None

    def _goes_with_running(self, sequence: Sequence) -> bool:
        """A blend that only runs folded has the batch to itself; of others, there may be a limit of adapters."""
        if not self.running:
            return True
        first = self.running[0].blend
        if first.full_rank or sequence.blend.full_rank:
            return first.equals(sequence.blend)
        used = {name for other in (*self.running, sequence) for name in other.blend.active}
        return self._max_adapters is None or len(used) <= self._max_adapters

    def _give_row(self, sequence: Sequence) -> bool:
        """A row with whatever is known of the beginning of the sequence's tokens. False where there is no room."""
        tokens = min(len(sequence.tokens) + RESERVED_TOKENS, sequence.most_tokens)
        while (row := self._cache.take(tokens)) is None:
            if self.prefixes is None or not self.prefixes.drop_one():
                return False
        self._rows[sequence] = row
        if self.prefixes is not None:
            wanted = sequence.tokens[:-1]  # the last token is computed in any case, for its logits
            entry, length = self.prefixes.find(sequence.kept_as, wanted)
            alike = [other for other in self.running if other.kept_as == sequence.kept_as]
            other = max(alike, key=lambda other: common(other.tokens[: other.cached], wanted), default=None)
            shared = common(other.tokens[: other.cached], wanted) if other else 0
            if other is not None and shared > length:
                copy(self._rows[other], row, shared)
            elif entry is not None:
                paste(entry, row, length)
            sequence.cached = max(shared, length)
            if not sequence.generated:
                sequence.reused = sequence.cached
                self.prefixes.queries += len(sequence.tokens)
                self.prefixes.hits += sequence.cached
        return True

    def _drop_done(self) -> None:
        """Gives back the rows of sequences that have ended, or that nobody reads any more."""
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.done)
        for sequence in [sequence for sequence in self.running if sequence.done]:
            self.running.remove(sequence)
            self._keep_prefix(sequence)
            self._release(sequence)

        self._unload_retired()

    def _keep_prefix(self, sequence: Sequence) -> None:
        if self.prefixes is None or sequence.failed:
            return
        try:
            self.prefixes.keep(sequence.kept_as, sequence.tokens[: sequence.cached], self._rows[sequence])
        except (RuntimeError, MemoryError) as error:  # torch says by a RuntimeError that memory is short
            log.warning("a prefix of %d tokens was not kept: %s", sequence.cached, error)

    def _unload(self, adapter: str) -> None:
        self._lora.unload(adapter)

    def _release(self, sequence: Sequence) -> None:
        self._cache.give_back(self._rows.pop(sequence))
        sequence.cached = 0

    def _fold_or_not(self, sequences: list[Sequence]) -> None:
        """With `fold: auto`: folded while all use the same blend; live as soon as one uses another."""
        first, folded = sequences[0].blend, self._lora.folded
        if folded is not None and folded.full_rank and not folded.equals(first):
            self._lora.unfold(keep=True)
            folded = None
        if not self._auto_fold or first.full_rank:
            return
        alike = all(sequence.blend.equals(first) for sequence in sequences)
        if folded is not None:
            if not alike or not folded.equals(first):
                self._lora.unfold(keep=True)
                self._same = 0
            return
        self._same = self._same + 1 if alike and first.active else 0
        if self._same > FOLD_AFTER or (self._same and self._lora.keeps(first)):
            try:
                self._lora.fold(first)
            except (RuntimeError, MemoryError) as error:  # live serves as well
                log.warning("no memory to fold the blend, it stays live: %s", error)
                self._auto_fold = False

    def _compute(self, work: list[Work]) -> tuple[Tensor, list[int]]:
        """Logits (sequences, vocabulary) in the order that comes with them: numbers into `work`."""
        if work[0][0].blend.full_rank:  # and thus all of them
            self._lora.fold(work[0][0].blend)
        pieces = []
        for sequence, count in work:
            start = sequence.cached
            pieces.append(Piece(self._rows[sequence], sequence.tokens[start : start + count], start, sequence.long))
        step = Pass(pieces, self._forward.layers[0].device)
        with self._lora.use([work[number][0].blend for number in step.order], step.counts) as mix:
            return self._forward(step, mix), step.order
