"""Which lane serves a request, or which two: that computes its prompt and that decodes.

    lanes that take new work --by role--> (decoding, prefilling) --predicted seconds--> (source or None, target)

By predicted seconds: what is queued on the lanes, the prompt without what each has cached, and the move. A prompt
that is short or cached where it will decode skips the prefill lane; so does one whose tokens are to be scored.
Without a lane of the right role any other serves. Pure; cost: a few sums for each pair of lanes.
"""

from collections.abc import Iterable, Sequence

from engine.core.admission import Lane
from engine.core.request import Request
from engine.core.whereabouts import Whereabouts

MOVE_S = 5e-3  # a handoff, beside its prompt
SHORT_BLOCKS = 2  # a prompt of which no more is to be computed skips the prefill lane


def pools(lanes: Iterable[Lane], request: Request, length: int) -> tuple[list[Lane], list[Lane]]:
    """(lanes that may decode, lanes that may prefill for them), none of them retired."""
    here = [lane for lane in lanes if not lane.retired]
    decoding = [lane for lane in here if lane.role != "prefill"] or here
    prefilling = [lane for lane in here if lane.role == "prefill"]
    return decoding, [] if request.sampling.prompt_logprobs is not None or length < 2 else prefilling


def may_serve_alone(lane: Lane, rest: int, prefilling: Sequence[Lane], block_size: int) -> bool:
    """Whether a lane may compute the `rest` of a prompt that it decodes."""
    return lane.role != "decode" or not prefilling or rest <= SHORT_BLOCKS * block_size


def choose(
    where: Whereabouts,
    decoding: Sequence[Lane],
    prefilling: Sequence[Lane],
    length: int,
    chain: list[bytes],
    block_size: int,
) -> tuple[Lane | None, Lane]:
    """(the lane that prefills or None, the lane that decodes), of least predicted seconds; the first of equals."""
    blocks = -(-length // block_size)
    ways: list[tuple[float, Lane | None, Lane]] = []
    for target in decoding:
        rest = length - where.cached(target.name, chain)
        if may_serve_alone(target, rest, prefilling, block_size):
            ways.append((target.wait_s(rest, blocks), None, target))
        for source in prefilling:
            if source is not target:
                todo = length - where.cached(source.name, chain)
                moved = source.wait_s(todo, blocks) + target.wait_s(1, blocks) + MOVE_S
                ways.append((moved, source, target))
    best = min(ways, key=lambda way: way[0])
    return best[1], best[2]
