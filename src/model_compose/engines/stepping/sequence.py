"""One text while it is generated: its tokens, how it draws them, and how they become text.

This module knows nothing of the model or the batch.
"""

import logging
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_compose.engines.stepping.grammar import Constraint
from model_compose.engines.stepping.sampling import Chooser, logprobs
from model_compose.engines.text import Transcript
from model_compose.errors import ComposeError, RunError
from model_compose.generation import Chunk, Finish, Sampling, TokenLogprob
from model_compose.lora.blend import Blend

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What the sequences of one request have in common.

    blend: by the keys under which the engine holds its adapters. identity: the blend's digest. limit: the most tokens
    of prompt and text together.
    """

    tokens: list[int]
    blend: Blend
    identity: str
    sampling: Sampling
    limit: int


class Sequence:
    """Text number `index` of a request.

    tokens: those of the prompt, then the drawn ones. The first `cached` of them have keys and values in the KV cache.
    long: whether these are rotated for a long text (rotary.py). reused: how many prompt tokens the prefix cache had.
    emit: called in the engine's thread with each Chunk, or with the error that ends the sequence.
    """

    def __init__(
        self, prompt: Prompt, index: int, eos: tuple[int, ...], tokenizer: Any, constraint: Constraint | None,
        emit: Callable[[Chunk | ComposeError], None],
    ) -> None:  # fmt: skip
        self.blend, self.identity, self.index = prompt.blend, prompt.identity, index
        self.tokens, self.cached, self.reused = list(prompt.tokens), 0, 0
        self.long = False
        self.done = False
        self.failed = False
        self.chooser = Chooser(prompt.sampling, index, prompt.tokens, eos, constraint)
        self._prompt_length = len(prompt.tokens)
        self._eos, self._tokenizer, self._emit = eos, tokenizer, emit
        self._text = Transcript(tokenizer, prompt.tokens, prompt.sampling.stop_sequences)
        self._logprobs = prompt.sampling.logprobs
        room = prompt.limit - len(prompt.tokens)
        self._budget = min(prompt.sampling.max_output_length or room, room)
        self._request = copy_context()  # so that the engine's thread logs under the request's id

    @property
    def generated(self) -> int:
        return len(self.tokens) - self._prompt_length

    @property
    def pending(self) -> int:
        """How many tokens the next passes have to compute. While the sequence decodes, this is 1."""
        return len(self.tokens) - self.cached

    @property
    def kept_as(self) -> str:
        """What its keys and values depend on besides the tokens."""
        return f"{self.identity} long" if self.long else self.identity

    @property
    def most_tokens(self) -> int:
        """The most tokens that prompt and text can have together."""
        return self._prompt_length + self._budget

    def take(self, token: int, logits: Tensor) -> None:
        """Adds a drawn token and emits the text that it completes. logits: of the row, (vocabulary,)."""
        self.tokens.append(token)
        if token in self._eos:
            return self._end("stop", self._text.end())
        told = () if self._logprobs is None else self._told(token, logits, self._logprobs)
        text, stopped = self._text.push(token)
        if stopped:
            return self._end("stop", text, told)
        if self.generated >= self._budget:
            return self._end("length", text + self._text.end(), told)
        if text or told:
            self._emit(Chunk(self.index, text, logprobs=told))
        return None

    def fail(self, error: Exception) -> None:
        """Ends the sequence with an error.

        If it is not a ComposeError, the log gets it whole and the caller only its name.
        """
        self.done = self.failed = True
        if not isinstance(error, ComposeError):
            self._request.run(log.error, "a sequence failed", exc_info=error)
        self._emit(_run_error(error))

    def _told(self, token: int, logits: Tensor, count: int) -> tuple[TokenLogprob]:
        return (logprobs(logits, token, count, self._tokenizer, self._text.position),)

    def _end(self, finish: Finish, text: str, logprobs: Any = ()) -> None:
        self.done = True
        self._emit(Chunk(self.index, text, finish, logprobs))


def _run_error(error: Exception) -> ComposeError:
    if isinstance(error, ComposeError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        failure = RunError("out of memory while generating; ask for a shorter text, or send fewer requests at once")
    else:
        failure = RunError(f"the model failed while generating ({type(error).__name__}); the log has the details")
    failure.__cause__ = error
    return failure
