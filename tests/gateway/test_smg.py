"""The SMG gateway over two replicas: what a client gets through it, and what a replica's death costs."""

import pytest

from engine.serve.client import Client
from tests.gateway.scene import Clients, Smg

PROMPT = "def read(self, path):\n"
CHAT = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture
def replicas(make_replicas):
    return make_replicas((), ())


@pytest.fixture
def smg(programs, replicas, tmp_path):
    urls = [f"grpc://{replica.address}" for replica in replicas]
    gateway = Smg(programs, tmp_path / "smg.log", "--policy", "power_of_two", "--worker-urls", *urls)
    try:
        gateway.wait(healthy=2)
        yield gateway
    finally:
        gateway.kill()


@pytest.mark.slow
def test_a_client_of_the_gateway_reads_what_a_replica_draws_and_one_death_ends_only_its_own_streams(
    programs, replicas, smg
):
    """Real processes and a real gateway. Costs a minute; the first time up to five, for programs to compile."""
    options = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    asked = [("completion", options), ("chat", {"messages": CHAT, "max_tokens": 24, "temperature": 0})]
    answers = Clients(programs, smg.api, asked).end()
    with Client(replicas[0].address) as client:
        direct = [client.generate(prompt, max_tokens=24, temperature=0.0).text for prompt in (PROMPT, CHAT)]
    assert answers == [("ended", text) for text in direct] and all(direct)
    streams = [("completion", options | {"prompt": f"def f{k}(x):\n", "max_tokens": 200}) for k in range(6)]
    whole = Clients(programs, smg.api, streams).end()
    assert {word for word, _ in whole} == {"ended"} and min(replica.served() for replica in replicas) > 1
    running = Clients(programs, smg.api, streams)
    running.hear(6, "began")
    replicas[1].kill()
    cut = running.end()
    assert {word for word, _ in cut} == {"ended", "failed"}, "each replica had some"
    assert all(after == before for after, before in zip(cut, whole, strict=True) if after[0] == "ended")
    assert Clients(programs, smg.api, streams).end() == whole, "the other one serves them all, also at once"
    smg.wait(healthy=1)
