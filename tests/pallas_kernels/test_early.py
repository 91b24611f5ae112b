"""Work that is begun early is done once, in order, and its errors are told where it is asked for."""

import os
from types import SimpleNamespace

import pytest

from tests.pallas_kernels.early import NICE, begin, result


@pytest.fixture
def config():
    return SimpleNamespace(stash={})


def test_jobs_run_in_order_at_low_priority_and_once(config):
    mine, seen = os.nice(0), []
    begin(config, {name: lambda name=name: seen.append(name) or os.nice(0) for name in "ab"})
    assert result(config, "b", pytest.fail) == min(mine + NICE, 19)
    assert seen == ["a", "b"] and result(config, "a", pytest.fail) == min(mine + NICE, 19)
    assert os.nice(0) == mine


def test_what_was_not_begun_is_done_when_it_is_asked_for(config):
    assert result(config, "a", lambda: 3) == 3


@pytest.mark.parametrize("error", [ValueError("odd"), pytest.skip.Exception("no index")])
def test_an_error_or_a_skip_comes_where_it_is_asked_for(config, error):
    def job():
        raise error

    begin(config, {"a": job, "b": lambda: 4})
    with pytest.raises(type(error), match=str(error)):
        result(config, "a", pytest.fail)
    assert result(config, "b", pytest.fail) == 4
