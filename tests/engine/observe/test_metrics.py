from threading import Thread

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from engine.observe.metrics import ROWS, STEP_BOUNDS, Metrics


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_series_exists_from_the_start_at_zero(metrics):
    found = samples(metrics)
    assert set(found.values()) == {0.0}
    assert {name.removeprefix("serac_").removesuffix("_total").removesuffix("_sum") for name, _ in found} >= {
        row.name for row in ROWS
    }


def test_counters_and_gauges_are_told_by_their_label(metrics):
    metrics.add("requests", label="stop")
    metrics.add("requests", 2, label="refused")
    metrics.set("blocks", 7, label="free")
    metrics.set("running", 3)
    found = samples(metrics)
    assert found["serac_requests_total", "stop"] == 1 and found["serac_requests_total", "refused"] == 2
    assert found["serac_blocks", "free"] == 7 and found["serac_running", ""] == 3
    assert metrics.value("requests", "refused") == 2


def test_a_histogram_takes_many_equal_values_at_once(metrics):
    metrics.observe("inter_token_latency_seconds", 0.004, count=256)
    metrics.observe("inter_token_latency_seconds", 99.0)
    found = samples(metrics)
    assert found["serac_inter_token_latency_seconds_bucket", "0.0025"] == 0
    assert found["serac_inter_token_latency_seconds_bucket", "0.005"] == 256
    assert found["serac_inter_token_latency_seconds_bucket", "10.0"] == 256
    assert found["serac_inter_token_latency_seconds_bucket", "+Inf"] == 257
    assert found["serac_inter_token_latency_seconds_count", ""] == 257
    assert found["serac_inter_token_latency_seconds_sum", ""] == pytest.approx(256 * 0.004 + 99)


def test_a_value_on_a_bound_counts_below_it(metrics):
    metrics.observe("step_seconds", STEP_BOUNDS[0])
    assert samples(metrics)["serac_step_seconds_bucket", str(STEP_BOUNDS[0])] == 1


def test_a_name_or_label_that_no_row_has_is_a_bug(metrics):
    with pytest.raises(KeyError):
        metrics.add("request")
    with pytest.raises(KeyError):
        metrics.add("requests", label="prompt text")
    with pytest.raises(AssertionError, match="no metric blocks"):
        metrics.set("blocks", 1, label="lost")


def test_threads_lose_no_count(metrics):
    threads = [Thread(target=lambda: [metrics.add("steps") for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("steps") == 20_000
