"""One text in the making: its cache, its next tokens, its sampler and its way back to text."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from model_compose.engines.huggingface.model import Loaded
from model_compose.engines.huggingface.sampling import Sampler
from model_compose.engines.huggingface.text import Detokenizer, StopStrings
from model_compose.generation import Chunk, Finish, Request

PREFILL_TOKENS = 512
"""Prompt tokens a step; a long prompt neither stalls the other sequences nor outlives its client."""


class Sequence:
    """Sequence `index` of a request. `step` runs the model once; the engine's thread calls it until `done`.

    emit: takes each Chunk; called from the engine's thread.
    """

    def __init__(
        self, loaded: Loaded, request: Request, index: int, prompt: list[int], emit: Callable[[Chunk], None]
    ) -> None:
        self.request, self.index, self.emit = request, index, emit
        self.done = False
        self.generated = 0
        self._loaded = loaded
        self._pending = torch.tensor(prompt)
        model: Any = loaded.model
        self._cache = DynamicCache(config=model.config)
        self._sampler = Sampler(request.sampling, index, self._pending, loaded.eos)
        self._text = Detokenizer(loaded.tokenizer, prompt)
        self._stops = StopStrings(request.sampling.stop_sequences)
        room = loaded.context - len(prompt)
        self._budget = min(request.sampling.max_output_length or room, room)

    def step(self) -> None:
        """Prefills up to PREFILL_TOKENS of the prompt, or decodes one token, under the request's blend."""
        tokens, self._pending = self._pending[:PREFILL_TOKENS], self._pending[PREFILL_TOKENS:]
        lora = self._loaded.lora
        with torch.inference_mode(), lora.use((self.request.blend,)):
            logits = lora.model(
                input_ids=tokens[None].to(self._loaded.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if len(self._pending) == 0:
                self._advance(logits)

    def _advance(self, logits: torch.Tensor) -> None:
        token = self._sampler.draw(logits)
        self.generated += 1
        self._pending = torch.tensor([token])
        if token in self._loaded.eos:
            return self._end("stop", self._stops.flush())
        text, stopped = self._stops.push(self._text.push(token))
        logprobs = self._sampler.logprobs(logits, token, self._loaded.tokenizer)
        if stopped:
            return self._end("stop", text, logprobs)
        if self.generated >= self._budget:
            return self._end("length", text + self._stops.flush(), logprobs)
        if text or logprobs:
            self.emit(Chunk(self.index, text, logprobs=logprobs))
        return None

    def _end(self, finish: Finish, text: str, logprobs: Any = ()) -> None:
        self.done = True
        self.emit(Chunk(self.index, text, finish, logprobs))
