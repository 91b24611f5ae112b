"""Every state that two sides of a handoff can get into: an exhaustive search over engine/core/handoff.py.

    a state   (target, source) of each handoff, what the target's blocks hold, what the network carries
    a move    deliver any message that was said, whole or damaged, now or again | lose all of them | a timer
              compute, forget, send | reserve with any prefix | cancel either side | either process dies | fence

The network is the set of what was said: a message in it may arrive at any time, in any order, any number of times
or never, which is all that loss, delay, doubling and reordering can do. Time is left out: a timer may run out at
any moment. The second handoff gets the blocks of the first as soon as those are nobody's or the sequence's.
Bounded: the blocks, the credit, how often the target asks. Cost: about 15 us a move.
"""

from collections import defaultdict

import pytest

from tests.sim.mutants import Mutant, load

DEAD = "dead"
FREE = ("committed", "released", "aborted")  # no byte of this handoff may land any more
MOVES = {  # of a target
    "offered": {"reserved", "committed", "aborted"},
    "reserved": {"offered", "copying", "committed", "quarantined", "aborted"},
    "copying": {"committed", "quarantined", "aborted"},
    "committed": {"released"},
    "quarantined": {"aborted"},
    "released": set(),
    "aborted": set(),
}
HEALTHY = {
    "deliver",
    "timer",
    "reserve",
    "seat",
    "compute",
    "send",
    "front",
    "fence the dead",
}  # what goes well of itself


