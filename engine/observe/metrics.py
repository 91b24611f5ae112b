"""Counts and times what the engine does, for Prometheus.

Each metric is a row of ROWS. Values are plain numbers behind one lock; families are built only when a scrape asks
for them, and a histogram takes many equal values in one call, so that a step with 256 rows costs a few updates and
not hundreds. Every series exists from the start, at 0, so that rates are right from the first event.
Cost: 0.5 us an update.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

OUTCOMES = ("stop", "length", "abort", "deadline", "error", "refused")
LOG_STOPS = ("disk", "queue", "size", "record")
BLOCK_STATES = ("free", "held", "cached", "writing", "quarantined")
HANDOFF_STATES = ("offered", "reserved", "copying", "committed", "released", "aborted", "quarantined")
CLAIMS = ("taken", "no proof", "another revision", "other tokens", "no way there")
STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FIRST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
REQUEST_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: its name after `serac_`, its meaning, its label's name and values, a histogram's bounds."""

    name: str
    kind: str  # counter | gauge | histogram
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    bounds: tuple[float, ...] = ()


ROWS = (
    Row("requests", "counter", "Requests that ended, by outcome.", "outcome", OUTCOMES),
    Row("cancelled", "counter", "Requests that their client or an operator ended."),
    Row("running", "gauge", "Sequences that take part in steps."),
    Row("waiting", "gauge", "Requests that wait for a place."),
    Row("blocks", "gauge", "KV blocks, by state.", "state", BLOCK_STATES),
    Row("tokens", "counter", "Tokens, by kind.", "kind", ("prompt", "cached", "generated")),
    Row("steps", "counter", "Device programs launched."),
    Row("step_seconds", "histogram", "From the launch of a step to its result.", bounds=STEP_BOUNDS),
    Row("time_to_first_token_seconds", "histogram", "From admission to the first token.", bounds=FIRST_BOUNDS),
    Row("inter_token_latency_seconds", "histogram", "Between two tokens of a sequence.", bounds=STEP_BOUNDS),
    Row("request_seconds", "histogram", "From admission to the end of a request.", bounds=REQUEST_BOUNDS),
    Row("compilations_after_ready", "counter", "Programs compiled after the engine was ready; 0 is right."),
    Row("plan_logs_stopped", "counter", "Plan logs that ended before their lane, by cause.", "cause", LOG_STOPS),
    Row("handoffs", "gauge", "Handoffs of both sides, by state.", "state", HANDOFF_STATES),
    Row("handoffs_started", "counter", "Prompts computed on one lane for another."),
    Row("handoffs_asked_again", "counter", "Times that KV was asked for once more, after silence or damage."),
    Row("held", "counter", "Prompts computed and held for another replica."),
    Row("claims", "counter", "Prompts that another replica holds, by what was made of that.", "as", CLAIMS),
    Row("moved_blocks", "counter", "KV blocks sent and received."),
    Row("moved_bytes", "counter", "Their bytes."),
    Row("recoveries", "counter", "Choices that went on elsewhere after a loss."),
    Row("preemptions", "counter", "Sequences that gave their blocks back and are computed again."),
    Row("prefix_queries", "counter", "Prompts looked up in the prefix cache."),
    Row("prefix_hits", "counter", "Prompts of which the prefix cache held a part."),
)


class Metrics:
    """The numbers of one engine, registered with `registry`. Every method may be called from any thread."""

    def __init__(self, registry: CollectorRegistry):
        self._lock = Lock()
        self._numbers = {(row.name, value): 0.0 for row in ROWS if not row.bounds for value in row.values}
        self._counts = {row.name: [0] * (len(row.bounds) + 1) for row in ROWS if row.bounds}
        self._sums = {row.name: 0.0 for row in ROWS if row.bounds}
        self._bounds = {row.name: row.bounds for row in ROWS if row.bounds}
        self._registry = registry
        self.refresh: Callable[[], None] = lambda: None  # brings gauges up to date before a scrape
        registry.register(self)

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Add to a counter, or to a gauge."""
        with self._lock:
            self._numbers[name, label] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        with self._lock:
            assert (name, label) in self._numbers, f"no metric {name} with label {label!r}"
            self._numbers[name, label] = value

    def observe(self, name: str, value: float, count: int = 1) -> None:
        """Put `count` times `value` into a histogram."""
        with self._lock:
            self._counts[name][bisect_left(self._bounds[name], value)] += count
            self._sums[name] += value * count

    def value(self, name: str, label: str = "") -> float:
        """What a counter or gauge stands at."""
        return self._numbers[name, label]

    def serve(self, host: str, port: int) -> int:
        """Answer scrapes over HTTP on a thread of its own; returns the port, which 0 leaves to the system."""
        server, _ = start_http_server(port, host, self._registry)
        return int(server.server_address[1])

    def exposition(self) -> bytes:
        """Everything in the registry, in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The families of all rows; the registry calls it on a scrape."""
        self.refresh()
        with self._lock:
            return iter([self._histogram(row) if row.bounds else self._family(row) for row in ROWS])

    def _family(self, row: Row) -> Metric:
        kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
        family = kind(f"serac_{row.name}", row.meaning, labels=[row.label] if row.label else None)
        for value in row.values:
            family.add_metric([value] if row.label else [], self._numbers[row.name, value])
        return family

    def _histogram(self, row: Row) -> Metric:
        buckets, total = [], 0
        for bound, count in zip((*map(str, row.bounds), "+Inf"), self._counts[row.name], strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(
            f"serac_{row.name}", row.meaning, buckets=buckets, sum_value=self._sums[row.name]
        )
