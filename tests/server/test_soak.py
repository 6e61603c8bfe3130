"""Short runs of the server's benchmarks; `python -m benchmarks.server_soak` and `server_overhead` are the long ones."""

from benchmarks.server_overhead import Endless, Sizes, fast_engine, fetch, listening, take
from benchmarks.server_soak import Load, soak
from memphi import load
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings


def test_clients_that_leave_and_memory_that_runs_out_change_no_answer():
    figures = soak(1, Load(requests=80, clients=12, faults=15, cancels=8), lambda line: None, one_in=4)
    assert figures["requests"] >= 80
    assert sum(figures["faults"].values()) >= 15
    assert sum(figures["left"].values()) >= 8
    assert figures["ended"]["whole"] > 10
    assert figures["ended"]["streamed"] > 10
    heard = sum(figures["ended"].values()) + sum(figures["left"].values()) + sum(figures["refused"].values())
    assert heard == figures["requests"]


def test_streams_bring_every_token_directly_and_over_http():
    engine, sizes = Endless(fast_engine(4)), Sizes(streams=4, tokens=8, rounds=1, repeats=1)
    with listening(make_app(engine, ServerSettings("model"))) as port:
        assert take(engine, sizes).tokens == fetch(port.url, sizes).tokens == 32


def test_streams_that_ask_again_get_answers_of_different_lengths():
    sizes = Sizes(streams=3, tokens=8, rounds=3, repeats=1)
    lengths = [sizes.answers(stream) for stream in range(3)]
    assert len({length for own in lengths for length in own}) > 4
    engine = Endless(load("demo", device="cpu"))
    with listening(make_app(engine, ServerSettings("model"))) as port:
        assert take(engine, sizes).tokens == fetch(port.url, sizes).tokens == sum(map(sum, lengths))
    engine.close()
