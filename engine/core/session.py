"""Messages between a front and a lane arrive once and in order, over a link that loses, doubles and reorders.

    send(message) -> Packet(number, acknowledged, message) ~~~~> receive(packet) -> messages, in order
                     said again until acknowledged               <~~~~ its own packets acknowledge

One end; the other is its mirror. A packet of another session is not for us: whoever runs the sessions says so to
its sender. Silence longer than SILENT_S means that the peer is lost, and the session with it; a heartbeat is a
packet without a message.
Pure: `now` is an argument. Cost: a dict entry a message until it is acknowledged.
"""

from collections import deque
from typing import NamedTuple

AGAIN_S = 0.25  # a packet that is not acknowledged is said again
BEAT_S = 0.5  # the longest silence of a healthy end
SILENT_S = 3.0  # longer, and the peer counts as lost
WINDOW = 4096  # packets that may be on their way
AHEAD = 8192  # early packets kept for their turn


class Packet(NamedTuple):
    """`number` counts messages from 1; 0 carries none. `acknowledged` is the last one received in order."""

    session: int
    number: int
    acknowledged: int
    message: object | None


class Session:
    """One end of a conversation."""

    def __init__(self, number: int, now: float):
        self.number, self.heard_at = number, now
        self._unacknowledged: deque[tuple[int, object]] = deque()
        self._last = self._received = 0
        self._early: dict[int, object] = {}
        self._said_at = self._again_at = now

    def send(self, now: float, message: object) -> list[Packet]:
        """The packets to put on the link now; what does not fit the window follows by `tick`."""
        self._last += 1
        self._unacknowledged.append((self._last, message))
        if len(self._unacknowledged) == 1:
            self._again_at = now + AGAIN_S
        if len(self._unacknowledged) > WINDOW:
            return []
        return [self._packet(now, self._last, message)]

    def receive(self, now: float, packet: Packet) -> list[object]:
        """The messages that are next in order, now that `packet` has come."""
        assert packet.session == self.number
        self.heard_at = now
        while self._unacknowledged and self._unacknowledged[0][0] <= packet.acknowledged:
            self._unacknowledged.popleft()
            self._again_at = now + AGAIN_S
        if packet.number == 0:
            return []
        if self._received < packet.number <= self._received + AHEAD:
            self._early[packet.number] = packet.message
        ready = []
        while self._received + 1 in self._early:
            self._received += 1
            ready.append(self._early.pop(self._received))
        self._said_at = min(self._said_at, now - BEAT_S + AGAIN_S / 5)  # acknowledge soon
        return ready

    def tick(self, now: float) -> list[Packet]:
        """What must be said again, or a heartbeat when nothing was said for long."""
        if self._unacknowledged and now >= self._again_at:
            self._again_at = now + AGAIN_S
            first = [self._unacknowledged[k] for k in range(min(len(self._unacknowledged), WINDOW))]
            return [self._packet(now, number, message) for number, message in first]
        if now - self._said_at >= BEAT_S:
            return [self._packet(now, 0, None)]
        return []

    def lost(self, now: float) -> bool:
        """The peer was silent for too long."""
        return now - self.heard_at > SILENT_S

    def _packet(self, now: float, number: int, message: object | None) -> Packet:
        self._said_at = now
        return Packet(self.number, number, self._received, message)
