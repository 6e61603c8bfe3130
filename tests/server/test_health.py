"""How a server tells how it is: loading, ready, draining; its counters; its memory."""

import threading

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from memphi.errors import CheckpointError
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.server.conftest import ask, refused, wait_for
from tests.server.fakes import FakeEngine, said


def serving(engine):
    return TestClient(make_app(engine, ServerSettings("demo")), base_url="http://localhost")


def test_a_server_that_loads_says_so_until_it_is_ready():
    go_on = threading.Event()
    closed = []

    class Loaded(FakeEngine):
        def close(self):
            closed.append(True)

    def load(progress):
        progress(1, 4)
        go_on.wait(10)
        return Loaded()

    with serving(load) as client:
        wait_for(lambda: client.get("/health").json()["loaded_bytes"] == 1)
        health = client.get("/health")
        assert health.status_code == 503
        assert health.headers["Retry-After"]
        assert health.json() == {
            "live": True,
            "ready": False,
            "state": "loading",
            "loaded_bytes": 1,
            "total_bytes": 4,
        }
        assert "is being loaded" in refused(ask(client), 503)
        assert "is being loaded" in refused(client.get("/v1/models"), 503)
        assert client.get("/metrics").status_code == 200
        go_on.set()
        wait_for(lambda: client.get("/health").status_code == 200)
        assert client.get("/health").json()["state"] == "ready"
        assert ask(client).status_code == 200
    assert closed == [True], "what the server has loaded it closes"


def test_an_engine_that_is_loaded_after_the_servers_end_is_closed(fake, monkeypatch):
    go_on, closed = threading.Event(), threading.Event()
    monkeypatch.setattr(fake, "close", closed.set)

    def load(progress):
        go_on.wait()
        return fake

    with serving(load) as client:
        assert client.get("/health").json()["state"] == "loading"
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(60)


def test_a_fault_of_the_servers_own_has_the_usual_shape_and_the_next_request_works(fake):
    app = make_app(fake, ServerSettings("demo"))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        fake.worker.say = lambda request: [ZeroDivisionError("a secret")]
        answer = ask(client)
        assert "its log says" in refused(answer, 500)
        assert "secret" not in answer.text
        fake.worker.say = lambda request: said("It goes on.")
        assert ask(client).json()["choices"][0]["message"]["content"] == "It goes on."


def test_a_server_whose_model_cannot_be_loaded_says_why_and_ends():
    ended = threading.Event()
    error = CheckpointError("there is no such model")

    def load(progress):
        raise error

    app = make_app(load, ServerSettings("demo"))
    app.state.service.on_failure = ended.set
    with TestClient(app, base_url="http://localhost") as client:
        assert ended.wait(10)
        assert client.get("/health").json()["state"] == "failed"
        assert refused(ask(client), 503)
    assert app.state.service.failure is error


def test_a_server_that_drains_is_not_ready_but_shows_its_memory(client):
    client.app.state.service.draining = True
    assert client.get("/health").json()["state"] == "draining"
    assert client.get("/health").status_code == 503
    assert client.get("/memory").status_code == 200


def samples(client):
    """Every sample by its name and its labels' values."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_tell_what_the_engine_and_the_server_have_done(client, fake):
    stats = fake.stats
    stats.steps, stats.waiting, stats.open, stats.shared_tokens, stats.shared_media = 5, 2, 3, 7, 1
    stats.accounts = {"weights": 100, "pages": 20}
    stats.rungs["halve"] += 1
    ask(client)
    ask(client, foo=1)
    ask(client, stream=True, n=2)
    client.get("/nothing/there")
    told = samples(client)
    expected = {
        ("memphi_steps_total",): 5,
        ("memphi_queue",): 2,
        ("memphi_running",): 1,
        ("memphi_shared_tokens_total",): 7,
        ("memphi_shared_media_total",): 1,
        ("memphi_memory_bytes", "weights"): 100,
        ("memphi_memory_bytes", "pages"): 20,
        ("memphi_rungs_total", "halve"): 1,
        ("memphi_answers_open",): 0,
        ("memphi_first_token_seconds_count",): 3,
        ("memphi_token_seconds_count",): 3,
        ("memphi_answer_seconds_count",): 3,
        ("memphi_http_requests_total", "/v1/chat/completions", "200"): 2,
        ("memphi_http_requests_total", "/v1/chat/completions", "400"): 1,
    }
    assert {name: told.get(name) for name in expected} == expected
    assert ("memphi_http_requests_total", "none", "404") in told, "unknown paths share one label"


def test_two_servers_count_by_themselves(fake):
    with serving(fake) as first, serving(FakeEngine()) as second:
        ask(first)
        assert samples(second)[("memphi_answer_seconds_count",)] == 0


def test_memory_is_the_budgets_ledger(client, fake):
    fake.stats.accounts = {"weights": 100}
    fake.stats.mapped_bytes = 5
    told = client.get("/memory").json()
    assert told["accounts"] == {"weights": 100}
    assert told["mapped_bytes"] == 5
    assert told["plan"]["budget_bytes"] == fake.plan.budget_bytes
    assert told["plan"]["reasons"] == fake.plan.reasons
    assert 0 < told["host"]["free_bytes"] <= told["host"]["total_bytes"]


def test_the_document_of_the_api_names_every_route(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/tokenize", "/health"} <= set(
        document["paths"]
    )
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], f"{method} {path} has no such status"
            assert "4XX" in operation["responses"]
