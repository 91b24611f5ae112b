"""The rows of a lane as arrays of state: a line a row, so that a step of thousands of decodes is a few numpy calls.

    known     tokens known on this host      computed  positions whose KV is there or being made
    limit     length at which it ends        target    where `computed` may go before the host hears more;
    settled   positions of its prompt                  a row wants a step while computed < target; 0 while
              whose KV was collected                   it is empty, held or prefills

    0 <= settled <= computed < known + steps in flight,   known <= limit,   computed < limit

Rows that decode together are a Cohort: what a plan says of them is made once and kept until one joins or leaves.
`era` counts departures: who was planned in this era still sits there. `serial[row]` is its occupant's, or -1.
Cost: 10 numpy calls to plan a step, 8 to settle it; at 4,096 rows most is the scatter into the history.
"""

from dataclasses import dataclass

import numpy as np

from engine.core.plan import COUNT, DRAW, ROW, START
from engine.core.sequence import Sequence, State

Picked = np.ndarray | slice  # rows 0..n-1, the usual case, are a slice: numpy then copies nothing


@dataclass(slots=True)
class Cohort:
    """Rows that decode together, in order; n of them."""

    key: bytes  # which
    era: int
    rows: Picked
    numbers: np.ndarray  # int64 [n], the same as an array
    serials: np.ndarray  # int64 [n]
    plain: bool
    starts: np.ndarray  # int32 [n], the position each computes next
    room: np.ndarray  # int32 [n], positions that its blocks hold
    lines: np.ndarray  # int32 [n, 6], the plan's rows but for START and BLOCK

    def full(self) -> np.ndarray:
        """Lines whose next position needs a new block."""
        return np.flatnonzero(self.starts == self.room)


NONE = np.zeros(0, np.int64)
NOBODY = Cohort(b"", -1, slice(0, 0), NONE, NONE, True, NONE, NONE, np.zeros((0, 6), np.int32))


