"""What Prometheus reads: the engines' counters and what the server itself sees, in a registry of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily as Count
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from memphi.engine.facade import DeviceEngine
from memphi.engine.stats import Stats

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
ANSWER_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Family = type[Gauge] | type[Count]
NUMBERS: tuple[tuple[Family, str, str, Callable[[Stats], int]], ...] = (
    (Gauge, "memphi_queue", "Requests that the engine has not let in yet, or has paused.", lambda s: s.waiting),
    (Gauge, "memphi_running", "Requests that the engine has let in.", lambda s: max(s.open - s.waiting, 0)),
    (Gauge, "memphi_pool_mapped_bytes", "Memory behind the pages of keys and values.", lambda s: s.mapped_bytes),
    (Count, "memphi_steps", "Steps of the engine.", lambda s: s.steps),
    (Count, "memphi_prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens),
    (Count, "memphi_shared_tokens", "Prompt tokens found in the cache of pages.", lambda s: s.shared_tokens),
    (Count, "memphi_shared_media", "Attachments found in the cache of embeddings.", lambda s: s.shared_media),
    (Count, "memphi_answer_tokens", "Tokens of answers.", lambda s: s.answer_tokens),
    (Count, "memphi_drafted_tokens", "Guesses of answers' next tokens.", lambda s: s.drafted_tokens),
    (Count, "memphi_accepted_tokens", "Guesses that were right.", lambda s: s.accepted_tokens),
    (Count, "memphi_encoded_units", "Crops and windows of sound encoded.", lambda s: s.encoded_units),
    (Count, "memphi_pauses", "Requests paused for want of memory.", lambda s: s.pauses),
)
"""What is one number of an engine."""
TABLES: tuple[tuple[Family, str, str, str, Callable[[Stats], Mapping[str, int]]], ...] = (
    (Gauge, "memphi_memory_bytes", "Memory held, by account.", "account", lambda s: s.accounts),
    (Count, "memphi_rungs", "Moves under memory pressure.", "rung", lambda s: s.rungs),
    (Count, "memphi_ended", "Requests by how the engine ended them.", "reason", lambda s: s.ended),
)
"""What is several, by a label."""


class Metrics:
    """Everything that is counted about one server."""

    def __init__(self, engines: Callable[[], Sequence[DeviceEngine]], open_answers: Callable[[], int]) -> None:
        """Both are asked whenever somebody reads."""
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engines, open_answers))
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
    """The engines' own counters, read when they are asked for; of several, each under its device's name."""

    def __init__(self, engines: Callable[[], Sequence[DeviceEngine]], open_answers: Callable[[], int]) -> None:
        self._engines = engines
        self._open_answers = open_answers

    def collect(self) -> Iterator[Metric]:
        yield Gauge("memphi_answers_open", "Answers that the server waits for.", self._open_answers())
        engines = self._engines()
        labels = ["device"] if len(engines) > 1 else []
        counted = [([engine.device][: len(labels)], engine.stats) for engine in engines] or [([], Stats())]
        for family, name, meaning, read in NUMBERS:
            metric = family(name, meaning, labels=labels)
            for device, stats in counted:
                metric.add_metric(device, read(stats))
            yield metric
        for family, name, meaning, label, read_all in TABLES:
            metric = family(name, meaning, labels=[*labels, label])
            for device, stats in counted:
                for key, value in dict(read_all(stats)).items():
                    metric.add_metric([*device, key], value)
            yield metric
