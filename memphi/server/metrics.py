"""What Prometheus reads: the engine's counters and what the server itself sees, in a registry of its own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from memphi.engine.stats import Stats

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
ANSWER_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Everything that is counted about one server."""

    def __init__(self, stats: Callable[[], Stats], open_answers: Callable[[], int]) -> None:
        """Both are asked whenever somebody reads."""
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(stats, open_answers))
        self._responses = Counter(
            "memphi_http_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._first_token = self._histogram(
            "memphi_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self._token = self._histogram(
            "memphi_token_seconds", "Between tokens of one answer, on average.", TOKEN_BUCKETS
        )
        self._answer = self._histogram(
            "memphi_answer_seconds", "From a request's arrival to its answer's end.", ANSWER_BUCKETS
        )

    def note_response(self, route: str, status: int) -> None:
        """A request got a response, or would have."""
        self._responses.labels(route, str(status)).inc()

    def note_answer(self, first_token_seconds: float, seconds: float, tokens: int) -> None:
        """An answer has ended by itself."""
        self._first_token.observe(first_token_seconds)
        self._answer.observe(seconds)
        if tokens > 1:
            self._token.observe((seconds - first_token_seconds) / (tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self._registry)


class EngineCollector(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats], open_answers: Callable[[], int]) -> None:
        self._stats = stats
        self._open_answers = open_answers

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield _gauge("memphi_answers_open", "Answers that the server waits for.", self._open_answers())
        yield _gauge("memphi_queue", "Requests that the engine has not let in yet, or has paused.", stats.waiting)
        yield _gauge("memphi_running", "Requests that the engine has let in.", max(stats.open - stats.waiting, 0))
        yield _gauge("memphi_pool_mapped_bytes", "Memory behind the pages of keys and values.", stats.mapped_bytes)
        yield _gauges("memphi_memory_bytes", "Memory held, by account.", "account", stats.accounts)
        yield _counter("memphi_steps", "Steps of the engine.", stats.steps)
        yield _counter("memphi_prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield _counter("memphi_shared_tokens", "Prompt tokens found in the cache of pages.", stats.shared_tokens)
        yield _counter("memphi_shared_media", "Attachments found in the cache of embeddings.", stats.shared_media)
        yield _counter("memphi_answer_tokens", "Tokens of answers.", stats.answer_tokens)
        yield _counter("memphi_drafted_tokens", "Guesses of answers' next tokens.", stats.drafted_tokens)
        yield _counter("memphi_accepted_tokens", "Guesses that were right.", stats.accepted_tokens)
        yield _counter("memphi_encoded_units", "Crops and windows of sound encoded.", stats.encoded_units)
        yield _counter("memphi_pauses", "Requests paused for want of memory.", stats.pauses)
        yield _counters("memphi_rungs", "Moves under memory pressure.", "rung", stats.rungs)
        yield _counters("memphi_ended", "Requests by how the engine ended them.", "reason", stats.ended)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value)


def _gauges(name: str, meaning: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for key, value in dict(values).items():
        family.add_metric([key], value)
    return family


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(name, meaning, value)


def _counters(name: str, meaning: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=[label])
    for key, value in dict(values).items():
        family.add_metric([key], value)
    return family
