"""Which ways KV takes is what was asked for, or an error that says what to do."""

import sys

import pytest

from engine.errors import ConfigError
from engine.movers import choice
from engine.movers.choice import Ways, check, choose
from engine.movers.links import Limits

HERE = ["127.0.0.1:0", "unix:/run/serac/d0.sock"]
AWAY = ["127.0.0.1:0", "10.0.0.1:0"]


def test_by_default_memory_within_a_host_and_no_library():
    assert choose("auto", AWAY) == Ways(Limits(), None)


def test_sockets_share_no_memory():
    ways = choose("sockets", HERE)
    assert ways.limits.shared_bytes == 0 and ways.mover is None


def test_a_library_that_was_asked_for_and_is_missing_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="--kv-mover: got 'nixl'.*pip install --no-deps nixl nixl-cu12") as found:
        choose("nixl", HERE)
    assert found.value.field == "kv_mover"
    with pytest.raises(ConfigError, match="pip install"):
        check("nixl")
    check("auto")


@pytest.fixture
def made(monkeypatch):
    """What each agent was made with, instead of making it."""
    found = []
    monkeypatch.setattr(choice, "Nixl", lambda **more: found.append(more) or "an agent")
    return found


def test_within_a_host_the_library_reaches_no_further(made):
    assert choose("nixl", HERE).mover == "an agent" and choose("nixl", HERE, trusted=True)
    assert made == [{"devices": "lo"}] * 2


def test_between_hosts_the_network_must_be_trusted(made):
    with pytest.raises(ConfigError, match="--trusted-network"):
        choose("nixl", AWAY)
    assert not made
    assert choose("nixl", AWAY, trusted=True).mover == "an agent" and made == [{"devices": ""}]
