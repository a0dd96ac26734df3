"""Drawing the next token of one sequence, with transformers' own logits processors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model_compose.errors import InputError
from model_compose.generation import Sampling, TokenLogprob

SMALLEST_TEMPERATURE = 1e-5


class Sampler:
    """Draws tokens for one sequence from logits of shape (1, vocabulary). Greedy without do_sample or at temperature 0
    (below SMALLEST_TEMPERATURE the division would overflow).

    One seed gives one sequence; sequence `index` of a request uses seed + index.
    """

    def __init__(self, sampling: Sampling, index: int, prompt: Tensor, eos: Sequence[int]) -> None:
        self._greedy = not sampling.do_sample or sampling.temperature < SMALLEST_TEMPERATURE
        self._ids = prompt[None]
        self._logprobs = sampling.logprobs
        # The draw is on the CPU, where one seed means one text on every machine.
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + index)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.min_output_length > 1 and eos:
            minimum = MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_output_length, list(eos), "cpu")
            self._processors.append(minimum)
        if not self._greedy:
            if sampling.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, logits: Tensor) -> int:
        """The next token's id. Raises InputError where the scores overflow."""
        ids: Any = self._ids
        scores: Tensor = self._processors(ids, logits.float().cpu())
        if not math.isfinite(scores.max()):
            raise InputError(
                "the model's scores are not finite here: the blend's weights or the repetition_penalty are too extreme, or "
                "the precision is too small for this model (float16; try bfloat16)",
                field="blend",
            )
        if self._greedy:
            token = scores.argmax(dim=-1)
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)[:, 0]
        self._ids = torch.cat([self._ids, token[None]], dim=1)
        return int(token)

    def logprobs(self, logits: Tensor, token: int, tokenizer: Any) -> tuple[TokenLogprob, ...]:
        """The chosen token's log-probability with its alternatives; empty when the request asked for none."""
        if self._logprobs is None:
            return ()
        values = logits[0].float().log_softmax(dim=-1)
        top = values.topk(self._logprobs) if self._logprobs else None
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
        alternatives = tuple((tokenizer.decode([other]), _finite(value)) for other, value in pairs)
        return (TokenLogprob(tokenizer.decode([token]), _finite(float(values[token])), alternatives),)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API uses -9999 for tokens that cannot occur."""
    return logprob if math.isfinite(logprob) else -9999.0
