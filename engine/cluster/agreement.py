"""What hosts must agree on before they can share a lane: facts in, findings out, nothing asked.

Facts of all      --of_hosts-->    the same versions and devices everywhere
Seen by JAX there --models-->      the same model, and memory for it
clocks compared   --clocks-->      together, or who is ahead
who reached whom  --of_network-->  every pair of lane addresses
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.cluster.checks import MISSING, Facts, Finding, Level, fail, gib, ok, warn
from engine.cluster.found import VERSIONS

SAME = (*VERSIONS, "python")
SKEW_WARN_S, SKEW_FAIL_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Seen:
    """The model on a host, as what will load it says."""

    revision: str = ""
    model_bytes: int = 0
    model_problem: str = ""


def models(seen: Mapping[str, Seen], facts: Mapping[str, Facts], on_gpus: bool) -> list[Finding]:
    """The model is readable on each host, fits in memory, and is the same everywhere."""
    first = next((each.revision for each in seen.values() if each.revision), "")
    findings = []
    for host, each in seen.items():
        if each.model_problem:
            found = fail("model", each.model_problem, "correct model, or copy it there")
        elif each.revision != first:
            words = f"revision {each.revision[:12]}, and {first[:12]} on the first host"
            found = fail("model", words, "copy the same files to every host")
        elif not on_gpus and facts[host].memory_free < each.model_bytes:
            words = f"{gib(each.model_bytes)} of weights, and {gib(facts[host].memory_free)} free"
            found = warn("model", words, "a host needs memory for its share of them")
        else:
            found = ok("model", f"revision {each.revision[:12]}, {gib(each.model_bytes)}")
        findings.append(found._replace(host=host))
    return findings


def of_hosts(facts: Mapping[str, Facts]) -> list[Finding]:
    """Versions and kinds of devices are those of the first host."""
    findings = []
    first = next(iter(facts), "")
    for host, each in facts.items():
        ours = facts[first].versions
        differ = [name for name in ours if name in SAME and each.versions.get(name, "") != ours[name]]
        if differ:
            said = ", ".join(
                f"{name} {each.versions.get(name) or 'none'}, {ours[name]} on {first}" for name in differ
            )
            findings.append(fail("versions", said, "install the same on every host")._replace(host=host))
        if set(each.gpus) != set(facts[first].gpus):
            words = f"other devices than {first}"
            findings.append(warn("devices", words, "a lane needs one kind of device")._replace(host=host))
    return findings or [ok("versions", f"the same on {len(facts)} hosts")._replace(host="all")]


def clocks(skew_s: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """`skew_s` of each host: how far its wall clock is ahead of ours, and how well that is known."""
    if len(skew_s) < 2:
        return []
    ahead = max(skew_s, key=lambda host: skew_s[host][0])
    behind = min(skew_s, key=lambda host: skew_s[host][0])
    apart, unsure = skew_s[ahead][0] - skew_s[behind][0], max(unsure for _, unsure in skew_s.values())
    words = f"at most {1e3 * apart:.2g} ms apart, known to {1e3 * unsure:.2g} ms"
    if apart - 2 * unsure <= SKEW_WARN_S:
        return [ok("clocks", words)._replace(host="all")]
    level: Level = "fail" if apart - 2 * unsure > SKEW_FAIL_S else "warn"
    todo = f"{ahead} is ahead of {behind}: start a time service on both"
    return [Finding(level, "all", "clocks", words, todo)]


def of_network(reached: Mapping[tuple[str, str], float | None]) -> list[Finding]:
    """`reached` of each pair (from, to): seconds to connect, None where that failed."""
    lost = [pair for pair, seconds in reached.items() if seconds is None]
    todo = "open the ports between the hosts; correct address in [[host]]"
    findings = [Finding("fail", one, "network", f"does not reach {other}", todo, MISSING) for one, other in lost]
    took = [seconds for seconds in reached.values() if seconds is not None]
    if took and not lost:
        words = f"{len(took)} pairs reach each other, {1e3 * max(took):.1f} ms at most"
        findings.append(Finding("ok", "all", "network", words))
    return findings


def missing(host: str, why: str, todo: str) -> Finding:
    """A host that does not answer."""
    return Finding("fail", host, "host", why, todo, MISSING)
