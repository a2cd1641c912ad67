"""What a running service counts, and the form in which Prometheus reads it.

Every service has its own: nothing is global. What happens is counted here when it happens; what can be looked up (the
ledger, the lanes, the nodes) is looked up when Prometheus asks, and given to `render`. Figures are floats, as Prometheus
has nothing else: they are a picture of money, never its books.

Source: https://prometheus.io/docs/instrumenting/exposition_formats and /docs/practices/naming
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "Metric", "Metrics", "Samples", "counter", "gauge", "histogram"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
CREDITS = "in credit units, of which 10^12 are a USD"

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_CALL = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SETTLEMENT = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 900, 3600)

Samples = Mapping[tuple[str, ...], float]
"""Values by the values of the labels, in their order."""


class Metrics:
    """What one service has counted since it started."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"waterfall_{name}", text, labels, registry=registry)

        def spread(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"waterfall_{name}", text, labels, buckets=buckets, registry=registry)

        self.http_requests = count(
            "http_requests", "Requests by route, method and status.", "route", "method", "status"
        )
        self.http_seconds = spread(
            "http_request_seconds", "Time from a request to the last byte of its answer.", _CALL, "route"
        )
        self.upstream_requests = count(
            "upstream_requests", "Calls to providers, by how they ended.", "upstream", "outcome"
        )
        self.upstream_seconds = spread(
            "upstream_seconds", "Time until a provider began to answer.", _CALL, "upstream"
        )
        self.captured = count("charges_captured", "Charges captured by this process.")
        self.captured_credits = count("captured_credits", f"What they amount to, {CREDITS}.")
        self.inclusion_seconds = spread(
            "capture_to_inclusion_seconds",
            "Time from a charge's capture until its block was read, as the process saw it that reads blocks.",
            _SETTLEMENT,
        )
        self.finalized = count(
            "charges_finalized", "Charges that have become final, in the process that reads blocks."
        )
        self.rejected = count(
            "charges_rejected", "Rejections of charges by the vault; a charge may have several.", "reason"
        )
        self.broadcasts = count(
            "broadcasts",
            "Transactions given to the nodes, by what they said: accepted, refused with a reason, or unknown.",
            *("lane", "outcome", "reason"),
        )
        self.slots_closed = count(
            "slots_closed", "Transactions mined, by lane, purpose and result.", "lane", "purpose", "result"
        )
        self.slot_attempts = spread(
            "slot_attempts", "Attempts that a transaction took to be mined.", (1, 2, 3, 4, 6, 8, 12), "lane"
        )
        self.part_failures = count(
            "part_failures", "Steps of the relayer that failed and are tried again.", "part", "error"
        )
        self.commit_seconds = spread("ledger_commit_seconds", "Time a commit of the ledger takes.", _FAST)
        self.commit_operations = spread(
            "ledger_commit_operations",
            "Operations that share a commit of the ledger.",
            (1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self.commit_failures = count("ledger_commit_failures", "Commits that the database did not take.")

    def render(self, families: Iterable[Metric] = ()) -> bytes:
        """Everything in Prometheus's text format, with what was looked up."""
        return generate_latest(_Together(lambda: [*self._registry.collect(), *families]))


class _Together(Collector):
    """Without the `_created` samples, which nothing uses and which double the answer."""

    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def gauge(name: str, text: str, value: float | Samples | None, labels: Sequence[str] = ()) -> Metric:
    """What a value is now; None: not known, so nothing is said of it."""
    family = GaugeMetricFamily(f"waterfall_{name}", text, labels=labels)
    return _filled(family, value)


def counter(name: str, text: str, value: float | Samples, labels: Sequence[str] = ()) -> Metric:
    """What was counted elsewhere since the start of this process."""
    return _filled(CounterMetricFamily(f"waterfall_{name}", text, labels=labels), value)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, value: float | Samples | None
) -> GaugeMetricFamily | CounterMetricFamily:
    if isinstance(value, Mapping):
        for labels, one in value.items():
            family.add_metric(labels, one)
    elif value is not None:
        family.add_metric((), value)
    return family


def histogram(
    name: str,
    text: str,
    bounds: Sequence[float],
    values: Mapping[tuple[str, ...], tuple[Sequence[int], float]],
    labels: Sequence[str],
) -> Metric:
    """What was measured elsewhere: by the labels' values, how many fell into each bucket, and the sum of all.

    Args:
        name: without the prefix.
        text: what it is.
        bounds: the upper bound of each bucket, except for the last, which has none.
        values: not cumulated.
        labels: their names.
    """
    family = HistogramMetricFamily(f"waterfall_{name}", text, labels=labels)
    for its, (counts, total) in values.items():
        reached, buckets = 0, []
        for bound, count in zip((*map(float, bounds), float("inf")), counts, strict=True):
            reached += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(reached)))
        family.add_metric(its, buckets, total)
    return family
