"""What a decode step is filled with: every row's pages stand in its line, whatever stood there before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memphi.model.decode import Inputs
from memphi.model.rows import Row

ROWS, MOST_PAGES, PAGE_TOKENS = 4, 6, 4


def make_inputs():
    return Inputs(ROWS, MOST_PAGES, PAGE_TOKENS, torch.device("cpu"))


def row_of(*pages, past=None):
    return Row(1, len(pages) * PAGE_TOKENS - 1 if past is None else past, pages=pages)


def fill(inputs, *rows):
    """Fill rows in and check all that is read of the table."""
    inputs.fill(rows, [0] * len(rows), ROWS)
    for line, row in zip(inputs.table.tolist(), rows, strict=False):
        needed = row.past // PAGE_TOKENS + 1
        assert tuple(line[:needed]) == row.pages[:needed]


@pytest.mark.parametrize("between", ["nothing", "another width", "other rows", "fewer rows", "no rows"])
def test_rows_stand_where_they_stood_or_elsewhere(between):
    inputs = make_inputs()
    one, two, three = row_of(1, 2, 3), row_of(4, 5, past=6), row_of(7, 8, 9)
    fill(inputs, one, two, three)
    others = {
        "nothing": None,
        "another width": [two, row_of(1, 2, 3, 4)],
        "other rows": [row_of(11, 12, 13), row_of(14, 15, 16), row_of(17, 18, 19)],
        "fewer rows": [three],
        "no rows": [],
    }[between]
    if others is not None:
        fill(inputs, *others)
    for rows in ((one, two, three), (two, three), (three, two, one), (one, two, three)):
        fill(inputs, *rows)


def test_a_row_goes_on_upon_pages_that_it_had_in_advance():
    inputs, pages = make_inputs(), (1, 2, 3)
    for past in range(3 * PAGE_TOKENS):
        fill(inputs, Row(1, past, pages=pages), row_of(4, 5, 6))


def test_a_row_with_too_few_pages_is_refused_and_spoils_nothing():
    inputs, one, two = make_inputs(), row_of(1, 2), row_of(3, 4)
    fill(inputs, one, two)
    with pytest.raises(AssertionError, match="cannot hold"):
        fill(inputs, two, row_of(1, past=PAGE_TOKENS))
    fill(inputs, one, two)
    fill(inputs, two, one)


@given(st.data())
def test_any_rows_after_any_others(data):
    """Answers grow, take pages in advance, start over upon others, and stand in any order, some of them left out."""
    inputs, rows = make_inputs(), [row_of(place + 1) for place in range(ROWS)]
    for _ in range(data.draw(st.integers(1, 12))):
        for place, row in enumerate(rows):
            change = data.draw(st.sampled_from(["none", "grow", "start over"]))
            pages, past = row.pages, row.past
            if change == "grow" and past + 1 < MOST_PAGES * PAGE_TOKENS:
                past += 1
                room = MOST_PAGES - len(pages)
                if past == len(pages) * PAGE_TOKENS:
                    pages += tuple(data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=room)))
            elif change == "start over":
                pages = tuple(data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=MOST_PAGES)))
                past = data.draw(st.integers(0, len(pages) * PAGE_TOKENS - 1))
            rows[place] = Row(1, past, pages=pages)
        order = data.draw(st.permutations(range(ROWS)))[: data.draw(st.integers(0, ROWS))]
        fill(inputs, *[rows[place] for place in order])
