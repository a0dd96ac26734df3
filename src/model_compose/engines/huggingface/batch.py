"""The scheduler: which sequences run, how many tokens each gets in a step, and one forward pass for all of them.

In a step, every sequence that decodes gets one token. The prompts that are being read share PREFILL_TOKENS, so a long
prompt delays nobody and short prompts overtake it. Sequences start in the order in which they came. A sequence whose
blend only runs folded waits until all running sequences have that blend; those behind it wait too, so that it is not
overtaken for ever. When the KV cache is full, old prefixes are dropped first. Then the youngest sequence gives up its
row and is computed again later.
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
"""How many tokens of prompts a step reads at most. Sequences that decode wait for these."""

PIECE_TOKENS = 64
"""A step reads at least this many tokens of a prompt, if it has them and they fit:

of many prompts, some have to wait.
"""

RESERVED_TOKENS = 64
"""A new row has room for this many tokens behind the prompt, unless the text must end earlier."""

FOLD_AFTER = 256
"""`fold: auto` folds a blend after this many passes that used no other blend: folding takes as long as many passes."""


class Batch(Scheduler):
    """lora, forward:

    the model. max_rows: how many sequences run at once. auto_fold: folds a blend that all of them use.
    """

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
        """One forward pass: one token for each sequence that decodes, and pieces of some prompts."""
        self._drop_done()
        work = self._decodes()
        work += self._prompts()
        if work:
            self._fold_or_not([sequence for sequence, _ in work])
            self._run(work)
        self._drop_done()

    def _decodes(self) -> list[Work]:
        """The running sequences that decode, after each got room for its next token."""
        for sequence in list(self.running):  # the oldest first, since it may take the row of a younger one
            if sequence in self.running and sequence.pending == 1:
                if self._is_long(sequence) and not sequence.long:  # its cached keys were rotated by other factors
                    sequence.long, sequence.cached = True, 0
                self._reserve(sequence)
        return [(sequence, 1) for sequence in self.running if sequence.pending == 1]

    def _is_long(self, sequence: Sequence) -> bool:
        return self._forward.switch is not None and len(sequence.tokens) > self._forward.switch

    def _reserve(self, sequence: Sequence) -> None:
        """Gives the sequence a row for all of its tokens.

        If needed, drops prefixes, then preempts the youngest sequences.
        """
        while (larger := self._cache.grow(self._rows[sequence], len(sequence.tokens), sequence.cached)) is None:
            if self.prefixes is not None and self.prefixes.drop_one():
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        self._rows[sequence] = larger

    def _preempt(self, sequence: Sequence) -> None:
        """Puts a running sequence back to the front of the queue.

        It keeps its tokens and loses their keys and values.
        """
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _prompts(self) -> list[Work]:
        """Pieces of the prompts that are being read.

        The prompts share the step's budget evenly, but no piece is small, since each attends in a call of its own. The
        shortest prompts come first. The oldest prompt always gets a piece, and whatever is left.
        """
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
        """Starts waiting sequences, oldest first, as long as the KV cache has rows for them.

        A sequence waits if another one that starts with the same tokens is just being read. Others may overtake it
        then.
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
        """Whether the sequence may share the batch with those that run.

        A blend that only runs folded has the batch to itself. For other blends, the number of adapters may be limited.
        """
        if not self.running:
            return True
        first = self.running[0].blend
        if first.full_rank or sequence.blend.full_rank:
            return first.equals(sequence.blend)
        used = {name for other in (*self.running, sequence) for name in other.blend.active}
        return self._max_adapters is None or len(used) <= self._max_adapters

    def _give_row(self, sequence: Sequence) -> bool:
        """Gives the sequence a row that already holds what is known of the beginning of its tokens.

        False if there is no room.
        """
        tokens = min(len(sequence.tokens) + RESERVED_TOKENS, sequence.most_tokens)
        while (row := self._cache.take(tokens)) is None:
            if self.prefixes is None or not self.prefixes.drop_one():
                return False
        self._rows[sequence] = row
        if self.prefixes is not None:
            wanted = sequence.tokens[:-1]  # the last token is always computed, since we need its logits
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
        """Gives back the rows of sequences that have ended or whose reader has left."""
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
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError if there is no memory
            log.warning("a prefix of %d tokens was not kept: %s", sequence.cached, error)

    def _unload(self, adapter: str) -> None:
        self._lora.unload(adapter)

    def _release(self, sequence: Sequence) -> None:
        self._cache.give_back(self._rows.pop(sequence))
        sequence.cached = 0

    def _fold_or_not(self, sequences: list[Sequence]) -> None:
        """With `fold:

        auto`, folds the blend if all sequences use the same one for long, and unfolds it once one uses another.
        """
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
            except (RuntimeError, MemoryError) as error:  # the live way computes the same
                log.warning("no memory to fold the blend, it stays live: %s", error)
                self._auto_fold = False

    def _compute(self, work: list[Work]) -> tuple[Tensor, list[int]]:
        """Logits (sequences, vocabulary), and for each of their rows its number in `work`."""
        if work[0][0].blend.full_rank:  # then all have this blend
            self._lora.fold(work[0][0].blend)
        pieces = []
        for sequence, count in work:
            start = sequence.cached
            pieces.append(Piece(self._rows[sequence], sequence.tokens[start : start + count], start, sequence.long))
        step = Pass(pieces, self._forward.layers[0].device)
        with self._lora.use([work[number][0].blend for number in step.order], step.counts) as mix:
            return self._forward(step, mix), step.order
