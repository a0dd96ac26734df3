"""Blends: how requests name them, how names become weights, and when two blends are the same."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_compose.errors import InputError
from model_compose.lora.blend import Blend, Blends

BLENDS = Blends(
    ("alpaca", "pirate"),
    {"concise": Blend({"alpaca": 1.2}, "concise"), "plain": Blend({}, "plain")},
    Blend({"alpaca": 0.7, "pirate": 0.8}, "default"),
)
DIGESTS = {"alpaca": "d1", "pirate": "d2"}


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        (None, {"alpaca": 0.7, "pirate": 0.8}),
        ("", {"alpaca": 0.7, "pirate": 0.8}),
        ({}, {}),
        ("default", {"alpaca": 0.7, "pirate": 0.8}),
        ("concise", {"alpaca": 1.2}),
        ("plain", {}),
        ("pirate", {"pirate": 1.0}),
        ({"pirate": -0.5}, {"pirate": -0.5}),
        ({"alpaca": "1.5"}, {"alpaca": 1.5}),
        ({"alpaca": 3}, {"alpaca": 3.0}),
    ],
)
def test_a_requests_blend_replaces_the_whole_default(value: Any, weights: dict[str, float]) -> None:
    assert BLENDS.resolve(value).weights == weights


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("concize", "unknown blend 'concize'; did you mean 'concise'? known: default, concise, plain, alpaca, pirate"),
        ("defalt", "unknown blend 'defalt'; did you mean 'default'? known: "),
        ({"alpacca": 1}, "unknown adapter 'alpacca'; did you mean 'alpaca'?"),
        ({"alpaca": True}, "blend.alpaca: a weight must be a finite number, not true"),
        ({"alpaca": "much"}, "blend.alpaca: a weight must be a finite number, not 'much'"),
        ({"alpaca": float("nan")}, "blend.alpaca: a weight must be a finite number, not nan"),
        ({"alpaca": None}, "blend.alpaca: a weight must be a finite number, not null"),
        (
            {"method": "ties", "weights": {"alpaca": 1}},
            "blend: a request can give weights, but no method (ties, ",
        ),
        ({"method": 1, "alpaca": 1}, "unknown adapter 'method'"),
        ([1], "blend must be a name or a mapping"),
        (1.5, "blend must be a name or a mapping"),
    ],
)
def test_the_error_for_a_wrong_blend_names_place_value_and_remedy(value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        BLENDS.resolve(value)
    assert message in str(caught.value)


weights = st.dictionaries(st.sampled_from(["alpaca", "pirate"]), st.floats(-2, 3))


@given(weights, weights)
def test_two_blends_have_equal_identities_if_and_only_if_their_nonzero_weights_are_equal(
    one: dict[str, float], two: dict[str, float]
) -> None:
    first, second = Blend(one, "a"), Blend(dict(reversed(two.items())), "b")
    same = {k: v for k, v in one.items() if v} == {k: v for k, v in two.items() if v}
    assert (first.identity("base", DIGESTS) == second.identity("base", DIGESTS)) == same


def test_identity_counts_content_and_base() -> None:
    blend = Blend({"alpaca": 1.0})
    identities = {
        blend.identity("base", DIGESTS),
        blend.identity("other", DIGESTS),
        blend.identity("base", DIGESTS | {"alpaca": "new content"}),
    }
    assert len(identities) == 3
    assert blend.identity("base", DIGESTS) == blend.identity("base", DIGESTS | {"pirate": "not in use"})
