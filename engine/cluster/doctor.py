"""`serac doctor`: looks at every host of a cluster before weights are loaded, and says what to do.

    start an examiner on each host, all at once, over the transport that launch would use
      facts of each -> agreement -> clocks -> every pair connects -> the model and an all-reduce on all of them

A host that does not answer is named within 10 s and left out of what follows. Nothing is changed anywhere. Costs
about a second, whatever the number of hosts; with JAX (the model and the all-reduce) five to ten more.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from engine.cluster import agreement, checks
from engine.cluster.agreement import Seen
from engine.cluster.asked import LAUNCHER, Asked, unguarded
from engine.cluster.checks import Facts, Finding, Wanted
from engine.cluster.examined import Examined, Silent
from engine.cluster.topology import LOOPBACK, Host
from engine.environment import DEVICE_COUNT

FRONT_CHECKS = ("python", "packages", "ports", "clock")
APART = ("host", "interface", "network")  # what fails here lets no lane start
CLOCK_ASKS = 5
ANSWER_S, SHORT_S, ALLREDUCE_S = 9.0, 6.0, 90.0

Row = Mapping[str, object]
Tell = Callable[[Sequence[Finding]], None]
Answer = TypeVar("Answer")


def run(asked: Asked, tell: Tell) -> tuple[int, list[Row]]:
    """Look at all of it; `tell` hears of findings as they come. The exit code, and the rows of the all-reduce."""
    round_ = Round(asked, tell)
    try:
        round_.facts()
        round_.agreement()
        rows = round_.allreduce() if asked.jax else []
    finally:
        round_.close()
    return checks.code(round_.findings), rows


class Round:
    """One visit of all hosts."""

    def __init__(self, asked: Asked, tell: Tell):
        self._asked, self._tell = asked, tell
        self.findings: list[Finding] = []
        self._facts: dict[str, Facts] = {}
        self._on_gpus = False
        hosts = list(asked.hosts)
        if asked.front not in (host.name for host in hosts):
            hosts.append(Host(LAUNCHER, LOOPBACK))
        self._examined = {host.name: Examined(host, asked.security) for host in hosts}

    def close(self) -> None:
        """End every examiner."""
        for each in self._examined.values():
            each.close()

    def say(self, findings: Sequence[Finding]) -> None:
        self.findings += findings
        self._tell(findings)

    @property
    def lanes(self) -> list[Host]:
        """The hosts that answered and on which lanes run."""
        return [host for host in self._asked.hosts if host.name in self._examined]

    def each(self, ask: Callable[[Examined], Answer]) -> dict[str, Answer]:
        """What every host says, asked at once. One that is silent is named and left out from here on."""
        silent: list[str] = []
        found: dict[str, Answer] = {}
        with ThreadPoolExecutor(len(self._examined) or 1) as pool:
            asks = {name: pool.submit(ask, each) for name, each in self._examined.items()}
            for name, answer in asks.items():
                try:
                    found[name] = answer.result()
                except Silent as error:
                    silent.append(name)
                    self.say([agreement.missing(name, str(error), error.todo)])
        for name in silent:
            self._examined.pop(name).close(0)
        return found

    def facts(self) -> None:
        """Each host on its own."""
        asked = self._asked
        cache = str(asked.settings.compile_cache) if asked.settings.compile_cache else ""

        def ask(each: Examined) -> Facts:
            ports = asked.ports if each.host.name == asked.front else {}
            return each.facts(
                {"ask": "facts", "address": each.host.address, "cache": cache, "ports": ports}, ANSWER_S
            )

        self._facts = self.each(ask)
        usable = any(facts.gpus and not facts.gpu_problem for facts in self._facts.values())
        self._on_gpus = asked.settings.device == "gpu" or (asked.settings.device == "auto" and usable)
        for name, facts in self._facts.items():
            found = checks.of_host(name, facts, self._wanted(name))
            if name == LAUNCHER and len(self._facts) > 1:  # it runs the front at most
                found = [one for one in found if one.what in FRONT_CHECKS]
            self.say(found)

    def _wanted(self, name: str) -> Wanted:
        host = self._examined[name].host
        spanning = len(self._asked.hosts) > 1 and name != LAUNCHER
        return Wanted(self._devices(host), self._on_gpus, spanning, listens=name == self._asked.front)

    def _devices(self, host: Host) -> Sequence[int]:
        """The GPUs of a host that lanes take; without a topology the processes here share all of them."""
        if host.devices or not self._on_gpus:
            return host.devices
        names = [each.name for each in self._asked.hosts]
        count = len(self._facts[host.name].gpus)
        return range(count)[names.index(host.name) :: len(names)] if host.name in names else ()

    def agreement(self) -> None:
        """What the hosts share: versions, clocks, the network."""
        if len(self._facts) < 2:
            return
        self.say(agreement.of_hosts(self._facts))
        self.say(agreement.clocks(self.each(skew)))
        self.say(agreement.of_network(self._network()))

    def _network(self) -> dict[tuple[str, str], float | None]:
        """How long each host takes to reach each other."""
        lanes = {host.name: host for host in self.lanes}
        listen = self.each(lambda one: one.ask(
            {"ask": "listen", "address": one.host.address, "port": 0}, SHORT_S
        ) if one.host.name in lanes else {})  # fmt: skip
        where = {name: [lanes[name].address, said["port"]] for name, said in listen.items() if "port" in said}

        def ask(each: Examined) -> Mapping[str, float | None]:
            others = (
                {name: at for name, at in where.items() if name != each.host.name}
                if each.host.name in lanes
                else {}
            )
            return each.ask({"ask": "reach", "addresses": others}, SHORT_S)["reached"]

        answers = self.each(ask)
        return {(name, other): took for name, all_ in answers.items() for other, took in all_.items()}

    def allreduce(self) -> list[Row]:
        """The model on each host and sums over all of them; rows of rank 0."""
        hosts = self.lanes
        if any(each.level == "fail" and each.what in APART for each in self.findings):
            self.say([checks.warn("allreduce", "left out", "mend the above first")._replace(host="all")])
            return []
        if why := unguarded(hosts, self._asked.security):
            todo = "its coordinator knows no passwords: private addresses, and trusted_network = true in [security]"
            self.say([checks.warn("allreduce", f"left out: {why}", todo)._replace(host="all")])
            return []
        coordinator = self._coordinator(hosts[0])
        seen: dict[str, Seen] = {}
        rows: list[Row] = []

        def one(rank: int, host: Host) -> str:
            for event in self._examined[host.name].events(self._child(rank, host, coordinator), ALLREDUCE_S):
                if event["event"] == "seen":
                    seen[host.name] = Seen(event["revision"], event["model_bytes"], event["model_problem"])
                elif event["event"] == "row":
                    rows.append({name: value for name, value in event.items() if name != "event"})
            return ""

        with ThreadPoolExecutor(len(hosts)) as pool:
            asks = {pool.submit(one, rank, host): host for rank, host in enumerate(hosts)}
            problem = self._first_problem(asks)
        self.say(agreement.models({host.name: seen[host.name] for host in hosts if host.name in seen}, self._facts,
                                  self._on_gpus))  # fmt: skip
        self.say([problem or checks.ok("allreduce", f"{len(hosts)} processes add up right")._replace(host="all")])
        return rows

    def _coordinator(self, host: Host) -> str:
        """HOST:PORT where rank 0 will listen; the examiner there holds the port until then. Raises Silent."""
        said = self._examined[host.name].ask({"ask": "listen", "address": host.address, "port": 0}, SHORT_S)
        return f"{host.address}:{said['port']}"

    def _first_problem(self, asks: Mapping) -> Finding | None:
        """Wait for all; the first that fails ends the others, which would wait for it."""
        problem = None
        for done in as_completed(asks):
            try:
                done.result()
            except Silent as error:
                if problem is None:
                    problem = Finding("fail", asks[done].name, "allreduce", str(error), error.todo, checks.MISSING)
                    self.close()
        return problem

    def _child(self, rank: int, host: Host, coordinator: str) -> dict[str, object]:
        """The question that starts a process with JAX."""
        devices = list(self._devices(host)) if self._on_gpus else []
        if self._on_gpus:
            environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
            if interface := self._facts[host.name].interface:
                environment["NCCL_SOCKET_IFNAME"] = f"={interface}"
        else:
            environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{DEVICE_COUNT}=1"}
        words = {
            "model": self._asked.settings.model,
            "coordinator": coordinator,
            "bind": coordinator,
            "rank": rank,
            "processes": len(self.lanes),
            "devices": list(range(len(devices))),
        }
        return {"ask": "allreduce", "words": words, "environment": environment}


def skew(each: Examined) -> tuple[float, float]:
    """How far a host's wall clock is ahead of ours, and how well that is known: half the quickest round trip."""
    best = (0.0, float("inf"))
    for _ in range(CLOCK_ASKS):
        began, sent = time.monotonic(), time.time()
        theirs = each.ask({"ask": "clock"}, SHORT_S)["now"]
        half = (time.monotonic() - began) / 2
        if half < best[1]:
            best = (theirs - sent - half, half)
    return best
