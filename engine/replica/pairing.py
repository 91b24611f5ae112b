"""What one replica tells another, through a gateway, of a prompt that it holds for it.

    Claim --write--> JSON text ~~gateway~~> read --> Claim, or None: computed here, as if nobody held anything

The text names addresses that a lane will go to, and passes through whoever speaks to the public listener. So it
bears a proof under the secret that both clusters share; without it nothing in it is believed. Text that is no JSON
object is the gateway's mistake and refused; a claim that does not fit (another revision, other tokens, another
secret, no way there) is not, since the answer needs none of it. Cost: two HMACs, tens of microseconds.
"""

import hmac
import json
from collections import Counter
from collections.abc import Mapping

from engine.core.holds import Claim
from engine.errors import ConfigError, InvalidArgument
from engine.movers import addresses
from engine.movers.tls import Tls

FIELD = "kv_transfer_params_json"
MOST = 8192  # characters
VERSION = "serac pairing 1"
KNOWN = ("engine", "epoch", "handoff", "ticket", "address", "tp", "revision", "tokens")


class Pairing:
    """Under the clusters' common `secret`; `revision` is that of everything that KV depends on.

    tls     what this cluster's lanes have to go to addresses beyond this machine
    """

    def __init__(self, secret: bytes, revision: bytes, tls: Tls | None = None):
        self._secret, self._revision, self._tls = secret, revision.hex(), tls
        self.counts: Counter[str] = Counter()  # of claims that were read: taken, or why not

    def write(self, claim: Claim, tokens: int) -> str:
        """What whoever decodes must show, for a prompt of so many tokens."""
        engine, _, epoch = claim.lane.partition(".")
        words: dict[str, object] = {
            "engine": engine,
            "epoch": epoch,
            "handoff": claim.handoff,
            "ticket": claim.ticket.hex(),
            "address": list(claim.addresses),
            "tp": claim.tp,
            "revision": self._revision,
            "tokens": tokens,
        }
        return json.dumps({"do_remote_prefill": True, **words, "proof": self._proof(words)})

    def read(self, text: str, tokens: int) -> Claim | None:
        """The claim in `text`, if it is one for a prompt of so many tokens here. Raises InvalidArgument."""
        words = parse(text)
        why = self._misfit(words, tokens)
        self.counts[why or "taken"] += 1
        if why:
            return None
        name = f"{words['engine']}.{words['epoch']}" if words["epoch"] else str(words["engine"])
        return Claim(name, words["handoff"], bytes.fromhex(words["ticket"]), tuple(words["address"]), words["tp"])  # type: ignore[arg-type]

    def _misfit(self, words: Mapping[str, object], tokens: int) -> str:
        proof = words.get("proof")
        ours = self._proof({name: words.get(name) for name in KNOWN})
        if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), ours.encode()):
            return "no proof"
        if words["revision"] != self._revision:
            return "another revision"
        if words["tokens"] != tokens:
            return "other tokens"
        try:
            for address in words["address"]:  # type: ignore[attr-defined]
                addresses.check_tls(addresses.parse(address), self._tls)
        except ConfigError:
            return "no way there"
        return ""

    def _proof(self, words: Mapping[str, object]) -> str:
        said = json.dumps([VERSION, *(words[name] for name in KNOWN)])
        return hmac.new(self._secret, said.encode(), "sha256").hexdigest()


def parse(text: str) -> Mapping[str, object]:
    """The JSON object in `text`. Raises InvalidArgument."""
    try:
        words = json.loads(text) if len(text) <= MOST else None
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict):
        raise InvalidArgument(f"{FIELD}: expected a JSON object of at most {MOST} characters", field=FIELD)
    return words
