"""Handoffs by the million between lanes without tokens: machines, pools and reservations over a faulty network.

    offer --> Target, Source, both pools <~~ lost, doubled, late, damaged ~~> content compared, block by block

A block's KV is a number that says whose it is, so a block of somebody else is seen where it is read: at the commit
and again when the sequence that got the blocks ends. Every few seconds a storm cancels most of what is open, on one
side or on both, and now and then a lane dies with everything in it and comes back under a new name.
Cost: about 50 us a handoff.
"""

import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from engine.core import handoff
from engine.core.blocks import BlockPool, Content
from engine.core.reservations import Reservations

LANES, BLOCKS, OPEN = 4, 128, 16  # lanes; blocks of a pool; handoffs that are open at once for each lane
TURN_S = 0.1
DROP, DOUBLE, LATE, DAMAGE = 0.04, 0.04, 0.05, 0.02
STORM_TURNS, DEATH_TURNS = 40, 1000  # between two storms, two deaths; on average
HOLD_TURNS = 6  # a sequence keeps its blocks for so long at most


@dataclass(slots=True)
class Prompt:
    """What is handed on: `contents` names each block, and `kv` is what must stand in it."""

    contents: list[Content]
    kv: list[int]


@dataclass(slots=True)
class Lane:
    """A pool with what stands in it, and the handoffs of one life."""

    name: str
    pool: BlockPool = field(default_factory=lambda: BlockPool(BLOCKS))
    kv: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    targets: dict[int, handoff.Target] = field(default_factory=dict)
    sources: dict[int, handoff.Source] = field(default_factory=dict)
    given: dict[int, list[int]] = field(default_factory=dict)  # blocks that sources read from
    ahead: int | None = None  # waits for blocks: who came later gets none
    serving: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (until, handoff, blocks)
    reserved: Reservations = field(init=False)

    def __post_init__(self):
        self.reserved = Reservations(self.pool)


