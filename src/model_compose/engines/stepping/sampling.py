"""Draws the next tokens of all rows at once. What a row draws depends only on its own scores and random numbers.

The filters are those of transformers, in this order: temperature, top_k, top_p, min_p. They look at the most probable
tokens instead of the whole vocabulary. Penalties follow transformers (repetition) and OpenAI's API (presence,
frequency).
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from model_compose.engines.stepping.grammar import Constraint
from model_compose.engines.text import token_bytes
from model_compose.errors import InputError
from model_compose.generation import LEAST_LOGPROB, Sampling, TokenLogprob

CANDIDATES = 1024
"""How many of the most probable tokens top_p and min_p look at, without top_k.

If these are too few, they look at all.
"""


class Chooser:
    """How one sequence draws: its sampling, its random numbers, and the tokens that penalties count.

    The same seed gives the same sequence. Sequence number `index` of a request uses seed + index.
    """

    def __init__(
        self,
        sampling: Sampling,
        index: int,
        prompt: Collection[int],
        eos: Collection[int],
        constraint: Constraint | None,
    ) -> None:
        self.sampling, self._eos, self._constraint = sampling, list(eos), constraint
        self.greedy = sampling.greedy
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1.0 else None
        self._counts: dict[int, int] = {}
        self._drawn = 0
        tokens, values = ([pair[i] for pair in sampling.logit_bias] for i in (0, 1))
        self._biases = (torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)) if tokens else None
        self.edits = (
            self._seen is not None
            or constraint is not None
            or sampling.min_output_length > 1
            or any((sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias))
        )
        """Whether `edit` may change anything."""
        # The generator is on the CPU, so that a seed gives the same numbers on every machine.
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + index)

    def edit(self, scores: Tensor) -> None:
        """Applies penalties, biases and bans to the scores of this row (vocabulary,), in place."""
        sampling = self.sampling
        if self._seen is not None:
            ids = torch.tensor(list(self._seen))
            penalised = scores[ids]
            factor = sampling.repetition_penalty
            scores[ids] = torch.where(penalised < 0, penalised * factor, penalised / factor)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()))
            scores[torch.tensor(list(self._counts))] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if self._biases is not None:
            scores.index_add_(0, *self._biases)
        if 1 < sampling.min_output_length > self._drawn and self._eos:
            for token in self._eos:
                scores[token] = -math.inf
        if self._constraint is not None:
            self._constraint.mask(scores)

    def accept(self, token: int) -> None:
        self._drawn += 1
        if self._seen is not None:
            self._seen[token] = None
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.accept(token)

    def random(self) -> float:
        """The next random number of this sequence, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def draw(logits: Tensor, choosers: list[Chooser]) -> list[int | Exception]:
    """A token for each row of logits (rows, vocabulary), or the error of that row."""
    scores = logits.float().cpu()
    failed: dict[int, Exception] = {}
    if scores is logits and any(chooser.edits for chooser in choosers):
        scores = logits.clone()
    for row, chooser in enumerate(choosers):
        try:
            chooser.edit(scores[row])
        except Exception as error:
            failed[row] = error
    best, tokens = scores.max(dim=-1)
    chosen: list[int | Exception] = list(tokens.tolist())
    drawing = [row for row, chooser in enumerate(choosers) if not chooser.greedy and row not in failed]
    if drawing:
        for row, token in zip(drawing, _sample(scores[drawing], [choosers[row] for row in drawing]), strict=True):
            chosen[row] = token
    for row, finite in enumerate(best.isfinite().tolist()):
        if row in failed or not finite:
            chosen[row] = failed.get(row) or _not_finite()
            continue
        try:
            choosers[row].accept(int(chosen[row]))  # type: ignore[arg-type]  # a token: nothing has failed
        except Exception as error:
            chosen[row] = error
    return chosen


def _sample(scores: Tensor, choosers: list[Chooser]) -> list[int]:
    samplings = [chooser.sampling for chooser in choosers]
    width = scores.shape[1]
    scores = scores / torch.tensor([s.temperature for s in samplings])[:, None]
    widths = [_candidates(s, width) for s in samplings]
    numbers = [chooser.random() for chooser in choosers]
    tokens = [0] * len(choosers)
    for wanted in set(widths):  # rows with the same count together; usually all have the same
        rows = [row for row, each in enumerate(widths) if each == wanted]
        kept = [samplings[row] for row in rows]
        drawn = _from_candidates(scores[rows], wanted, kept, [numbers[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _candidates(sampling: Sampling, width: int) -> int:
    """How many of the most probable tokens to look at; 0 means all, in any order."""
    if sampling.top_k > 0:
        return min(sampling.top_k, width)
    return min(CANDIDATES, width) if sampling.top_p < 1 or sampling.min_p > 0 else 0


def _from_candidates(
    scores: Tensor, count: int, samplings: Collection[Sampling], numbers: Collection[float]
) -> list[int]:
    """Draws a token for each row of scores (rows, vocabulary):

    inverts the cumulative distribution at the random numbers.
    """
    if not count:
        return _invert(scores.softmax(dim=-1), numbers).tolist()
    values, ids = scores.topk(count)
    by_top_k = torch.tensor([s.top_k > 0 for s in samplings])[:, None]
    total = torch.where(by_top_k, values.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
    chances = (values - total).exp()
    below = chances.cumsum(-1) - chances  # the probability of all tokens before it
    least = torch.tensor([s.min_p for s in samplings])[:, None] * chances[:, :1]
    keep = (below < torch.tensor([s.top_p for s in samplings])[:, None]) & (chances >= least)
    if count < scores.shape[1] and bool((keep[:, -1:] & ~by_top_k).any()):
        return _from_candidates(scores, scores.shape[1], samplings, numbers)
    keep[:, 0] = True
    return ids.gather(1, _invert(chances * keep, numbers)[:, None])[:, 0].tolist()


def _invert(chances: Tensor, numbers: Collection[float]) -> Tensor:
    """For each row of chances (rows, n), the index where the cumulative sum exceeds number · total.

    They need not add up to 1.
    """
    sums = chances.double().cumsum(-1)
    at = torch.tensor(numbers, dtype=torch.float64)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp_(max=chances.shape[1] - 1)


def logprobs(logits: Tensor, token: int, count: int, tokenizer: Any, position: int) -> TokenLogprob:
    """The log-probability of the chosen token and of the `count` most probable ones, from a row's logits (vocabulary,)."""
    values = logits.float().log_softmax(dim=-1)
    best = values.topk(count) if count else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    top = tuple((token_bytes(tokenizer, other), _finite(value)) for other, value in pairs)
    return TokenLogprob(token_bytes(tokenizer, token), _finite(float(values[token])), top, position)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _not_finite() -> InputError:
    return InputError(
        "the model's scores are not finite here: the blend's weights or the repetition_penalty are too extreme, or the "
        "precision is too small for this model (float16; try bfloat16)",
        field="blend",
    )
