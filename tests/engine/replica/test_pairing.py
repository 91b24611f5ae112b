"""What one replica tells another of a prompt that it holds, and what of it the other believes."""

import json
from types import SimpleNamespace

import pytest

from engine.core.holds import FIRST, Claim
from engine.core.membership import Hello
from engine.errors import InvalidArgument
from engine.observe.metrics import CLAIMS
from engine.replica.pairing import Pairing

CLAIM = Claim("b0.3fa9", FIRST + 7, bytes(range(16)), ("127.0.0.1:7", "unix:/tmp/b0.1"), 4)
P, D = Pairing(b"s" * 32, b"revision"), Pairing(b"s" * 32, b"revision")


def changed(**words) -> str:
    return json.dumps(json.loads(P.write(CLAIM, 23)) | words)


def test_a_claim_arrives_as_it_was_and_says_what_it_is():
    text = P.write(CLAIM, 23)
    assert D.read(text, 23) == CLAIM
    words = json.loads(text)
    assert words["do_remote_prefill"] is True and words["engine"] == "b0" and words["epoch"] == "3fa9"
    assert Pairing(b"s" * 32, b"").read(Pairing(b"s" * 32, b"").write(Claim("b0", 1, b""), 2), 2).lane == "b0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (changed(address=["10.6.6.6:1"]), "no proof"),
        (changed(engine="front", epoch=""), "no proof"),
        (changed(handoff=1), "no proof"),
        (changed(ticket="00" * 16), "no proof"),
        (changed(ticket="no hex"), "no proof"),
        (changed(tokens=24), "no proof"),
        (changed(tp=8), "no proof"),
        (changed(revision="ff"), "no proof"),
        (changed(proof=None), "no proof"),
        (changed(proof="\u00fc"), "no proof"),
        (Pairing(b"t" * 32, b"revision").write(CLAIM, 23), "no proof"),
        (Pairing(b"s" * 32, b"another").write(CLAIM, 23), "another revision"),
        (P.write(CLAIM, 24), "other tokens"),
        (P.write(CLAIM._replace(addresses=("10.0.0.1:8",)), 23), "no way there"),
        (P.write(CLAIM._replace(addresses=("nowhere",)), 23), "no way there"),
        ("{}", "no proof"),
        ('{"do_remote_prefill": true, "remote_host": "h", "remote_port": 1}', "no proof"),
    ],
)
def test_what_does_not_fit_is_no_claim_and_counted(text, why):
    pairing = Pairing(b"s" * 32, b"revision")
    assert pairing.read(text, 23) is None and pairing.counts == {why: 1} and why in CLAIMS


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 5000, "{" + " " * 9000 + "}"])
def test_what_is_no_object_is_the_mistake_of_who_sends_it(text):
    with pytest.raises(InvalidArgument, match="kv_transfer_params_json: expected a JSON object"):
        D.read(text, 23)


def test_a_replica_counts_what_it_holds_and_what_it_makes_of_claims(make_life):
    life, heard = make_life(), []
    life.replica.pairing = D
    life.replica.remote = SimpleNamespace(
        members=SimpleNamespace(reached=lambda name: Hello(name, "both", ("127.0.0.1:7",), 2)), flush=lambda: None
    )
    prompt = life.request(prompt="x" * 400)
    life.replica.offer(prompt, heard.append)
    gone = life.replica.offer(prompt, heard.append)
    life.replica.close_offer(gone)
    life.run()
    (shown,) = heard
    claim = D.read(shown, len(prompt.prompt_ids))
    assert (claim.lane, claim.addresses, claim.tp) == ("b0", ("127.0.0.1:7",), 2)
    life.submit("a", paired="{}")
    life.replica.refresh()
    assert life.metrics.value("held") == 1 and life.metrics.value("claims", "no proof") == 1
    assert life.metrics.value("claims", "taken") == D.counts["taken"] > 0
