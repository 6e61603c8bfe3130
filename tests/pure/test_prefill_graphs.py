"""Which steps of prompts are for a graph: what is accepted fits into it."""

from hypothesis import given
from hypothesis import strategies as st

from memphi.config import ModelConfig
from memphi.demo.shape import demo_config
from memphi.memory import costs
from memphi.memory.costs import graphed

mosts = st.integers(1, 32).map(lambda number: number * costs.LEAST_PREFILL_TOKENS)
rows_of = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 20000)), min_size=1, max_size=80)


@given(st.integers(1, 2048), mosts)
def test_a_size_holds_the_tokens_and_few_more(tokens, most):
    size = graphed.prefill_bucket(tokens, most)
    assert size % costs.LEAST_PREFILL_TOKENS == 0
    if tokens <= most:
        assert tokens <= size <= most
        assert size <= max(1.5 * tokens, tokens + costs.LEAST_PREFILL_TOKENS)
        assert size == graphed.prefill_bucket(size, most)
    else:
        assert size == most


@given(mosts)
def test_as_many_graphs_as_there_are_sizes_of_every_kind(most):
    sizes = {graphed.prefill_bucket(tokens, most) for tokens in range(1, most + 1)}
    assert graphed.most_prefills(most) == graphed.PREFILL_KINDS * len(sizes) <= 30


@given(rows_of, mosts)
def test_rows_that_are_taken_have_room(rows, most):
    if not costs.prefill_size(rows, most):
        return
    tokens = sum(new for new, _ in rows)
    size = graphed.prefill_bucket(tokens, most)
    lines = sum(-(-new // costs.PREFILL_LINE_TOKENS) for new, _ in rows)
    assert tokens <= size
    assert lines <= costs.prefill_lines(size)
    assert max(new + past for new, past in rows) <= costs.PREFILL_ROW_TOKENS


@given(st.integers(1, 700), st.integers(0, 20000))
def test_keys_are_those_up_to_the_end_of_each_line(new, past):
    ends = range(past + new, past, -costs.PREFILL_LINE_TOKENS)
    assert graphed._line_keys(new, past) == sum(ends)


def test_what_is_too_much_is_not_taken():
    assert costs.prefill_size([(500, 0)], 2048) == 512
    assert not costs.prefill_size([(500, 0)], 448)
    assert not costs.prefill_size([(1, 0)], 0)
    assert not costs.prefill_size([(100, costs.PREFILL_ROW_TOKENS)], 2048)
    assert not costs.prefill_size([(2, 0)] * 20, 2048)  # Their graph of 64 tokens takes 8 rows.
    assert costs.prefill_size([(40, 0)] * 20, 2048)
    assert not costs.prefill_size([(600, 15000)], 2048)  # Too many keys, all in all.


@given(st.integers(2049, 8192))
def test_pieces_take_any_rows_and_leave_little_idle(tokens):
    size = costs.prefill_size([(tokens - 9, 0), (9, 30000)], 8192)
    assert costs.is_in_pieces(size)
    assert tokens <= size < tokens + graphed.PIECES_STEP
    assert not costs.prefill_lines(size)
    assert costs.most_held(size, 8192) == graphed.PIECES_HELD
    assert costs.most_held(64, 8192) == graphed.most_prefills(8192) == graphed.most_prefills(2048)


def test_pieces_are_for_products_that_a_card_is_soon_done_with():
    for scheme in ("fp8", "int8"):
        assert costs.most_graph_tokens(scheme, (9, 0)) == 8192
        assert all(costs.most_graph_tokens(scheme, on) == 2048 for on in (None, (8, 0), (8, 9), (12, 0)))
    assert all(costs.most_graph_tokens(scheme, (9, 0)) == 2048 for scheme in ("bf16", "int4"))
    assert not costs.prefill_size([(2049, 0)], 2048)
    assert costs.prefill_size([(8192, 0)], 8192) == 8192
    assert costs.prefill_size([(4000, 0)], 4032) == 4032
    assert not costs.prefill_size([], 8192)


@given(st.integers(1, 128).map(lambda number: number * costs.LEAST_PREFILL_TOKENS))
def test_more_tokens_are_never_cheaper(most):
    config: ModelConfig = demo_config()
    smaller, larger = (
        costs.prefill_graphs(config, tokens, 2, "packed", "plain").bytes
        for tokens in (most, most + costs.LEAST_PREFILL_TOKENS)
    )
    assert smaller < larger