class Rows:
    """State of `num_rows` rows of at most `max_length` tokens."""

    def __init__(self, num_rows: int, max_length: int, block_size: int, vocab: int, eos_ids: tuple[int, ...]):
        self.num_rows, self.max_length, self.block_size = num_rows, max_length, block_size
        self.numbers = np.arange(num_rows)
        self.history = np.zeros((num_rows, max_length), np.int32)
        self._tokens = self.history.reshape(-1)
        self.table = np.zeros((num_rows, -(-max_length // block_size)), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.computed = np.zeros(num_rows, np.int32)
        self.target = np.zeros(num_rows, np.int32)
        self._base = self.numbers * max_length
        self._next = self._base.copy()  # where in _tokens the next known token goes
        self._end = self._next.copy()  # the same of `limit`
        self.settled = np.zeros(num_rows, np.int32)
        self.serial = np.full(num_rows, -1, np.int64)
        self.plain = np.ones(num_rows, bool)
        self.watches = np.zeros(num_rows, bool)  # EOS ends the row
        self.stops: dict[int, frozenset[int]] = {}  # rows with stop ids beside EOS
        self.bound: set[int] = set()  # rows that need their last token on the host before the next step
        self.special = np.zeros(num_rows, bool)  # in stops or bound
        self.eos_ids, self.eos = eos_ids, frozenset(eos_ids)
        self.occupant: list[Sequence | None] = [None] * num_rows
        self.free = list(range(num_rows - 1, -1, -1))
        self.era = 0
        self._cohort = NOBODY

    def known(self, row: int) -> int:
        """Tokens of the row that are known on this host."""
        return int(self._next[row]) - row * self.max_length

    def blocks(self, row: int) -> list[int]:
        """The blocks of the row, in order of position."""
        blocks: list[int] = self.table[row, : self.num_blocks[row]].tolist()
        return blocks

    def missing(self, row: int) -> int:
        """Known tokens of the row that no step computes yet."""
        return self.known(row) - int(self.computed[row])

    def limit(self, row: int) -> int:
        """Length at which the row ends."""
        return int(self._end[row]) - row * self.max_length

    def seat(self, sequence: Sequence, blocks: list[int], computed: int) -> int:
        """Give `sequence` a free row with the KV of `computed` tokens already in `blocks`."""
        row = self.free.pop()
        length = len(sequence.tokens)
        self.history[row, :length] = sequence.tokens
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self.computed[row] = self.settled[row] = computed
        self.target[row] = 0
        self._next[row] = row * self.max_length + length
        self._end[row] = row * self.max_length + sequence.limit
        self.serial[row] = sequence.serial
        self.plain[row] = sequence.draw.plain
        self.watches[row] = self.eos <= sequence.stop_ids
        if others := sequence.stop_ids - (self.eos if self.watches[row] else frozenset()):
            self.stops[row] = others
        if sequence.host_bound:
            self.bound.add(row)
        self.special[row] = row in self.stops or row in self.bound
        self.occupant[row] = sequence
        sequence.row, sequence.state = row, State.RUNNING
        return row

    def leave(self, sequence: Sequence) -> tuple[list[int], int]:
        """Empty the row of `sequence`; its tokens are brought up to date.

        Returns its blocks and the positions whose KV is settled in them.
        """
        row, seated = sequence.row, len(sequence.tokens)
        known = self.known(row)
        settled = known - 1 if known > seated else int(self.settled[row])
        sequence.tokens = self.history[row, :known].copy()
        blocks = self.blocks(row)
        self.serial[row] = -1
        self.computed[row] = self.target[row] = self.num_blocks[row] = self.settled[row] = 0
        self._next[row] = self._end[row] = row * self.max_length
        self.era += 1
        self.stops.pop(row, None)
        self.bound.discard(row)
        self.occupant[row] = None
        self.free.append(row)
        sequence.row = -1
        return blocks, settled

    def cohort(self) -> Cohort:
        """The rows that want one more token computed."""
        wanting = self.computed < self.target
        key = wanting.tobytes()
        if key != self._cohort.key or self.era != self._cohort.era:
            self._cohort = self._gather(key, np.flatnonzero(wanting))
        return self._cohort

    def _gather(self, key: bytes, numbers: np.ndarray) -> Cohort:
        count = len(numbers)
        rows = slice(0, count) if count and numbers[-1] == count - 1 else numbers
        lines = np.zeros((count, 6), np.int32)
        lines[:, ROW] = numbers
        lines[:, COUNT] = lines[:, DRAW] = 1
        starts, room = self.computed[numbers], self.num_blocks[numbers] * self.block_size
        return Cohort(
            key, self.era, rows, numbers, self.serial[numbers], bool(self.plain[rows].all()), starts, room, lines
        )

    def grow(self, cohort: Cohort, full: np.ndarray, blocks: np.ndarray) -> None:
        """Append one of `blocks` to each row in lines `full` of the cohort."""
        rows = cohort.numbers[full]
        self.table[rows, self.num_blocks[rows]] = blocks
        self.num_blocks[rows] += 1
        cohort.room[full] += self.block_size

    def decode(self, cohort: Cohort) -> np.ndarray:
        """Each row of the cohort computes its newest token and draws the next; their rows of the plan."""
        lines = cohort.lines.copy()
        lines[:, START] = cohort.starts
        cohort.starts += 1
        self.computed[cohort.rows] += 1
        return lines

    def open(self, row: int) -> None:
        """Let the row decode as far as it may."""
        last = self.limit(row) - 1
        self.target[row] = min(self.known(row), last) if row in self.bound else last

    def receive(self, rows: Picked, tokens: np.ndarray) -> np.ndarray:
        """Write drawn `tokens` into the history; returns a mask of the rows they end."""
        self._tokens[self._next[rows]] = tokens
        self._next[rows] += 1
        ends: np.ndarray = self._next[rows] >= self._end[rows]
        for eos in self.eos_ids:
            ends |= (tokens == eos) & self.watches[rows]
        if self.bound or self.stops:
            self._receive_special(self.numbers[rows], tokens, ends)
        return ends

    def newest(self, rows: Picked) -> np.ndarray:
        """Position of the newest known token of each row; int64."""
        positions: np.ndarray = self._next[rows] - self._base[rows]
        positions -= 1
        return positions

    def _receive_special(self, rows: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> None:
        """What `receive` does for rows with stop ids of their own or a need of their last token here."""
        for k in np.flatnonzero(self.special[rows]).tolist():
            row = int(rows[k])
            if int(tokens[k]) in self.stops.get(row, ()):
                ends[k] = True
            if row in self.bound and (sequence := self.occupant[row]) is not None and not sequence.held:
                self.open(row)

    def check(self, in_flight: int) -> None:
        """Assert the inequalities above. For tests and idle moments."""
        live = self.serial >= 0
        known, limit = self._next - self.numbers * self.max_length, self._end - self.numbers * self.max_length
        assert (self.settled <= self.computed)[live].all() and (self.computed < known + in_flight)[live].all()
        assert (known <= limit)[live].all() and (self.computed < limit)[live].all()
        assert (self.target < limit)[live].all() and not known[~live].any() and not limit[~live].any()
        assert (self.num_blocks * self.block_size >= self.computed)[live].all()
        assert not self.target[~live].any() and not self.num_blocks[~live].any()
        assert sorted(self.free) == [row for row, sequence in enumerate(self.occupant) if sequence is None]
        assert sorted(self.free) == np.flatnonzero(~live).tolist()
        cohort = self._cohort
        if cohort.era == self.era:
            assert (self.computed[cohort.numbers] == cohort.starts).all()
            assert (self.num_blocks[cohort.numbers] * self.block_size == cohort.room).all()
            assert (self.serial[cohort.numbers] == cohort.serials).all()
        for row, sequence in enumerate(self.occupant):
            assert sequence is None or (sequence.row == row and sequence.serial == self.serial[row])
