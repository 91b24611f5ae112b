"""A process of a lane that leads nothing: it carries out the leader's orders, and says what came of them.

    orders --> launch | gather, send | scatter | reset           on one thread, as the leader's lane does
    steps in flight --collect--> Drawn(number, digest)           on another: the next plan never waits for a result

It decides nothing. Whatever is not as it must be, a plan out of its turn, sizes of another lane, a device that
fails, is said to the leader in a sentence and ends the process: a lane goes on with all processes or with none.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable

from engine.clock import Clock
from engine.core.handoff import Parts
from engine.errors import GroupLost, SeracError
from engine.movers.spans import Span
from engine.observe.plan_bytes import Bounds, check_plan
from engine.replica import orders
from engine.replica.channel import Channel
from engine.replica.landing import key_of
from engine.replica.lane import Device
from engine.replica.moves import Bytes, Moves, Reach
from engine.replica.orders import Key


class Follower:
    """Process `rank` of a lane. `lost(reason)` is told when it cannot go on, and does not return."""

    def __init__(
        self,
        channel: Channel,
        rank: int,
        span: Span,
        device: Device,
        bounds: Bounds,
        reach: Reach,
        content: Bytes,
        clock: Clock,
        lost: Callable[[str], None],
    ):
        self._channel, self._rank, self._span, self._device, self._bounds = channel, rank, span, device, bounds
        self._reach, self._content, self._clock, self._lost = reach, content, clock, lost
        self._moves: Moves | None = None
        self._gathered: deque[object] = deque()
        self._held: dict[Key, object] = {}
        self._number = 0
        self._steps: queue.SimpleQueue[int | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._collect, name="results", daemon=True).start()

    def run(self) -> None:
        """Follow until the leader is gone, which `lost` is told."""
        while True:
            try:
                self.obey(self._channel.receive())
            except GroupLost as error:
                self._lost(str(error))
                return
            except Exception as error:
                self._unable(error)
                return

    def obey(self, order: object) -> None:
        """Carry out one order."""
        match order:
            case orders.Plan():
                self._launch(order)
            case orders.Gather(blocks=blocks):
                self._gathered.append(self._device.gather(blocks))
            case orders.Scatter(blocks=blocks):
                self._device.scatter(blocks, self._held.pop(Key(*order[:3])))
            case orders.Drop():
                self._held.pop(Key(*order), None)
            case orders.Reset():
                self._reset()
            case orders.Born(name=name):
                self._live(name)
            case _ if self._moves is not None:
                self._move(self._moves, order)
            case _:
                raise SeracError(f"order: got {type(order).__name__} before the lane has a name")

    def _move(self, moves: Moves, order: object) -> None:
        """One that is about other lanes."""
        match order:
            case orders.Send(lane=lane):
                moves.send(lane, Parts(*order[1:], self._gathered.popleft()))
            case orders.Known():
                moves.meet(*order)
            case orders.Forget(lane=lane):
                moves.forget(lane)
            case _:
                raise SeracError(f"order: got {type(order).__name__}, which no follower takes")

    def _launch(self, order: orders.Plan) -> None:
        if order.number != self._number + 1:
            raise SeracError(f"plan: got number {order.number}; expected {self._number + 1}")
        self._number = order.number
        check_plan(order.plan, self._bounds)
        self._device.launch(order.plan)
        self._steps.put(order.number)

    def _reset(self) -> None:
        ended = threading.Event()
        self._steps.put(ended)
        ended.wait()
        self._gathered.clear()
        self._device.reset()

    def _live(self, name: str) -> None:
        """Begin the lane's life of this name; nothing of the one before is wanted any more."""
        if self._moves is not None:
            self._moves.close()
        self._held.clear()
        self._gathered.clear()
        about = self._rank, self._span, self._reach, self._content, self._clock
        self._moves = Moves(name, *about, lambda sender, message: None, self._landed)
        self._channel.say(orders.At(tuple(self._moves.links.addresses)))

    def _landed(self, lane: str, part: Parts) -> None:
        if part.staged is not None:
            self._held[key_of(part)] = part.staged
        self._channel.say(orders.Have(lane, *part[:4], int(part.staged is not None)))

    def _collect(self) -> None:
        while True:
            item = self._steps.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                result = self._device.collect()
            except Exception as error:
                self._unable(error)
                return
            self._channel.say(orders.Drawn(item, orders.digest(result)))

    def _unable(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, SeracError) else type(error).__name__
        self._channel.say(orders.Unable(reason[: orders.SENTENCE // 4]))  # a character has at most 4 bytes
        self._lost(reason)
