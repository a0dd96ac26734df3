"""One text in the making: its tokens, its sampler and its way back to text. Knows nothing of the model or the batch."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model_compose.engines.huggingface.sampling import Sampler
from model_compose.engines.huggingface.text import Detokenizer, StopStrings
from model_compose.errors import ComposeError, RunError
from model_compose.generation import Chunk, Finish, Request

log = logging.getLogger(__name__)


class Sequence:
    """Sequence `index` of a request. tokens: prompt and drawn ones; the first `cached` of them are in the KV cache.

    limit: the longest that prompt and text may become together. emit: takes each Chunk, or the error that ends the
    sequence; called from the engine's thread.
    """

    def __init__(
        self, request: Request, index: int, prompt: list[int], limit: int, eos: tuple[int, ...], tokenizer: Any,
        emit: Callable[[Chunk | ComposeError], None],
    ) -> None:  # fmt: skip
        self.blend, self.index = request.blend, index
        self.tokens, self.cached = list(prompt), 0
        self.done = False
        self._prompt_length = len(prompt)
        self._eos, self._tokenizer, self._emit = eos, tokenizer, emit
        self._sampler = Sampler(request.sampling, index, torch.tensor(prompt), eos)
        self._text = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(request.sampling.stop_sequences)
        room = limit - len(prompt)
        self._budget = min(request.sampling.max_output_length or room, room)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self._prompt_length

    def take(self, logits: Tensor) -> None:
        """Draws the next token from logits of (1, vocabulary), and sends the text that it completes."""
        token = self._sampler.draw(logits)
        self.tokens.append(token)
        if token in self._eos:
            return self._end("stop", self._stops.flush())
        text, stopped = self._stops.push(self._text.push(token))
        logprobs = self._sampler.logprobs(logits, token, self._tokenizer)
        if stopped:
            return self._end("stop", text, logprobs)
        if self.generated >= self._budget:
            return self._end("length", text + self._stops.flush(), logprobs)
        if text or logprobs:
            self._emit(Chunk(self.index, text, logprobs=logprobs))
        return None

    def fail(self, error: Exception) -> None:
        """Ends the sequence with an error. What is not one of ours goes to the log, and its name alone to the caller."""
        self.done = True
        if not isinstance(error, ComposeError):
            log.error("a sequence failed", exc_info=error)
        self._emit(_run_error(error))

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
