"""The processes of one lane in one life, as whoever started them sees it: who came, who is missing, do they fit.

    hello of every rank --> alike? --"start" to each--> ready of every rank --> the lane is ready, by rank 0's facts
    no hello in time --> missing, by rank and host          not alike --> the difference, in a sentence

Pure: `now` is an argument, what to say is returned.
"""

import secrets
from collections.abc import Sequence

from engine.errors import Misfit, Unavailable

HELLO_S = 10.0  # a process is started by then, or its host is missing

Said = tuple[int, dict]  # (to which rank, the line)


class Group:
    """`hosts` by rank, as a person calls them. `problem` and `code` say why it can never be ready, if it cannot.

    patient  who has not come is named again and again, and waited for
    """

    def __init__(self, hosts: Sequence[str], now: float, patient: bool = False):
        self.problem, self.code = "", 0
        self.facts: dict | None = None  # of rank 0, once all are ready
        self.stages: dict[int, tuple[str, int, int]] = {}
        self._hosts, self._began, self._patient = hosts, now, patient
        self._hellos: dict[int, dict] = {}
        self._ready: dict[int, dict] = {}

    def heard(self, rank: int, words: dict) -> list[Said]:
        """What to answer to a line of process `rank`."""
        match words.get("event"):
            case "hello" if not self._started:
                self._hellos[rank] = words
                return self._start() if self._started else []
            case "stage":
                self.stages[rank] = str(words.get("stage", "")), _count(words, "done"), _count(words, "of")
            case "ready":
                self._ready[rank] = words
                if len(self._ready) == len(self._hosts):
                    self.facts = self._ready[0]
            case "lost":
                self.problem = self.problem or f"{self._who(rank)}: {words.get('reason', '')!s:.500}"
        return []

    def look(self, now: float) -> str:
        """Notice who has not come in time; what to tell a person, if anything."""
        missing = [rank for rank in range(len(self._hosts)) if rank not in self._hellos]
        if not missing or now - self._began <= HELLO_S or self.code:
            return ""
        notice = (
            f"{self._who(missing[0])} has said nothing for {HELLO_S:.0f} s; expected its hello: is the host up, "
            "and does it have Serac? `serac doctor --hosts` looks"
        )
        if self._patient:
            self._began = now
        else:
            self.code, self.problem = Unavailable.exit_code, notice
        return notice

    @property
    def begun(self) -> bool:
        """Whether anybody has come."""
        return bool(self._hellos)

    def state(self, rank: int) -> str:
        """Of one process, in a word: "awaited", "starting" or "ready"."""
        return "ready" if rank in self._ready else "starting" if rank in self._hellos else "awaited"

    @property
    def _started(self) -> bool:
        return len(self._hellos) == len(self._hosts)

    def _start(self) -> list[Said]:
        first = self._hellos[0]
        for rank, hello in sorted(self._hellos.items()):
            if difference := unlike(_alike(first), _alike(hello)):
                self.code, self.problem = Misfit.exit_code, f"{self._who(rank)}: {difference}"
                return []
        words = {name: first.get(name, "") for name in ("orders", "coordinator")}
        words |= {"secret": secrets.token_hex(32)}
        return [(rank, {"start": dict(words)}) for rank in range(len(self._hosts))]

    def _who(self, rank: int) -> str:
        return f"{f'rank {rank}' if len(self._hosts) > 1 else 'its process'} on {self._hosts[rank]}"


def _count(words: dict, name: str) -> int:
    """A number of a line; 0 for what is none, as a process of another release may say anything."""
    return words[name] if isinstance(words.get(name), int) else 0


def _alike(hello: dict) -> dict[str, str]:
    """What must be alike, as a hello says it; nothing where it says no such thing."""
    return hello["alike"] if isinstance(hello.get("alike"), dict) else {}


def unlike(mine: dict[str, str], theirs: dict[str, str]) -> str:
    """What is otherwise there than at rank 0, as a sentence; empty where nothing is."""
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(name), theirs.get(name)
        if here != there:
            there, here = ("not set" if value is None else str(value)[:64] for value in (there, here))
            return f"{name} is {there}, and at rank 0 it is {here}; all processes of a lane need the same"
    return ""
