import itertools

import numpy as np
import pytest

from bench import attention
from bench.attention import gather_everything, pairs, scene, work_list


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_give_the_same(dtype):
    arrays = scene([200, 1, 17], dtype)
    np.testing.assert_allclose(gather_everything(*arrays), work_list(*arrays), atol=2e-6)


def test_a_ratio_is_that_of_neighbours_in_time(monkeypatch):
    ticks = itertools.accumulate(itertools.cycle([1.0, 24.0, 1.0, 4.0]))
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(ticks))
    calls = []
    figures = pairs(lambda: calls.append("gather"), lambda: calls.append("list"), 2)
    assert figures == {"gather ms": 3000, "list ms": 500, "ratio": 6}
    assert calls == 2 * (8 * ["gather"] + 8 * ["list"])
