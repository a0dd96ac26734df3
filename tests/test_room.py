"""Places in an engine: counted once for each text, promised to whoever was let in, and given back by whoever leaves."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_compose.errors import Overloaded
from model_compose.room import Admission, Room


def test_a_place_counts_as_one_text_until_it_has_texts() -> None:
    room = Room(1, 3)
    place = room.take()
    assert (room.texts, room.promised) == (1, 1)
    with place.hold(1):
        assert (room.texts, room.promised) == (1, 0)
        with place.hold(2):
            assert (room.texts, room.promised) == (3, 0)
        assert (room.texts, room.promised) == (1, 0)
    assert (room.texts, room.promised) == (1, 1)
    place.give_back()
    place.give_back()
    assert (room.texts, room.promised) == (0, 0)


def test_who_was_let_in_is_not_refused_and_others_are() -> None:
    room = Room(1, 1)
    first, second = room.take(), room.take()
    with pytest.raises(Overloaded, match=r"2 texts run or wait already \(max_batch_size 1, max_queue 1\)"):
        room.take()
    with pytest.raises(Overloaded), room.hold(1):
        pass
    with room.hold(4, first):
        assert room.texts == 5
    second.give_back()
    with room.hold(1):
        assert room.texts == 2
    assert room.texts == 1


def test_a_place_given_back_counts_the_texts_that_are_still_there() -> None:
    room = Room(1, 1)
    place = room.take()
    with place.hold(2):
        place.give_back()
        assert (room.texts, room.promised) == (2, 0)
    assert (room.texts, room.promised) == (0, 0)


def test_a_run_has_its_places_in_all_rooms_or_in_none() -> None:
    free, full = Room(1, 1), Room(1, 0)
    with Admission({"free": free.take, "full": full.take}) as admission:
        assert (free.texts, full.texts) == (1, 1)
        with pytest.raises(Overloaded):
            Admission({"free": free.take, "full": full.take})
        assert (free.texts, full.texts) == (1, 1)
        admission.give_back()
    assert (free.texts, full.texts, free.promised) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["hold", "leave", "give back"]), st.integers(1, 4))))
def test_the_counts_are_those_of_the_places(events: list[tuple[int, str, int]]) -> None:
    room = Room(3, 0)
    places = [room.take() for _ in range(3)]
    held: list[list[tuple[int, ExitStack]]] = [[] for _ in places]
    kept = [True] * len(places)
    for number, what, texts in events:
        if what == "hold":
            stack = ExitStack()
            stack.enter_context(places[number].hold(texts))
            held[number].append((texts, stack))
        elif what == "leave" and held[number]:
            held[number].pop(texts % len(held[number]))[1].close()
        elif what == "give back":
            places[number].give_back()
            kept[number] = False
        counts = [sum(texts for texts, _ in of_place) for of_place in held]
        assert room.texts == sum(count or int(keeps) for count, keeps in zip(counts, kept, strict=True))
        assert room.promised == sum(keeps and not count for count, keeps in zip(counts, kept, strict=True))
