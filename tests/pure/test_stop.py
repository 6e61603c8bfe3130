"""Stop strings end an answer before them, however the text arrives in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from memphi.sampling.stop import StopStrings

letters = st.text(alphabet="ab<|", max_size=30)


def run(pieces, stops):
    stop = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stop.feed(piece)
        if stop.stopped:
            return shown
    return shown + stop.flush()


@given(st.lists(letters, max_size=10), st.lists(st.text(alphabet="ab<|", min_size=1, max_size=4), max_size=3))
def test_pieces_do_not_matter_and_no_stop_string_is_shown(pieces, stops):
    shown, whole = run(pieces, stops), "".join(pieces)
    assert whole.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not any(stop in whole for stop in stops):
        assert shown == whole


def test_held_text_is_shown_once_it_cannot_begin_a_stop_string():
    stop = StopStrings(["END"])
    assert [stop.feed(piece) for piece in ("a E", "N", "T b")] == ["a ", "", "ENT b"]
    assert not stop.stopped


def test_the_earliest_stop_string_wins():
    assert run(["one two three"], ["three", "two"]) == "one "
