"""The leader's view of the other processes of its lane: what it tells them, and what they must answer alike.

    Lane --launch, gather, scatter--> Lockstep --order--> followers     first the others: nobody waits for us
                                          `-----------------> device    collect: the digest of what was drawn
    followers --Drawn--> compared with ours      --Have--> counted until every process has its heads      (here)

A lane stands or falls as one: whatever goes wrong with one process is said once to `lost`, which ends this one, and
whoever started them starts all of them again. A step that does not end is such a thing too.
Cost a step: the bytes of the plan, and a send a follower (`python -m bench lockstep`).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.core.plan import StepPlan, StepResult
from engine.errors import GroupLost, Misfit
from engine.replica import orders
from engine.replica.channel import Channel
from engine.replica.landing import Arrived
from engine.replica.lane import Device
from engine.replica.orders import Have, to_frame

STUCK_S = 30.0  # a step that has not ended by then never will: a collective waits for who is not there
LOOK_S = 1.0
AHEAD = 64  # plans that a follower may have run and this process has not collected


class Followers:
    """Channels by rank, from 1 on; none where a lane is one process. `lost(reason)` does not return.

    hear  called with (rank, Have) on the thread that reads from it
    """

    def __init__(self, channels: Sequence[Channel], lost: Callable[[str], None]):
        self.channels, self._lost = channels, lost
        self.hear: Callable[[int, Have], None] = lambda rank, have: None
        self._lock, self._order = threading.Condition(), threading.Lock()
        self._waited: dict[type, dict[int, NamedTuple]] = {orders.At: {}, orders.Here: {}}
        self._ours: dict[int, int] = {}  # digests by the number of a plan
        self._theirs: dict[int, dict[int, int]] = {}
        self._since: deque[float] = deque()  # when the plans in flight were launched
        self._number = self._skipped = 0
        self._closing = threading.Event()
        self._forgotten: deque[orders.Key] = deque()
        for rank, channel in enumerate(channels, 1):
            threading.Thread(target=self._read, args=(rank, channel), name=channel.peer, daemon=True).start()
        if channels:
            threading.Thread(target=self._watch, name="steps", daemon=True).start()

    def say(self, order: NamedTuple) -> None:
        """Tell every follower. Any thread may call it; all of them hear all orders in the same order."""
        if self.channels:
            data = to_frame(order)
            with self._order:
                while self._forgotten:
                    data = to_frame(orders.Drop(*self._forgotten.popleft())) + data
                for channel in self.channels:
                    channel.send(data)

    def close(self) -> None:
        """End all channels; the followers end with them."""
        self._closing.set()
        for channel in self.channels:
            channel.close()

    def forget(self, key: orders.Key) -> None:
        """Nobody wants what came under `key`: told with the next order, as this may be called from anywhere."""
        if self.channels:
            self._forgotten.append(key)

    def plan(self, plan: StepPlan) -> None:
        """A plan that is launched here next."""
        self._number += 1
        self._since.append(time.monotonic())
        self.say(orders.Plan(self._number, plan))

    def drew(self, result: StepResult) -> None:
        """What the oldest plan in flight drew here."""
        self._since.popleft()
        number = self._number - len(self._since)
        if self.channels:
            with self._lock:
                self._ours[number] = orders.digest(result)
                self._compare(number)

    def over(self) -> None:
        """Plans in flight are not collected any more, here."""
        self._since.clear()
        with self._lock:
            self._skipped = self._number
            self._ours.clear()
            self._theirs.clear()

    def born(self, name: str) -> tuple[str, ...]:
        """Tell the name of the lane's present life; where its followers are reached."""
        with self._lock:
            self._waited[orders.At].clear()
        self.say(orders.Born(name))
        return tuple("".join(at.addresses[:1]) for at in self._wait(orders.At))  # type: ignore[attr-defined]

    def together(self, found: str) -> None:
        """Wait until every process has come so far, with `found` alike. Raises Misfit."""
        for rank, here in enumerate(self._wait(orders.Here), 1):
            if here.found != found:  # type: ignore[attr-defined]
                raise Misfit(f"rank {rank} has {here.found!s:.200} where rank 0 has {found!s:.200}")  # type: ignore[attr-defined]
        with self._lock:
            self._waited[orders.Here].clear()
        self.say(orders.Go())

    def _wait(self, kind: type) -> list[NamedTuple]:
        with self._lock:
            self._lock.wait_for(lambda: len(self._waited[kind]) == len(self.channels))
            return [self._waited[kind][rank] for rank in range(1, len(self.channels) + 1)]

    def _read(self, rank: int, channel: Channel) -> None:
        try:
            while True:
                self._take(rank, channel.receive())
        except GroupLost as error:
            if not self._closing.is_set():
                self._lost(f"rank {rank}: {error}")

    def _take(self, rank: int, answer: object) -> None:
        match answer:
            case orders.Drawn(number=number, digest=digest):
                with self._lock:
                    if number > self._skipped:
                        self._theirs.setdefault(number, {})[rank] = digest
                        self._compare(number)
                    if len(self._theirs) > AHEAD:
                        self._lost(f"rank {rank} has run {AHEAD} plans that this process has not seen the end of")
            case Have():
                self.hear(rank, answer)
            case orders.At() | orders.Here():
                with self._lock:
                    self._waited[type(answer)][rank] = answer
                    self._lock.notify_all()
            case orders.Unable(reason=reason):
                self._lost(f"rank {rank}: {reason}")
            case _:
                self._lost(f"rank {rank} answered with an order")

    def _compare(self, number: int) -> None:
        ours, theirs = self._ours.get(number), self._theirs.get(number, {})
        if ours is None:
            return
        if odd := [rank for rank, digest in theirs.items() if digest != ours]:
            self._lost(f"plan {number}: rank {odd[0]} drew other tokens than rank 0")
        if len(theirs) == len(self.channels):
            del self._ours[number], self._theirs[number]

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            since = next(iter(self._since.copy()), None)
            if since is not None and time.monotonic() - since > STUCK_S:
                self._lost(f"a step has not ended for {STUCK_S:.0f} s")


class Lockstep:
    """A device that is spread over processes; fits `Device`."""

    def __init__(self, device: Device, followers: Followers, lost: Callable[[str], None]):
        self.device, self._followers, self._lost = device, followers, lost

    def launch(self, plan: StepPlan) -> None:
        """Everywhere; what is raised here after the others have begun cannot be taken back."""
        self._followers.plan(plan)
        try:
            self.device.launch(plan)
        except Exception as error:
            self._lost(f"step {plan.step} raised before launch: {type(error).__name__}")

    def collect(self) -> StepResult:
        """Ours; the others say what they drew when they come to it."""
        try:
            result = self.device.collect()
        except Exception as error:
            self._lost(f"a step failed: {type(error).__name__}")
            raise
        self._followers.drew(result)
        return result

    def reset(self) -> None:
        """Everywhere."""
        self._followers.over()
        self._followers.say(orders.Reset())
        self.device.reset()

    def gather(self, blocks: Sequence[int]) -> object:
        """The heads of this process; the others keep theirs until they hear where to."""
        self._followers.say(orders.Gather(tuple(blocks)))
        return self.device.gather(blocks)

    def scatter(self, blocks: Sequence[int], staged: object) -> None:
        """What came, everywhere."""
        assert isinstance(staged, Arrived)
        self._followers.say(orders.Scatter(*staged.key, tuple(blocks)))
        self.device.scatter(blocks, staged.take())
