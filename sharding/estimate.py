"""What a lane of given sizes costs in bytes and collectives, by arithmetic alone: no device, no array.

    Decoder (sizes of the model, padded) + Lane (tp, kv ways, bytes of a number) + tokens and rows of a step
        block_bytes, pool_blocks    KV pool          -> how many blocks fit, how many sequences
        step_collectives            communication    -> kind, calls, bytes of one step
        peak_temporaries            scratch memory   -> what the largest program keeps live beside its arguments

Bytes are those of one device. The bytes of a collective are those of its result on one device, which is what the
text of a compiled program shows; what crosses a link is `wire_bytes` (ring algorithms).
Cost: microseconds. Source: the shapes of engine/models and engine/runner, counted.
"""

from typing import NamedTuple

WORD = 4  # bytes of an int32 or a float32
PLAIN_WORDS = 4  # of a row, reduced by a plain draw: is it finite, the largest logit, the best draw, its token
PLAIN_CALLS = 3  # XLA joins the two minima in one
QUERY_TILE = 64  # tokens that pallas_kernels/xla/chunks.py takes at a time
GROUP = 16  # tiles of positions that pallas_kernels/xla/decode.py takes at a time
MOST_BIASES = 1024  # of a row of the sampler


class Decoder(NamedTuple):
    """Sizes of a dense decoder; ffn and vocab as they are padded for the lane."""

    num_layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int


class Lane(NamedTuple):
    """How a decoder is spread: tp devices, kv_ways of them splitting the kv heads.

    weight_bytes of one number, kv_head_bytes of the keys of one head and position.
    """

    tp: int
    kv_ways: int
    weight_bytes: int
    kv_head_bytes: int
    invariant: bool = False


class Collective(NamedTuple):
    """All collectives of one kind in a step: how many, and the bytes of their results on one device."""

    kind: str  # as XLA names it
    calls: int
    result_bytes: int

    def wire_bytes(self, tp: int) -> float:
        """What one device sends when a ring of tp does it."""
        steps = 2 if self.kind == "all-reduce" else 1
        return steps * (tp - 1) / tp * self.result_bytes


def block_bytes(decoder: Decoder, lane: Lane, block_size: int) -> int:
    """Bytes of one block: keys and values of every layer, the heads of one device."""
    positions = 2 * decoder.num_layers * block_size
    return positions * (decoder.kv_heads // lane.kv_ways) * lane.kv_head_bytes


def pool_blocks(memory_bytes: int, one_block: int, sequence_blocks: int, max_rows: int) -> int:
    """Blocks of a pool in `memory_bytes`: no more than all rows can ever fill, and the sink.

    Raises ValueError when not even one sequence of full length and the sink fit.
    """
    blocks = min(memory_bytes // one_block, max_rows * sequence_blocks + 1)
    if blocks < sequence_blocks + 1:
        raise ValueError(
            f"KV pool: {memory_bytes} bytes hold {blocks} blocks of {one_block} bytes; expected at least "
            f"{sequence_blocks + 1} blocks, {(sequence_blocks + 1) * one_block} bytes"
        )
    return blocks


def step_collectives(decoder: Decoder, lane: Lane, tokens: int, rows: int, full: bool) -> tuple[Collective, ...]:
    """What a step of `tokens` tokens and `rows` rows sends: none on one device.

    fast       an all-reduce of [T, D] for the embedding and two a layer
    invariant  one all-reduce for the embedding, and two gathers a layer of every device's [T, D] in float32
    full       every option of sampling: the logits [B, V] are gathered; a plain draw reduces four words a row
    """
    if lane.tp == 1:
        return ()
    hidden = tokens * decoder.width
    reduces, gathers = 1, 0
    reduced, gathered = hidden * lane.weight_bytes, 0
    if lane.invariant:
        gathers = 2 * decoder.num_layers
        gathered = gathers * lane.tp * hidden * WORD
    else:
        reduces += 2 * decoder.num_layers
        reduced *= reduces
    if full:
        gathers, gathered = gathers + 1, gathered + rows * decoder.vocab * WORD
    else:
        reduces, reduced = reduces + PLAIN_CALLS, reduced + PLAIN_WORDS * rows * WORD
    kinds = (Collective("all-reduce", reduces, reduced), Collective("all-gather", gathers, gathered))
    return tuple(each for each in kinds if each.calls)


def peak_temporaries(decoder: Decoder, lane: Lane, tokens: int, rows: int) -> int:
    """Bytes that the largest program keeps live beside its arguments and results, about.

    Counted in XLA's buffers on CPU: float32, `fast`, a mixed step of all `tokens` with every option of sampling.
    Attention, feed-forward and sampler run one after the other, so the peak is that of the greatest. Within 15% for
    128 tokens and more; the `invariant` mode and other compilers, which fuse otherwise, are not counted.
    """
    width, ffn = decoder.width, decoder.ffn // lane.tp
    queries = decoder.heads * decoder.head_width // lane.tp
    keys = decoder.kv_heads * decoder.head_width // lane.kv_ways
    starts = decoder.num_layers * (rows + GROUP) * queries  # XLA makes them for every layer at once
    attend = (tokens + QUERY_TILE) * queries + tokens * (3 * width + queries + 2 * keys)
    feed = tokens * (3 * (width + 2 * ffn)) // 2  # gate, up, their product, the residual and half of its norm
    return max((starts + max(attend, feed)) * WORD, rows * _sampler_bytes(decoder.vocab))


def _sampler_bytes(vocab: int) -> int:
    """Of one row: logits gathered, edited and compared, some as long as halving sums want; places of biases."""
    halved = 1 << (vocab - 1).bit_length()
    return vocab * (3 * WORD + 2) + halved * (3 * WORD + 1) + MOST_BIASES * (4 * WORD + 1)