class Model:
    """The moves of a small world; `module` is handoff.py, or one with a bug in it."""

    def __init__(self, module, blocks, asks, handoffs, credit=2):
        self.m, self.blocks, self.asks, self.handoffs = module, blocks, asks, handoffs
        module.CREDIT, module.MAX_BAD = credit, 2
        self.messages, self.bits = [], {}

    # -- states ---------------------------------------------------------------------------------------------------

    def first(self):
        return ((self.fresh(1),) + (None,) * (self.handoffs - 1), (None,) * self.blocks, 0)

    def fresh(self, number):
        target, source = self.m.Target(number, "s", self.blocks), self.m.Source(number, "t", self.blocks)
        return self.pack_target(target), self.pack_source(source)

    def pack_target(self, t):
        return t.state.value, t.generation, t.have, t.asked, t.bad, t.offered, t.ask_at < float("inf")

    def unpack_target(self, number, packed):
        state, generation, have, asked, bad, offered, armed = packed
        ask_at = 0.0 if armed else float("inf")
        state = self.m.State(state)
        return self.m.Target(
            number, "s", self.blocks, state, generation, have, asked, bad, offered, b"", "", ask_at
        )

    def pack_source(self, s):
        return s.state.value, s.ready, s.sent, s.allowed, s.generation, s.seated

    def unpack_source(self, number, packed):
        state, ready, sent, allowed, generation, seated = packed
        state = self.m.State(state)
        return self.m.Source(number, "t", self.blocks, state, ready, sent, allowed, generation, seated)

    def bit(self, message):
        """Its place in the network. Messages of two kinds may be equal as tuples."""
        key = type(message).__name__, message
        if key not in self.bits:
            self.bits[key] = 1 << len(self.messages)
            self.messages.append(message)
        return self.bits[key]

    # -- moves ----------------------------------------------------------------------------------------------------

    def moves(self, state):
        """(name, state after) of every move; raises AssertionError where one does what no machine may."""
        sides, blocks, net = state
        if net and sides[-1] is None or len(sides) == 1:
            yield "lose", (sides, blocks, 0)
        for k, pair in enumerate(sides):
            if pair is None:
                earlier = sides[k - 1]
                if earlier is not None and earlier[0][0] in FREE:
                    yield "begin", (sides[:k] + (self.fresh(k + 1),) + sides[k + 1 :], blocks, net)
                continue
            number, (target, source) = k + 1, pair
            if k:
                yield from self._smooth_moves(state, k, number, target, source)
                continue
            if target[0] != DEAD:
                yield from self._target_moves(state, k, number, target, source)
            if source[0] != DEAD:
                yield from self._source_moves(state, k, number, target, source)
        rest = net
        while rest:
            bit = rest & -rest
            rest ^= bit
            yield from self._deliver(state, self.messages[bit.bit_length() - 1])

    def _smooth_moves(self, state, k, number, target, source):
        """Of a second handoff, which nothing happens to: only what is left of the first may disturb it."""
        if target[0] == "offered" and target[5]:
            moves = self._target_moves(state, k, number, target, source)
            yield next(moves)  # nothing found
        for name, after in self._source_moves(state, k, number, target, source):
            if name in ("seat", "compute", "send"):
                yield name, after

    def _after(self, state, k, target=None, source=None, said=(), blocks=None):
        sides, held, net = state
        pair = (target or sides[k][0], source or sides[k][1])
        for message in said:
            net |= self.bit(message)
        return sides[:k] + (pair,) + sides[k + 1 :], held if blocks is None else blocks, net

    def _target_moves(self, state, k, number, target, source):
        def done(name, machine, said=(), blocks=None):
            return name, self._after(state, k, self.pack_target(machine), None, said, blocks)

        if target[0] == "offered" and target[5] and target[1] <= self.asks:
            for found in range(self.blocks + 1):
                machine = self.unpack_target(number, target)
                said = machine.reserved(0.0, found)
                held = tuple((number, p) for p in range(found)) + (None,) * (self.blocks - found)
                yield done("reserve", machine, said, held)
        machine = self.unpack_target(number, target)
        given_up = source[0] in ("aborted", DEAD) or target[1] > self.asks
        front = target[0] == "offered" and given_up  # the front hears of it and says so
        yield done("front" if front else "cancel", machine, machine.cancel(0.0, "gone"))
        for name, now in (("timer", 1.0), ("stall", 1000.0)):
            machine = self.unpack_target(number, target)
            said = machine.tick(now)
            if machine.generation <= max(self.asks, target[1]):
                yield done(name, machine, said)
        machine = self.unpack_target(number, target)
        machine.fence("gone")
        yield done("fence the dead" if source[0] == DEAD else "fence", machine)
        yield "die", self._after(state, k, (DEAD, target[0] in ("committed", "released")))

    def _source_moves(self, state, k, number, target, source):
        def done(name, machine, said=()):
            return name, self._after(state, k, None, self.pack_source(machine), said)

        over = source[0] in ("released", "aborted")
        if not over:
            machine = self.unpack_source(number, source)
            if not machine.seated:
                yield done("seat", machine, machine.computed(0.0, 0))
            else:
                if machine.ready < self.blocks:
                    yield done("compute", machine, machine.computed(0.0, machine.ready + 1))
                if self.handoffs == 1:  # one is enough to forget
                    machine = self.unpack_source(number, source)
                    machine.unseated()
                    yield done("forget", machine)
                machine = self.unpack_source(number, source)
                yield done("timer", machine, machine.tick(1.0))
            machine = self.unpack_source(number, source)
            machine.cancel("gone")
            yield done("cancel source", machine)
        machine = self.unpack_source(number, source)
        machine.tick(1000.0)
        yield done("stall", machine)
        for most in (1, 2):
            machine = self.unpack_source(number, source)
            if (cut := machine.next_parts(most)) is not None:
                first, count = cut
                assert source[5] and first + count <= source[1], "a part of blocks that are not computed"
                assert not over, "a part of what was given back"
                kv = tuple((number, p) for p in range(first, first + count))
                part = self.m.Parts(number, machine.generation, first, count, kv)
                yield done("send", machine, [part])
        yield "die source", self._after(state, k, None, (DEAD,))

    def _deliver(self, state, message):
        k = message.handoff - 1
        target, source = state[0][k]
        if isinstance(message, self.m.Later | self.m.Fetch | self.m.Done | self.m.Stop):
            if source[0] != DEAD:
                machine = self.unpack_source(k + 1, source)
                said = machine.receive(0.0, message)
                yield "deliver", self._after(state, k, None, self.pack_source(machine), said)
        elif target[0] != DEAD:
            yield from self._deliver_to_target(state, k, message)
            if isinstance(message, self.m.Parts):
                yield from self._deliver_to_target(state, k, message._replace(staged=None))

    def _deliver_to_target(self, state, k, message):
        _, blocks, _ = state
        target = state[0][k][0]
        machine = self.unpack_target(k + 1, target)
        write, said = machine.receive(0.0, message)
        if write:
            assert target[0] in ("reserved", "copying"), f"a block is written in state {target[0]}"
            assert message.staged is not None, "what came damaged is written"
            assert message.generation == target[1], "a part of an earlier asking is written"
            before, have = target[2], machine.have
            assert blocks[before:have] == (None,) * (have - before) or k, "a block is written twice"
            assert len(message.staged) == have - before, "more or less is written than came"
            blocks = blocks[:before] + message.staged + blocks[have:]
        elif machine.state is self.m.State.OFFERED and target[0] == "reserved":
            blocks = (None,) * self.blocks
        if machine.generation <= max(self.asks, target[1]):
            name = "damage" if isinstance(message, self.m.Parts) and message.staged is None else "deliver"
            yield name, self._after(state, k, self.pack_target(machine), None, said, blocks)

    # -- what holds -----------------------------------------------------------------------------------------------

    def check(self, before, name, after):
        """What holds of every move, beside what `moves` asserts of writes."""
        for k, (old, new) in enumerate(zip(before[0], after[0], strict=True)):
            if old is None or old == new:
                continue
            (t, s), (u, v) = old, new
            if t != u and u[0] != DEAD:
                assert u[0] == t[0] or u[0] in MOVES[t[0]], f"a target goes from {t[0]} to {u[0]}"
                back = (t[0], u[0]) == ("reserved", "offered")
                assert u[1] >= t[1] and (back or u[2] >= t[2]), "generation and blocks only grow"
                assert not back or s[0] != "copying", "blocks go back while the source may send"
                assert u[0] != "reserved" or t[5] or t[0] == "reserved", (
                    "blocks are held before the source has its own"
                )
                if u[0] == "committed":
                    want = tuple((k + 1, p) for p in range(self.blocks))
                    assert u[2] == self.blocks and after[1] == want, "committed without its content"
                if u[0] == "aborted" and t[0] not in ("offered", "aborted") and not name.startswith("fence"):
                    assert s[0] in ("released", "aborted", DEAD), f"blocks leave {t[0]} while the source may send"
            if s != v and v[0] != DEAD:
                assert v[4] >= s[4], "the source's generation only grows"
                assert u[0] == DEAD or v[4] <= u[1], "the source sends for an asking that never was"
                assert s[0] not in ("released", "aborted") or v[0] in (s[0], "released"), "a source that was over"
                if v[0] == "released":
                    committed = u[1] if u[0] == DEAD else u[0] in ("committed", "released")
                    assert committed, "a source lets go before the target has everything"

    def over(self, state):
        """Nothing is open on either side."""
        ends = (DEAD, "released", "aborted")
        return all(pair is None or (pair[0][0] in ends and pair[1][0] in ends) for pair in state[0])

    def hopeful(self, state):
        """Nobody gave up, and the target may ask once more."""
        return all(
            pair is None
            or (pair[0][0] in ("offered", "reserved", "copying") and pair[0][1] < self.asks)
            and pair[1][0] in ("offered", "copying")
            for pair in state[0]
        )

    def whole(self, state):
        return all(pair is None or pair[0][0] == "committed" for pair in state[0])


