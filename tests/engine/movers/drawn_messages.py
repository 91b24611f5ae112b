"""Messages of every kind with contents drawn by a seed, and whether two of them are the same."""

import dataclasses
import random

import numpy as np

from engine.core import handoff, membership, messages
from engine.core.blocks import Content
from engine.core.events import Emission
from engine.core.request import Request, Sampling, Stopping
from engine.core.sequence import Part
from engine.core.session import Packet
from engine.errors import SeracError
from engine.movers.geometry import Geometry
from engine.movers.parts import Heads
from engine.movers.words import CARRIED, ERRORS, KINDS

GEOMETRY = Geometry(2, 4, 8, "float16", 4, "weights-1", "bf16 sums in f32")
WORDS = ("", "a", "p0.3fa9", "Grüße, 世界", "x" * 200)


def same(left: object, right: object) -> bool:
    """Equal in every field, arrays in dtype and shape too, errors in all that a client is told."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, SeracError):
        return (str(left), left.field, left.retry_after_s) == (str(right), right.field, right.retry_after_s)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    return left == right


class Drawn:
    """`any(kind)` makes one. Moments are multiples of 1/1024, which sums and differences keep."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def whole(self, most: int = 2**63 - 1) -> int:
        return self.rng.choice([0, 1, self.rng.randrange(1000), self.rng.randrange(most)])

    def words(self) -> str:
        return self.rng.choice(WORDS)

    def maybe(self, value: object) -> object:
        return value if self.rng.random() < 0.5 else None

    def moment(self) -> float:
        return self.rng.randrange(-(2**20), 2**20) / 1024

    def tokens(self, most: int = 40) -> tuple[int, ...]:
        return tuple(self.rng.randrange(2**31) for _ in range(self.rng.randrange(most)))

    def request(self) -> Request:
        rng = self.rng
        sampling = Sampling(
            rng.choice([0, 0.7, 1.0]),
            rng.choice([-1, 0, 40]),
            rng.random(),
            rng.random(),
            self.maybe(self.whole()),
            1.5,
            rng.uniform(-2, 2),
            -2,
            tuple((k * 7, rng.choice([-100, 1.25])) for k in range(rng.randrange(4))),
            self.maybe(rng.randrange(21)),
            self.maybe(0),
            rng.randint(1, 128),
        )
        sampling = dataclasses.replace(sampling, logit_bias=tuple((t, float(v)) for t, v in sampling.logit_bias))
        stop = tuple(rng.choice(WORDS[1:]) for _ in range(rng.randrange(3)))
        stopping = Stopping(self.maybe(self.whole()), self.whole(), stop, self.tokens(4), *self.switches(2))
        salt = rng.randbytes(rng.randrange(40))
        return Request(
            self.words(),
            self.tokens(300),
            sampling,
            stopping,
            self.maybe(self.moment()),
            salt,
            self.words(),
            *self.switches(1),
        )

    def switches(self, count: int) -> list[bool]:
        return [self.rng.random() < 0.5 for _ in range(count)]

    def submit(self) -> messages.Submit:
        count = self.rng.randint(1, 4)
        parts = tuple(Part(self.whole(), self.rng.randrange(128), self.tokens(9)) for _ in range(count))
        return messages.Submit(self.request(), self.whole(), parts)

    def error(self) -> SeracError | None:
        kind = ERRORS[self.rng.choice(sorted(ERRORS))]
        retry = self.rng.choice([None, 0.5])
        return self.maybe(kind(self.words(), field=self.maybe("seed"), retry_after_s=retry))

    def columns(self, count: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(self.rng.randrange(1000))
        logprob, tops = rng.random(count, np.float32), rng.random((count, 20), np.float32)
        return (
            logprob,
            np.arange(count, dtype=np.int32),
            rng.integers(0, 99, (count, 20)).astype(np.int32),
            tops,
        )

    def emission(self) -> Emission:
        count = self.rng.randrange(6)
        serials = np.array([self.whole() for _ in range(count)], np.int64)
        rest = self.columns(count) if self.rng.random() < 0.5 else ()
        return Emission(serials, np.arange(count, dtype=np.int32), serials // 2, *rest)

    def news(self) -> tuple:
        draw, keys = self.rng.randbytes, [self.rng.randbytes(32) for _ in range(self.rng.randrange(5))]
        return tuple((k, Content(k, draw(64), draw(32), draw(32)) if draw(1) < b"\x80" else None) for k in keys)

    def packet(self) -> Packet:
        if self.rng.random() < 0.2:
            return Packet(self.whole(), 0, self.whole(), None)
        carried = self.any(self.rng.choice([kind for kind, _ in CARRIED.values()]))
        return Packet(self.whole(), 1 + self.rng.randrange(2**40), self.whole(), carried)

    def parts(self) -> handoff.Parts:
        count = self.rng.randint(1, 5)
        rng = np.random.default_rng(self.rng.randrange(2**32))
        arrays = (rng.random(GEOMETRY.shape(count)).astype(np.float16) for _ in range(2))
        return handoff.Parts(self.whole(), self.whole(), self.whole(), count, Heads(*arrays))

    def any(self, kind: type) -> object:
        """A message of `kind`."""
        rng, n = self.rng, self.whole
        states = tuple((state, n()) for state in ("copying", "reserved")[: rng.randrange(3)])
        makers = {
            messages.Submit: self.submit,
            messages.Expect: lambda: messages.Expect(
                n(), self.words(), self.submit(), rng.randbytes(16), rng.random() < 0.5
            ),
            messages.Prefill: lambda: messages.Prefill(n(), self.words(), self.request(), rng.randbytes(16)),
            messages.Cancel: lambda: messages.Cancel(tuple(n() for _ in range(3)), n(), self.words()),
            messages.Hold: lambda: messages.Hold((n(),), rng.random() < 0.5),
            messages.Fence: lambda: messages.Fence(self.words()),
            messages.Meet: lambda: messages.Meet(self.words(), ("127.0.0.1:1",), 1 + n(), rng.random() < 0.5),
            messages.Prefixes: lambda: messages.Prefixes(rng.random() < 0.5, rng.random() < 0.5),
            messages.Blocks: lambda: messages.Blocks(rng.random() < 0.5, self.news()),
            messages.Started: lambda: messages.Started(n(), n()),
            Emission: self.emission,
            messages.Scored: lambda: messages.Scored(n(), n(), *self.columns(rng.randrange(5))),
            messages.Over: lambda: messages.Over(n(), self.words(), self.maybe(n()), self.error()),
            messages.Committed: lambda: messages.Committed(n()),
            messages.Failed: lambda: messages.Failed(n(), self.words(), self.error()),
            messages.Load: lambda: messages.Load(*(n() for _ in range(9)), states, *(n() for _ in range(9))),
            handoff.Fetch: lambda: handoff.Fetch(n(), n(), n(), n(), rng.randbytes(16)),
            handoff.Withdrawn: lambda: handoff.Withdrawn(n(), n()),
            handoff.Stopped: lambda: handoff.Stopped(n(), rng.choice(["cancelled", "complete", "unknown"])),
            handoff.Gone: lambda: handoff.Gone(n(), self.words()),
            membership.Hello: lambda: membership.Hello(
                self.words(), rng.choice(["prefill", "decode", "both"]), ("unix:/a/b", "127.0.0.1:1"), 1 + n()
            ),
            membership.Welcome: lambda: membership.Welcome(self.words(), n()),
            membership.Refused: lambda: membership.Refused(self.words()),
            membership.Line: lambda: membership.Line(self.words()),
            Packet: self.packet,
        }
        return makers[kind]() if kind in makers else kind(n())

    def one(self) -> object:
        """A message of some kind, `Parts` among them."""
        if self.rng.random() < 0.2:
            return self.parts()
        return self.any(self.rng.choice([kind for kind, _ in KINDS.values()]))
