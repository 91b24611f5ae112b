"""Which process of a lane holds which kv heads, and which sends which of them to which of another lane's.

    lane of 2 processes, tp=4, 4 heads    | 0 1 | 2 3 |         piece 0 -> 0: [0, 2)   0 -> 1: [0, 2)
    lane of 4 processes, tp=8, 4 heads    | 0 | 1 | 2 | 3 |     ...

Devices are numbered through a lane, process after process, and a mesh of tp devices has axes (kv, rep) as
sharding/mesh.py makes them: device d holds the heads of kv index d // rep. Where several processes hold the same
head they take turns by the number of the process that wants it, so that none sends more than its share, and each
process gets each of its heads once however many of its devices repeat it.

Pure; cost: microseconds, once a pair of lanes.
"""

from typing import NamedTuple


class Span(NamedTuple):
    """A lane's devices and the processes that they are spread over, evenly."""

    tp: int
    processes: int


class Piece(NamedTuple):
    """Heads first_head up to, not including, stop_head go from one process to another; processes by rank."""

    source: int
    target: int
    first_head: int
    stop_head: int


def heads_of(kv_heads: int, span: Span, rank: int) -> tuple[int, int]:
    """The heads from first up to, not including, stop that the devices of process `rank` hold."""
    kv = min(kv_heads, span.tp)
    rep, held, local = span.tp // kv, kv_heads // kv, span.tp // span.processes
    first, last = rank * local // rep, ((rank + 1) * local - 1) // rep
    return first * held, (last + 1) * held


def pieces(kv_heads: int, source: Span, target: Span) -> tuple[Piece, ...]:
    """What is sent when KV of all heads moves, in the order of targets, then of heads."""
    held = [heads_of(kv_heads, source, rank) for rank in range(source.processes)]
    made: list[Piece] = []
    for rank in range(target.processes):
        for head in range(*heads_of(kv_heads, target, rank)):
            holders = [k for k, (first, stop) in enumerate(held) if first <= head < stop]
            sender = holders[rank % len(holders)]
            if made and made[-1][:2] == (sender, rank):
                made[-1] = made[-1]._replace(stop_head=head + 1)
            else:
                made.append(Piece(sender, rank, head, head + 1))
    return tuple(made)


def rank_name(lane: str, rank: int) -> str:
    """How process `rank` of a lane is called on links; the leader is the lane."""
    return f"{lane}/{rank}" if rank else lane


def lane_of(name: str) -> tuple[str, int]:
    """The lane and the rank that a link's name says; what is no rank counts as part of a name."""
    lane, slash, rank = name.partition("/")
    return (lane, int(rank)) if slash and rank.isdecimal() else (name, 0)