def search(model):
    """(states, moves): every reachable state, each checked. Raises AssertionError with the shortest way there."""
    first = model.first()
    seen, queue, backwards = {first: None}, [first], defaultdict(list)
    moves = 0
    for state in queue:
        try:
            for name, after in model.moves(state):
                moves += 1
                if after == state:
                    continue
                model.check(state, name, after)
                if name in HEALTHY or name == "stall":
                    backwards[after].append((state, name))
                if after not in seen:
                    seen[after] = (state, name)
                    queue.append(after)
        except AssertionError as error:
            raise AssertionError(f"{error}; after {way(seen, state)}") from error
    if model.handoffs > 1:
        return len(seen), moves
    ending = reaching(queue, backwards, model.over, HEALTHY | {"stall"})
    for state in queue:
        assert state in ending, f"no way to an end; after {way(seen, state)}"
    committing = reaching(queue, backwards, model.whole, HEALTHY)
    for state in queue:
        assert state in committing or not model.hopeful(state), f"no way to commit; after {way(seen, state)}"
    return len(seen), moves


def reaching(states, backwards, goal, names):
    """The states from which moves of these names lead to a goal."""
    found = {state for state in states if goal(state)}
    todo = list(found)
    while todo:
        for before, name in backwards[todo.pop()]:
            if name in names and before not in found:
                found.add(before)
                todo.append(before)
    return found


