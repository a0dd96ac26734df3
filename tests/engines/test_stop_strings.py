"""Stop strings: found as by looking through the whole text, at a cost that no text and no string can drive up."""

from hypothesis import given
from hypothesis import strategies as st

from model_compose.engines.text import StopStrings, _Stop

few = st.text("ab", min_size=1, max_size=6)


@given(
    st.lists(few, min_size=1, max_size=4), st.lists(st.text("ab", max_size=3), max_size=12), st.text("ab", max_size=5)
)
def test_what_is_sent_is_the_text_before_the_first_stop_string(stops: list[str], pieces: list[str], ahead: str) -> None:
    """By the definition, over all that came so far: nothing of a stop string is sent, and nothing else is held back."""
    streamed, sent, text = StopStrings(stops), "", ""
    for number, piece in enumerate(pieces):
        tail = ahead if number == len(pieces) - 1 else ""
        ready, stopped = streamed.push(piece, lambda tail=tail: tail)  # type: ignore[misc]
        text, sent = text + piece, sent + ready
        found = [at for stop in stops if (at := (text + tail).find(stop)) >= 0]
        assert stopped == bool(found)
        if stopped:
            assert sent == (text + tail)[: min(found)]
            return
        held = max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))
        assert sent == text[: len(text) - held]
    assert sent + streamed.flush() == text


def test_a_string_that_repeats_itself_costs_no_more_than_its_length() -> None:
    class Counted(str):
        looked = 0

        def __getitem__(self, at: object) -> str:
            Counted.looked += 1
            return super().__getitem__(at)  # type: ignore[index]

    stop = _Stop(Counted("a" * 1023 + "b"))
    matched = 0
    for _ in range(5_000):
        matched, end = stop.follow("a", matched)
        assert end is None
    assert matched == 1023
    assert Counted.looked < 10 * 5_000
    assert stop.follow("b", matched)[1] == 1
