"""Which shard sends which kv heads to which shard, when two lanes split the same heads differently.

    K = 4    source kv=2        | 0 1 | 2 3 |          shard 0 -> 0: [0, 1)   shard 0 -> 1: [1, 2)
             target kv=4        | 0 | 1 | 2 | 3 |      shard 1 -> 2: [2, 3)   shard 1 -> 3: [3, 4)

Both meshes have axes (kv, rep) as in sharding/mesh.py: shard s = kv_index * rep + rep_index holds the heads of its
kv_index. A target shard gets each of its heads once, from one of the source shards that hold it; where rep > 1
these take turns, so that none sends more than its share.

Cost: microseconds, once a pair of lanes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sharding.rules import ShardingError

Axes = tuple[int, int]  # (kv, rep)


class Overlap(NamedTuple):
    """Heads first_head up to, not including, stop_head go from one shard to another; shards are flat numbers."""

    source_shard: int
    target_shard: int
    first_head: int
    stop_head: int


class Moved(NamedTuple):
    """Bytes of one move: all of them, and those of the device that sends and of the one that receives most."""

    total: int
    most_sent: int
    most_received: int


def overlaps(kv_heads: int, source: Axes, target: Axes) -> tuple[Overlap, ...]:
    """The plan of a move between two lanes of `kv_heads` kv heads, in the order of target shards, then of heads.

    Raises ShardingError when a mesh does not split the heads evenly.
    """
    wide, narrow = _heads_held(kv_heads, source), _heads_held(kv_heads, target)
    turns = [0] * source[0]
    plan = []
    for shard in range(target[0] * target[1]):
        first = shard // target[1] * narrow
        stop = first + narrow
        for group in range(first // wide, (stop - 1) // wide + 1):
            sender = group * source[1] + turns[group] % source[1]
            turns[group] += 1
            plan.append(Overlap(sender, shard, max(first, group * wide), min(stop, (group + 1) * wide)))
    return tuple(plan)


def moved_bytes(plan: Sequence[Overlap], head_bytes: int) -> Moved:
    """What a move by `plan` sends when one head has `head_bytes` bytes."""
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for piece in plan:
        heads = piece.stop_head - piece.first_head
        sent[piece.source_shard] = sent.get(piece.source_shard, 0) + heads * head_bytes
        received[piece.target_shard] = received.get(piece.target_shard, 0) + heads * head_bytes
    return Moved(sum(sent.values()), max(sent.values(), default=0), max(received.values(), default=0))


def _heads_held(kv_heads: int, axes: Axes) -> int:
    kv, rep = axes
    if kv < 1 or rep < 1 or kv_heads < 1 or kv_heads % kv:
        raise ShardingError(
            f"mesh: got kv={kv}, rep={rep} for {kv_heads} kv heads; expected a kv that divides them"
        )
    return kv_heads // kv
