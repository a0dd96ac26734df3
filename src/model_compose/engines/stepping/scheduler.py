"""What all schedulers of sequences have in common: a queue, adapters that are retired, and passes that may fail.

If a pass fails, only the sequence that causes it ends.
"""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable

from torch import Tensor

from model_compose.engines.prompts import common
from model_compose.engines.stepping.sampling import draw
from model_compose.engines.stepping.sequence import Sequence

log = logging.getLogger(__name__)

WORTH_WAITING = 32
"""A sequence waits until another's prompt is read if that saves it this many tokens."""

Work = tuple[Sequence, int]
"""A sequence, and how many of its pending tokens a pass computes."""


class Scheduler(ABC):
    """Used in the engine's thread only. running: the oldest first."""

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._retired: set[str] = set()

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.waiting.extend(sequences)

    def retire(self, adapter: str) -> None:
        """Unloads an adapter as soon as no sequence uses it."""
        self._retired.add(adapter)
        self._unload_retired()

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that run or wait and are not done."""
        return [sequence for sequence in (*self.running, *self.waiting) if not sequence.done]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute and no row to give back."""
        return not self.running and not self.waiting

    def _unload_retired(self) -> None:
        if not self._retired:
            return
        used = {name for sequence in self.sequences for name in sequence.blend.active}
        for name in self._retired - used:
            self._unload(name)
        self._retired &= used

    @property
    @abstractmethod
    def _shares_prefixes(self) -> bool:
        """Whether a sequence may use the keys and values of another one's beginning."""

    def _is_worth_waiting(self, sequence: Sequence) -> bool:
        """Whether a running sequence is just reading a prompt that starts like this one's."""
        return self._shares_prefixes and any(
            other.pending > 1
            and other.kept_as == sequence.kept_as
            and common(other.tokens, sequence.tokens[:-1]) >= other.cached + WORTH_WAITING
            for other in self.running
        )

    @abstractmethod
    def step(self) -> None:
        """One forward pass, and a token for each sequence whose prompt has been read."""

    @abstractmethod
    def _unload(self, adapter: str) -> None:
        """Frees an adapter that no sequence uses any more."""

    @abstractmethod
    def _compute(self, work: list[Work]) -> tuple[Tensor, list[int]]:
        """Logits (sequences, vocabulary), and for each of their rows its number in `work`."""

    def _run(self, work: list[Work]) -> None:
        """One forward pass, and one drawn token for each sequence whose tokens are all cached then.

        If the pass fails, each sequence is tried alone, so that only those that cause the failure end.
        """
        try:
            logits, order = self._compute(work)
        except Exception as error:
            if len(work) == 1:
                work[0][0].fail(error)
                return
            log.warning("a step of %d sequences failed (%s); trying each alone", len(work), error)
            logits = None
        if logits is None:  # not in the except block, where the failed pass still holds memory
            for each in work:
                self._run([each])
            return
        for sequence, tokens in work:
            sequence.cached += tokens
        ready = [(at, work[number][0]) for at, number in enumerate(order) if not work[number][0].pending]
        if not ready:
            return
        rows = logits if len(ready) == len(logits) else logits[[at for at, _ in ready]]
        drawn = draw(rows, [sequence.chooser for _, sequence in ready])
        for (_, sequence), row, token in zip(ready, rows, drawn, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                sequence.take(token, row)
            except Exception as error:
                sequence.fail(error)
