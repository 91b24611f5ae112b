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
    ticks = itertools.accumulate(itertools.cycle([1.0, 3.0, 1.0, 0.5]))
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(ticks))
    assert pairs(int, int, 5) == {"gather ms": 3000, "list ms": 500, "ratio": 6}