class Walk:
    """A random walk of `wanted` handoffs; `machines` is engine/core/handoff.py, or a copy with a bug in it."""

    def __init__(self, seed: int, wanted: int, machines=handoff):
        self.m, self.rng, self.wanted = machines, random.Random(seed), wanted
        self.turn, self.offered, self.lives = 0, 0, 0
        self.counts: Counter[str] = Counter()
        self.prompts: dict[int, Prompt] = {}
        self.lanes: dict[str, Lane] = {}
        self.mail: defaultdict[int, list] = defaultdict(list)  # by turn of arrival
        for _ in range(LANES):
            self._live()

    @property
    def now(self) -> float:
        return self.turn * TURN_S

    def run(self) -> Counter:
        """Offer all, then wait until nothing is open. Raises AssertionError where blocks are missing at the end."""
        last = 0
        while self.offered < self.wanted or self._open():
            self.turn += 1
            if self.offered < self.wanted:
                last = self.turn
                self._offer()
                self._storm()
            assert self.now - last * TURN_S < 300.0, "handoffs are open that nothing ends"
            for sender, receiver, message in self.mail.pop(self.turn, ()):
                if receiver in self.lanes:
                    self._arrive(self.lanes[receiver], sender, message)
            for lane in list(self.lanes.values()):
                self._turn(lane)
        for lane in self.lanes.values():
            lane.pool.check([])
            self.counts["lost blocks"] += lane.pool.usable - lane.pool.available
        return self.counts

    def _open(self) -> int:
        return sum(len(x.targets) + len(x.sources) + len(x.serving) for x in self.lanes.values())

    # -- what is asked for ----------------------------------------------------------------------------------------

    def _live(self) -> None:
        self.lives += 1
        self.lanes[f"lane {self.lives}"] = Lane(f"lane {self.lives}")

    def _offer(self) -> None:
        names = list(self.lanes)
        for name in names:
            lane = self.lanes[name]
            while len(lane.targets) < OPEN and self.offered < self.wanted:
                self.offered += 1
                number, peer = self.offered, self.rng.choice([other for other in names if other != name])
                prompt = self.prompts[number] = self._prompt(number)
                lane.targets[number] = self.m.Target(number, peer, len(prompt.kv))
                self.lanes[peer].sources[number] = self.m.Source(number, name, len(prompt.kv))

    def _prompt(self, number: int) -> Prompt:
        total, stem = self.rng.randint(1, 10), self.rng.randrange(12)
        shared = self.rng.randint(0, total)  # blocks that other prompts begin with too
        kv = [-(stem * 16 + k) - 1 if k < shared else number * 16 + k for k in range(total)]
        return Prompt([Content(key := b"%d" % value, key) for value in kv], kv)

    def _storm(self) -> None:
        if self.rng.random() < 1 / DEATH_TURNS:
            self._die(self.rng.choice(list(self.lanes.values())))
        storm = self.rng.random() < 1 / STORM_TURNS
        for lane in self.lanes.values():
            for number, target in list(lane.targets.items()):
                if self.rng.random() < (0.8 if storm else 0.005) and target.state is not self.m.State.QUARANTINED:
                    self.counts["cancels"] += 1
                    if self.rng.random() < 0.8:
                        self._send(lane.name, target.source, target.cancel(self.now, "cancelled"))
                    peer = self.lanes.get(target.source)
                    if peer is not None and number in peer.sources and self.rng.random() < 0.5:
                        peer.sources[number].cancel("cancelled")

    def _die(self, lane: Lane) -> None:
        self.counts["deaths"] += 1
        del self.lanes[lane.name]
        done = self.m.State.COMMITTED, self.m.State.RELEASED
        self.counts["died"] += sum(
            target.state not in done or number in lane.reserved.handoffs for number, target in lane.targets.items()
        )
        for other in self.lanes.values():
            for target in [t for t in other.targets.values() if t.source == lane.name]:
                target.fence("dead")
            for source in [s for s in other.sources.values() if s.target == lane.name]:
                source.cancel("dead")
        self._live()

    # -- the network ----------------------------------------------------------------------------------------------

    def _send(self, sender: str, receiver: str, messages: list) -> None:
        for message in messages:
            luck = self.rng.random()
            if luck < DROP:
                continue
            for _ in range(2 if luck < DROP + DOUBLE else 1):
                late = self.rng.randint(2, 60) if self.rng.random() < LATE else 1
                self.mail[self.turn + late].append((sender, receiver, message))

    def _arrive(self, lane: Lane, sender: str, message) -> None:
        number, m = message.handoff, self.m
        if isinstance(message, m.Later | m.Fetch | m.Done | m.Stop):
            source = lane.sources.get(number)
            if source is not None:
                answers = source.receive(self.now, message)
            elif isinstance(message, m.Fetch):
                answers = [m.Gone(number, "it is over")]
            elif isinstance(message, m.Later):
                answers = []
            else:
                answers = [m.Stopped(number, "complete") if isinstance(message, m.Stop) else m.Released(number)]
            self._send(lane.name, sender, answers)
        elif (target := lane.targets.get(number)) is not None:
            if isinstance(message, m.Parts) and self.rng.random() < DAMAGE:
                message = message._replace(staged=None)
            before = target.have
            write, answers = target.receive(self.now, message)
            if target.state is m.State.OFFERED:
                lane.reserved.drop(number)
            if write:
                for block, kv in zip(lane.reserved.held(number)[before : target.have], message.staged, strict=True):
                    lane.kv[block] = kv
                    self.counts["blocks moved"] += 1
            self._send(lane.name, sender, answers)

    # -- a lane's turn --------------------------------------------------------------------------------------------

    def _turn(self, lane: Lane) -> None:
        while lane.serving and lane.serving[0][0] <= self.turn:
            _, number, blocks = lane.serving.pop(0)
            self._compare(lane, number, blocks)
            lane.pool.drop(blocks)
            self.prompts.pop(number)
        lane.ahead = None
        for target in list(lane.targets.values()):
            self._turn_target(lane, target)
        for source in list(lane.sources.values()):
            self._turn_source(lane, source)
        if self.rng.random() < 0.01:
            given = [block for blocks in lane.given.values() for block in blocks]
            lane.pool.check(given + lane.reserved.blocks + [b for _, _, blocks in lane.serving for b in blocks])

    def _turn_target(self, lane: Lane, target) -> None:
        m, number = self.m, target.handoff
        if target.state is m.State.OFFERED and target.offered and lane.ahead is None:
            prompt = self.prompts[number]
            while (made := lane.reserved.reserve(number, prompt.contents, len(prompt.kv))) is None:
                if not self._give_up(lane, number):
                    lane.ahead = number
                    break
            else:
                self._send(lane.name, target.source, target.reserved(self.now, made[1]))
        if self.now >= target.ask_at:
            self._send(lane.name, target.source, target.tick(self.now))
        state = target.state
        if state in (m.State.COMMITTED, m.State.RELEASED) and number in lane.reserved.handoffs:
            self.counts["committed"] += 1
            blocks = lane.reserved.written(number)
            self._compare(lane, number, blocks)
            for block, content in zip(blocks, self.prompts[number].contents, strict=True):
                lane.pool.publish(block, content)
            lane.serving.append((self.turn + HOLD_TURNS, number, blocks))
        if state in m.OVER:
            del lane.targets[number]
            if state is m.State.ABORTED:
                self.counts["aborted"] += 1
                lane.reserved.drop(number)
                self.prompts.pop(number)
                peer = self.lanes.get(target.source)  # the front hears of it and ends what has not begun
                source = None if peer is None else peer.sources.get(number)
                if source is not None and source.state is m.State.OFFERED:
                    source.cancel(target.reason)

    def _give_up(self, lane: Lane, before: int) -> bool:
        """Take the blocks of the newest prompt after `before` that nobody has asked for; False if there is none."""
        for number in sorted(lane.given, reverse=True):
            if number > before and (source := lane.sources[number]).state is self.m.State.OFFERED:
                source.unseated()
                self._take_back(lane, number)
                self.counts["given up"] += 1
                return True
        return False

    def _take_back(self, lane: Lane, number: int) -> None:
        """What a source read from is given back."""
        for block in lane.given.get(number, ()):
            lane.kv[block] = 0  # what is given back may change at once
        lane.pool.drop(lane.given.pop(number, []))

    def _compare(self, lane: Lane, number: int, blocks: list[int]) -> None:
        """Whether the blocks of a sequence hold what is its own."""
        for block, kv in zip(blocks, self.prompts[number].kv, strict=True):
            self.counts["foreign blocks"] += lane.kv[block] != kv

    def _turn_source(self, lane: Lane, source) -> None:
        number = source.handoff
        waits = number not in lane.given and source.state not in self.m.OVER
        if waits and (lane.ahead is None or number < lane.ahead) and source.total <= lane.pool.available:
            lane.given[number] = lane.pool.take(source.total)
        if (blocks := lane.given.get(number)) is not None:
            if source.ready < source.total and number in self.prompts:
                for k in range(source.ready, stop := min(source.ready + self.rng.randint(1, 6), source.total)):
                    lane.kv[blocks[k]] = self.prompts[number].kv[k]
                self._send(lane.name, source.target, source.computed(self.now, stop))
            while (cut := source.next_parts(4)) is not None:
                kv = tuple(lane.kv[block] for block in blocks[cut[0] : sum(cut)])
                self._send(lane.name, source.target, [self.m.Parts(number, source.generation, *cut, kv)])
        self._send(lane.name, source.target, source.tick(self.now))
        if source.state in self.m.OVER:
            del lane.sources[number]
            self._take_back(lane, number)
            peer = self.lanes.get(source.target)  # the front hears of it and ends what waits for it
            target = None if peer is None else peer.targets.get(number)
            if target is not None and target.state is self.m.State.OFFERED:
                target.cancel(self.now, source.reason)


if __name__ == "__main__":
    walked = Walk(*map(int, sys.argv[1:])).run() | Counter(handoffs=int(sys.argv[2]))
    print("\n".join(f"{name}\t{count}" for name, count in walked.items()))