def way(seen, state):
    """The moves that lead to a state."""
    names = []
    while seen[state] is not None:
        state, name = seen[state]
        names.append(name)
    return " > ".join(reversed(names))


BUGS = (
    ("take a part of an earlier asking", "(part.generation, part.first) != wanted", "part.first != self.have"),
    ("count a doubled part twice", "(part.generation, part.first) != wanted", "part.generation != self.generation"),
    ("write what came damaged", "        if part.staged is None:\n", "        if False:\n"),
    ("commit a block early", "        if self.have == self.total:\n", "        if self.have >= self.total - 1:\n"),
    ("give blocks back at once", "= State.QUARANTINED, reason\n", "= State.ABORTED, reason\n"),
    ("never ask again", "            return self._ask(now)\n        self.ask_at, self.wait_s = now",
     "            return []\n        self.ask_at, self.wait_s = now"),
    ("never say Stop again", " else Stop(self.handoff)]\n", " else Stop(self.handoff)][1:]\n"),
    ("answer Stop and go on", '            case Stop():\n', "            case Stop(handoff=0):\n"),
    ("send after Stopped", '                self.cancel("the target stopped")\n', ""),
    ("send what is not computed", "min(self.ready, self.allowed,", "min(self.allowed,"),
    ("go back to an earlier asking", "fetch.generation > self.generation:", "fetch.generation != self.generation:"),
    ("serve what was withdrawn", "            if fetch.generation <= self.generation:  # withdrawn\n",
     "            if False:\n"),
    ("hear of an old withdrawal", "            case Withdrawn(generation=self.generation) if",
     "            case Withdrawn() if"),
    ("reserve unasked", "known, self.offered = self.offered, True", "known, self.offered = self.offered, False"),
    ("never offer again", "        elif offers and self.target and now >= self.ask_at:\n",
     "        elif offers and now == self.ask_at == self.heard_at:\n"),
    ("serve what is over", "            return [Gone(self.handoff, self.reason or \"it is over\")]\n",
     "            pass\n"),
    ("let go at Stop", "                self.cancel(\"the target stopped\")\n",
     "                self.state = State.RELEASED\n"),
    ("hear no answer to Stop", "            case Stopped() | Gone() if self.state is State.QUARANTINED:\n",
     "            case Released() if self.state is State.QUARANTINED:\n"),
)  # fmt: skip


def machines(before="", after=""):
    """A copy of engine/core/handoff.py of our own, whole or with one place changed."""
    if not before:
        before = after = "class State(Enum):"
    return load(Mutant("", "engine.core.handoff", before, after))


@pytest.mark.parametrize(
    ("blocks", "asks", "handoffs", "at_least"),
    [(3, 1, 1, 100_000), (2, 2, 1, 130_000), (1, 3, 1, 58_000), (2, 1, 2, 160_000)],
)
def test_no_state_that_two_sides_can_get_into_breaks_a_promise(blocks, asks, handoffs, at_least):
    states, moves = search(Model(machines(), blocks, asks, handoffs))
    print(f"{blocks} blocks, {asks} askings, {handoffs} handoffs: {states} states, {moves} moves")
    assert states >= at_least, "the search has become a smaller one"


@pytest.mark.parametrize(("name", "before", "after"), BUGS, ids=[row[0].replace(" ", "-") for row in BUGS])
def test_the_search_finds_a_bug_made_on_purpose(name, before, after):
    with pytest.raises(AssertionError, match="; after "):
        search(Model(machines(before, after), 2, 2, 1))
