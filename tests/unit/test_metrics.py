import pytest
from scrape import samples

from waterfall.metrics import Metrics, counter, gauge, histogram


def read(metrics, *families):
    return samples(metrics.render(families).decode())


def test_metrics__of_two_services__are_apart():
    one, other = Metrics(), Metrics()
    one.captured.inc()
    assert read(one)["waterfall_charges_captured_total",] == 1
    assert read(other)["waterfall_charges_captured_total",] == 0


def test_render__what_was_looked_up__stands_beside_what_was_counted():
    metrics = Metrics()
    metrics.broadcasts.labels("settle 0x1", "refused", "underpriced").inc(2)
    seen = read(
        metrics,
        gauge("depth", "How deep.", {("a", "b"): 3}, ("x", "y")),
        gauge("unknown", "Not known.", None),
        gauge("height", "How high.", 1.5),
        counter("turns", "How often.", 7),
    )
    assert seen["waterfall_broadcasts_total", "settle 0x1", "refused", "underpriced"] == 2
    assert seen["waterfall_depth", "a", "b"] == 3
    assert seen["waterfall_height",] == 1.5
    assert seen["waterfall_turns_total",] == 7
    assert not any(name.startswith("waterfall_unknown") for name, *_ in seen)
    assert not any(name.endswith("_created") for name, *_ in seen)
    assert ("process_resident_memory_bytes",) in seen


def test_render__credits_beyond_any_integer_column__are_shown():
    metrics = Metrics()
    metrics.captured_credits.inc(20_000_000 * 10**12)
    assert read(metrics)["waterfall_captured_credits_total",] == 2e19


def test_histogram__counts_of_buckets__are_cumulated():
    seen = read(Metrics(), histogram("wait", "How long.", (0.1, 1), {("n",): ([2, 3, 4], 12.5)}, ("node",)))
    assert [seen["waterfall_wait_bucket", le, "n"] for le in ("0.1", "1.0", "+Inf")] == [2, 5, 9]
    assert (seen["waterfall_wait_count", "n"], seen["waterfall_wait_sum", "n"]) == (9, 12.5)


def test_histogram__a_bucket_missing__is_a_mistake():
    with pytest.raises(ValueError, match="shorter"):
        histogram("wait", "How long.", (0.1, 1), {("n",): ([2, 3], 1.0)}, ("node",))
