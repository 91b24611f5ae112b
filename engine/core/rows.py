"""The rows of a lane as arrays of state: a line a row, so that a step of thousands of decodes is a few numpy calls.

    length    tokens known or being drawn      computed  positions whose KV is there or being made
    known     tokens known on this host        target    where `computed` may go now; a row wants a step while
    limit     length at which it ends                    computed < target; 0 while it is empty, held or prefills
    settled   positions of its prompt whose KV was collected

    0 <= settled <= computed <= length <= limit,   known <= length <= known + steps in flight

`occupant[row]` is the sequence, `serial[row]` its serial or -1: a result for another serial is a zombie's.
Source: costs in DESIGN.md (arrays of state about 22 us flat; objects 0.6-1.6 us a row).
"""

import numpy as np

from engine.core.sequence import Sequence, State


class Rows:
    """State of `num_rows` rows of at most `max_length` tokens."""

    def __init__(self, num_rows: int, max_length: int, block_size: int, vocab: int, eos_ids: tuple[int, ...]):
        self.num_rows, self.max_length, self.block_size = num_rows, max_length, block_size
        self.history = np.zeros((num_rows, max_length), np.int32)
        self.table = np.zeros((num_rows, -(-max_length // block_size)), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.length = np.zeros(num_rows, np.int32)
        self.computed = np.zeros(num_rows, np.int32)
        self.target = np.zeros(num_rows, np.int32)
        self.known = np.zeros(num_rows, np.int32)
        self.limit = np.zeros(num_rows, np.int32)
        self.settled = np.zeros(num_rows, np.int32)
        self.serial = np.full(num_rows, -1, np.int64)
        self.plain = np.ones(num_rows, bool)
        self.watches = np.zeros(num_rows, bool)  # EOS ends the row
        self.stops: dict[int, frozenset[int]] = {}  # rows with stop ids beside EOS
        self.bound: set[int] = set()  # rows that need their last token on the host before the next step
        self.is_eos = np.zeros(vocab, bool)
        self.is_eos[list(eos_ids)] = True
        self.eos = frozenset(eos_ids)
        self.occupant: list[Sequence | None] = [None] * num_rows
        self.free = list(range(num_rows - 1, -1, -1))

    def seat(self, sequence: Sequence, blocks: list[int], computed: int) -> int:
        """Give `sequence` a free row with the KV of `computed` tokens already in `blocks`."""
        row = self.free.pop()
        length = len(sequence.tokens)
        self.history[row, :length] = sequence.tokens
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self.length[row] = self.known[row] = length
        self.computed[row] = self.settled[row] = computed
        self.target[row] = 0
        self.limit[row] = sequence.limit
        self.serial[row] = sequence.serial
        self.plain[row] = sequence.draw.plain
        self.watches[row] = self.eos <= sequence.stop_ids
        if others := sequence.stop_ids - (self.eos if self.watches[row] else frozenset()):
            self.stops[row] = others
        if sequence.host_bound:
            self.bound.add(row)
        self.occupant[row] = sequence
        sequence.row, sequence.state = row, State.RUNNING
        return row

    def leave(self, sequence: Sequence) -> tuple[list[int], int]:
        """Empty the row of `sequence`; its tokens are brought up to date.

        Returns its blocks and the positions whose KV is settled in them.
        """
        row, seated = sequence.row, len(sequence.tokens)
        known = int(self.known[row])
        settled = known - 1 if known > seated else int(self.settled[row])
        sequence.tokens = self.history[row, :known].copy()
        blocks = [int(block) for block in self.table[row, : self.num_blocks[row]]]
        self.serial[row] = -1
        self.computed[row] = self.target[row] = self.num_blocks[row] = 0
        self.length[row] = self.known[row] = self.limit[row] = self.settled[row] = 0
        self.stops.pop(row, None)
        self.bound.discard(row)
        self.occupant[row] = None
        self.free.append(row)
        sequence.row = -1
        return blocks, settled

    def wanting(self) -> np.ndarray:
        """Rows that want one more token computed, in row order; int64 [n]."""
        return np.flatnonzero(self.computed < self.target)

    def open(self, row: int) -> None:
        """Let the row decode as far as it may."""
        ready = self.known if row in self.bound else self.length
        self.target[row] = min(ready[row], self.limit[row] - 1)

    def grow(self, rows: np.ndarray, blocks: list[int]) -> None:
        """Append one block to each of `rows`."""
        self.table[rows, self.num_blocks[rows]] = blocks
        self.num_blocks[rows] += 1

    def decode(self, rows: np.ndarray) -> None:
        """Each of `rows` computes its newest token and draws the next."""
        self.computed[rows] += 1
        length = self.length[rows] + 1
        self.length[rows] = length
        self.target[rows] = np.minimum(length, self.limit[rows] - 1)
        for row in self.bound:
            self.target[row] = min(self.target[row], self.known[row])

    def receive(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Write drawn `tokens` into the history; returns a mask of the rows they end."""
        known = self.known[rows]
        self.history.ravel()[rows * self.max_length + known] = tokens
        known += 1
        self.known[rows] = known
        for row in self.bound.intersection(rows.tolist()):
            sequence = self.occupant[row]
            if sequence is not None and not sequence.held:
                self.open(row)
        ends: np.ndarray = (known >= self.limit[rows]) | (self.is_eos[tokens] & self.watches[rows])
        if self.stops:
            for k, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
                if token in self.stops.get(row, ()):
                    ends[k] = True
        return ends

    def check(self, in_flight: int) -> None:
        """Assert the inequalities above. For tests and idle moments."""
        live = self.serial >= 0
        assert (self.settled <= self.computed)[live].all() and (self.computed <= self.length)[live].all()
        assert (self.length <= self.limit)[live].all() and (self.target <= self.length)[live].all()
        assert (self.known <= self.length)[live].all() and (self.length <= self.known + in_flight)[live].all()
        assert (self.num_blocks * self.block_size >= self.computed)[live].all()
        assert not self.target[~live].any() and not self.num_blocks[~live].any()
        assert sorted(self.free) == [row for row, sequence in enumerate(self.occupant) if sequence is None]
        assert sorted(self.free) == np.flatnonzero(~live).tolist()
        for row, sequence in enumerate(self.occupant):
            assert sequence is None or (sequence.row == row and sequence.serial == self.serial[row])
