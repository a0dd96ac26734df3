"""Drawing: transformers' processors as the reference, row by row; rows do not depend on each other."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model_compose.engines.stepping import sampling as ours
from model_compose.engines.stepping.sampling import Chooser, draw
from model_compose.errors import InputError
from model_compose.generation import Sampling

WIDTH = 60
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 99),
)


def distribution(scores: torch.Tensor, sampling: Sampling, prompt: list[int]) -> torch.Tensor:
    """What transformers draws from."""
    steps: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.repetition_penalty != 1.0:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    ids: Any = torch.tensor([prompt])
    edited: torch.Tensor = LogitsProcessorList(steps)(ids, scores[None].clone())
    return edited.softmax(dim=-1)[0]


@settings(max_examples=60, deadline=None)
@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=4), seed=st.integers(0, 999), few=st.booleans())
def test_every_draw_inverts_the_distribution_of_transformers(samplings: list[Sampling], seed: int, few: bool) -> None:
    """The token at which the cumulative distribution, likeliest first, passes the row's random number."""
    scores = torch.randn(len(samplings), WIDTH, generator=torch.Generator().manual_seed(seed)) * 3
    prompt = [1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "CANDIDATES", 4 if few else 1024)  # few: the rest of the vocabulary has to be looked at
        drawn = draw(scores, [Chooser(s, 0, prompt, [], None) for s in samplings])
        alone = [
            draw(row[None], [Chooser(s, 0, prompt, [], None)])[0] for row, s in zip(scores, samplings, strict=True)
        ]
    assert drawn == alone, "a row depends on itself alone"
    for row, sampling, token in zip(scores, samplings, drawn, strict=True):
        assert isinstance(token, int)
        chances = distribution(row, sampling, prompt)
        assert chances[token] > 0
        number = Chooser(sampling, 0, prompt, [], None).random()
        filters = sampling.top_k or sampling.top_p < 1 or sampling.min_p
        order = chances.argsort(descending=True) if filters else torch.arange(WIDTH)
        sums = chances[order].double().cumsum(0)
        place = int((order == token).nonzero())
        assert (sums[place - 1] if place else 0) - 1e-5 <= number <= sums[place] + 1e-5


def test_the_frequencies_are_those_of_the_distribution() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=4, seed=5)
    chooser = Chooser(sampling, 0, [0], [], None)
    counts = Counter(draw(scores, [chooser])[0] for _ in range(4000))
    expected = distribution(scores[0], sampling, [0])
    for token in range(5):
        assert abs(counts[token] / 4000 - float(expected[token])) < 0.03


def test_penalties_count_what_was_drawn() -> None:
    sampling = Sampling(do_sample=False, presence_penalty=0.5, frequency_penalty=0.2)
    chooser = Chooser(sampling, 0, [3, 3, 3], [], None)
    for token in (1, 1, 2):
        chooser.accept(token)
    scores = torch.zeros(5)
    chooser.edit(scores)
    assert scores.tolist() == pytest.approx([0, -0.9, -0.7, 0, 0])  # the prompt does not count


def test_a_row_without_finite_scores_fails_alone() -> None:
    scores = torch.randn(3, WIDTH)
    scores[1] = float("nan")
    choosers = [Chooser(Sampling(seed=1, do_sample=sample), 0, [1], [], None) for sample in (True, True, False)]
    first, bad, last = draw(scores, choosers)
    assert isinstance(first, int)
    assert isinstance(bad, InputError)
    assert last == int(scores[2].argmax())


def test_eos_waits_for_the_least_length() -> None:
    scores = torch.zeros(1, 5)
    scores[0, 4] = 9.0
    chooser = Chooser(Sampling(do_sample=False, min_output_length=2), 0, [1], [4], None)
    assert [draw(scores, [chooser])[0] for _ in range(3)] == [0, 0, 4]
