"""The running sequences and one forward pass for all of them, each row under its own blend."""

import logging
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from model_compose.engines.huggingface.cache import RowCache
from model_compose.engines.huggingface.model import Loaded
from model_compose.engines.huggingface.sequence import Sequence

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens a step: a long prompt stalls the others no longer than this takes, and outlives its client no longer."""


class Batch:
    """Rows 0..ready-1 decode; the row behind them, if any, is being prefilled. Further sequences wait their turn."""

    def __init__(self, loaded: Loaded, max_rows: int) -> None:
        self._loaded = loaded
        config: Any = loaded.model.config
        self._config = config.get_text_config()
        self._max_rows = max_rows
        self._cache = RowCache(self._config.num_hidden_layers, max_rows)
        self._ready: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._waiting: deque[Sequence] = deque()

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    @property
    def sequences(self) -> list[Sequence]:
        """All that run or wait and are not done."""
        prefilling = [self._prefilling] if self._prefilling is not None else []
        return [sequence for sequence in (*self._ready, *prefilling, *self._waiting) if not sequence.done]

    def _admit(self) -> None:
        """Gives the next sequence that waits a row, where there is one."""
        self._drop_done()
        if self._prefilling is None and self._waiting and len(self._ready) < self._max_rows:
            self._prefilling = self._waiting.popleft()
            self._cache.wipe(len(self._ready))

    def _drop_done(self) -> None:
        """Gives back the rows of sequences that have ended, or that nobody reads any more."""
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.done)
        if self._prefilling is not None and self._prefilling.done:
            self._prefilling = None
        for row in reversed(range(len(self._ready))):
            if self._ready[row].done:
                self._leave(row)
        if not self._ready and self._prefilling is None:
            self._cache.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """A piece of the next sequence's prompt, then one token for every row that is ready."""
        self._admit()
        if self._prefilling is not None:
            self._run(len(self._ready), [self._prefilling], PREFILL_TOKENS)
            if self._prefilling.generated:
                self._ready.append(self._prefilling)
                self._prefilling = None
        self._drop_done()
        if self._ready:
            self._run(0, self._ready, 1)
        self._drop_done()

    def _run(self, first: int, sequences: Rows[Sequence], tokens: int) -> None:
        """One forward pass, and a draw for each sequence whose tokens are all cached then.

        Where the pass fails, each row is tried alone, so that only the sequences that cause it end.
        """
        try:
            logits: Tensor | None = self._forward(first, sequences, tokens)
        except Exception as error:
            if len(sequences) == 1:
                sequences[0].fail(error)
                return
            log.warning("a step of %d rows failed (%s); trying each row alone", len(sequences), error)
            logits = None
        if logits is None:  # after the except block, which holds on to the failed pass's memory
            for row, sequence in enumerate(sequences):
                self._run(first + row, [sequence], tokens)
            return
        for sequence, row_logits in zip(sequences, logits[:, None], strict=True):
            if sequence.cached == len(sequence.tokens):
                try:
                    sequence.take(row_logits)
                except Exception as error:
                    sequence.fail(error)

    def _leave(self, row: int) -> None:
        """Closes the gap: the last ready row moves into it, and the one that is being prefilled behind that."""
        last = len(self._ready) - 1
        if row != last:
            self._cache.move(last, row, self._ready[last].cached)
            self._ready[row] = self._ready[last]
        self._ready.pop()
        if self._prefilling is not None:
            self._cache.wipe(last)
            self._cache.move(last + 1, last, self._prefilling.cached)

    def _forward(self, first: int, sequences: Rows[Sequence], tokens: int) -> Tensor:
        """Runs up to `tokens` uncached tokens of each sequence (all have the same number); logits (n, vocabulary)."""
        device = self._loaded.device
        pending = [sequence.tokens[sequence.cached : sequence.cached + tokens] for sequence in sequences]
        starts = [sequence.cached for sequence in sequences]
        count = len(pending[0])
        self._cache.place(first, starts, count, device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        lora = self._loaded.lora
        with lora.use([sequence.blend for sequence in sequences]):
            logits: Tensor = lora.model(
                input_ids=torch.tensor(pending, device=device),
                position_ids=positions,
                attention_mask=self._mask(positions),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        for sequence in sequences:
            sequence.cached += count
        return logits

    def _mask(self, positions: Tensor) -> Any:
        """(n, 1, queries, keys): where a query may look; by kind of layer where the model has several kinds."""
        keys, queries = torch.arange(self._cache.longest, device=positions.device), positions[:, None, :, None]
        causal = keys <= queries
        window = getattr(self._config, "sliding_window", None)
        kinds = set(getattr(self._config, "layer_types", None) or [])
        if not window or (kinds and "sliding_attention" not in kinds):
            return self._as_attention_takes_it(causal)
        sliding = self._as_attention_takes_it(causal & (keys > queries - window))
        if len(kinds) < 2:
            return sliding
        return {"full_attention": self._as_attention_takes_it(causal), "sliding_attention": sliding}

    def _as_attention_takes_it(self, allowed: Tensor) -> Tensor:
        """sdpa takes booleans; eager attention (Gemma 2, for its soft cap) adds the mask to its scores."""
        if self._config._attn_implementation != "eager":
            return allowed
        dtype = next(self._loaded.model.parameters()).dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )
