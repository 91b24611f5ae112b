"""Blocks from the pools of one mesh to those of another, and a sequence that goes on where its blocks went."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engine.core.plan import Load, StepPlan
from engine.movers.local import Carrier, to_host
from engine.runner import moves
from engine.runner.buckets import Bucket
from engine.runner.compiles import CompileCounter
from engine.runner.draws import BLANK
from engine.runner.moves import CPU_PIECE_BYTES, MOST_BLOCKS, PIECE_BYTES, MovePrograms, Staged, cut, move_sizes
from engine.runner.state import POOL
from sharding.mesh import MeshSpec, lane_meshes
from sharding.overlap import overlaps

LAYERS, BLOCKS, BLOCK, WIDTH = 3, 20, 4, 8
SIZES = (1, 4, 8)


def pools_of(host, mesh):
    return tuple(jax.device_put(pool, NamedSharding(mesh, POOL)) for pool in host)


def by_layer(pools):
    return [np.asarray(pool).reshape(LAYERS, -1, *pool.shape[1:]) for pool in pools]


class Side:
    """Pools of random content on a mesh, and the programs that move their blocks."""

    def __init__(self, tp, kv_heads, dtype=np.uint16, offset=0, seed=0, num_blocks=BLOCKS):
        devices = jax.devices()[offset:] + jax.devices()[:offset]
        self.mesh = lane_meshes(MeshSpec(tp=tp), 8, kv_heads, devices)[0]
        rng = np.random.default_rng(seed)
        shape = (LAYERS * num_blocks, kv_heads, BLOCK, WIDTH)
        self.before = [rng.integers(0, 60000, shape).astype(dtype) for _ in range(2)]
        self.programs = MovePrograms(self.mesh, LAYERS, num_blocks, SIZES)
        self.pools = pools_of(self.before, self.mesh)
        for size in SIZES:
            self.pools = self.programs.compile(size, self.pools)

    def gather(self, blocks):
        return self.programs.gather(self.pools, blocks)

    def scatter(self, blocks, staged):
        self.pools = self.programs.scatter(self.pools, blocks, staged)

    def expect(self, source, from_blocks, to_blocks):
        """The blocks of `source` stand in `to_blocks`, and all others but the sink are as they were."""
        for got, mine, theirs in zip(
            by_layer(self.pools), by_layer(self.before), by_layer(source.before), strict=True
        ):
            wanted = mine.copy()
            wanted[:, to_blocks] = theirs[:, from_blocks]
            assert np.array_equal(got[:, 1:], wanted[:, 1:])


def way(source, target, kv_heads):
    axes = [(side.mesh.shape["kv"], side.mesh.shape["rep"]) for side in (source, target)]
    return Carrier(source.mesh, target.mesh, overlaps(kv_heads, *axes))


def lists(count, seed=3):
    rng = np.random.default_rng(seed)
    return [(1 + rng.permutation(BLOCKS - 1)[:count]).tolist() for _ in range(2)]


def expect_moved(source_tp, target_tp, kv_heads, dtype, counts):
    source, target = Side(source_tp, kv_heads, dtype), Side(target_tp, kv_heads, dtype, 8 - target_tp, seed=1)
    carrier = way(source, target, kv_heads)
    for count in counts:
        from_blocks, to_blocks = lists(count)
        target.pools = pools_of(target.before, target.mesh)
        target.scatter(to_blocks, carrier.carry(source.gather(from_blocks)))
        target.expect(source, from_blocks, to_blocks)
    source.expect(source, [], [])


@pytest.mark.parametrize(
    "source_tp, target_tp, kv_heads, dtype",
    [
        (2, 4, 8, np.uint16),
        (4, 2, 8, np.uint16),
        (1, 8, 2, np.float32),
        (8, 1, 2, np.uint16),
        (1, 1, 8, np.float32),
    ],
)
def test_blocks_arrive_bit_equal_and_no_other_block_changes(source_tp, target_tp, kv_heads, dtype):
    expect_moved(source_tp, target_tp, kv_heads, dtype, (1, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("pair", [(a, b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8)], ids=str)
def test_blocks_arrive_on_every_pair_of_meshes(pair, kv_heads, dtype):
    """Costs a minute or two."""
    expect_moved(*pair, kv_heads, dtype, (1, 2, 7, 8))


@pytest.mark.parametrize("tp, kv_heads", [(1, 8), (4, 8), (8, 2)])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_blocks_arrive_from_the_host(tp, kv_heads, count):
    source, target = Side(2, kv_heads), Side(tp, kv_heads, seed=1)
    from_blocks, to_blocks = lists(count)
    keys, values = (np.array(array) for array in to_host(source.gather(from_blocks), count))
    target.scatter(to_blocks, Staged(keys, values))
    target.expect(source, from_blocks, to_blocks)
    assert not keys.flags.writeable, "the device may read them at any time"


def test_a_gather_reads_its_blocks_and_nothing_else():
    source = Side(2, 8)
    from_blocks, _ = lists(3)
    keys, values = to_host(source.gather(from_blocks), 3)
    for got, pool in zip((keys, values), by_layer(source.before), strict=True):
        assert np.array_equal(got, np.moveaxis(pool[:, from_blocks], 2, 0))


@pytest.mark.parametrize("blocks", [[0], [BLOCKS], [-1], [2, BLOCKS + 5]])
def test_a_block_that_is_none_of_the_pool_is_refused_before_anything_happens(blocks):
    side = Side(1, 2)
    with pytest.raises(AssertionError, match="blocks of a move"):
        side.gather(blocks)
    staged = side.gather([1, 2])
    with pytest.raises(AssertionError, match="blocks of a move"):
        side.scatter(blocks, staged)
    side.expect(side, [], [])


@pytest.mark.parametrize("program", ["gathers", "scatters"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_move_copies_no_pool(program, dtype):
    """Temporaries are less than what moves, and those of ten times the blocks are no larger."""
    small, large = (Side(2, 8, dtype, num_blocks=blocks) for blocks in (BLOCKS, 10 * BLOCKS))
    moved = LAYERS * SIZES[-1] * 4 * BLOCK * WIDTH * np.dtype(dtype).itemsize
    temporary = [getattr(side.programs, program)[8].memory_analysis().temp_size_in_bytes for side in (small, large)]
    assert temporary[0] == temporary[1] < moved
    if program == "scatters":
        pools = sum(pool.addressable_data(0).nbytes for pool in large.pools)
        assert large.programs.scatters[8].memory_analysis().alias_size_in_bytes >= pools


def test_a_gather_and_a_scatter_wait_for_nothing():
    """The pools are still being made when both have returned."""
    source, target = Side(2, 8), Side(4, 8, offset=4, seed=1)
    carrier = way(source, target, 8)
    carrier.warm_up([source.gather([1] * 4)])

    def slowly(pool):
        x = jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), jnp.ones((400, 400), jnp.float32))
        return pool + (x[0, 0] > 9).astype(pool.dtype)

    lates = [jax.jit(slowly, out_shardings=side.pools[0].sharding) for side in (source, target)]
    for side, late in zip((source, target), lates, strict=True):
        jax.block_until_ready(late(side.pools[0]))
    for side, late in zip((source, target), lates, strict=True):
        side.pools = late(side.pools[0]), side.pools[1]
    from_blocks, to_blocks = lists(3)
    staged = source.gather(from_blocks)
    target.scatter(to_blocks, carrier.carry(staged))
    assert not staged.keys_KLnCH.is_ready() and not target.pools[0].is_ready()
    target.expect(source, from_blocks, to_blocks)


def test_a_list_is_cut_in_pieces_that_the_programs_hold():
    assert [list(piece) for piece in cut([5, 3, 9], (1, 4))] == [[5, 3, 9]]
    assert [len(piece) for piece in cut(range(70), (1, 8, 64))] == [64, 6]
    assert [len(piece) for piece in cut(range(20), (1, 8, 64))] == [8, 8, 4]
    assert [len(piece) for piece in cut(range(3), (1, 8, 64))] == [1, 1, 1]
    assert list(cut([], (1, 8))) == []
    for count in range(1, 200):
        pieces = list(cut(range(count), SIZES))
        assert [block for piece in pieces for block in piece] == list(range(count))
        padded = sum(min(size for size in SIZES if size >= len(piece)) for piece in pieces)
        assert padded <= 2 * count


def test_sizes_are_few_and_a_piece_stays_small():
    assert move_sizes(1, 1000, "cpu") == (1, 4, 16, MOST_BLOCKS) and move_sizes(1, 5, "cpu")[-1] == 5
    for platform, most in (("cpu", CPU_PIECE_BYTES), ("cuda", PIECE_BYTES)):
        assert move_sizes(most // 4, 1000, platform) == (1, 2, 4) and move_sizes(10 * most, 1000, platform) == (1,)
        assert all(2 * len(move_sizes(size, 200, platform)) <= 12 for size in (1, 1 << 18, 1 << 22))


def test_nothing_is_compiled_by_any_number_of_blocks():
    source, target = Side(2, 8), Side(4, 8, offset=4, seed=1)
    carrier = way(source, target, 8)
    carrier.warm_up([source.gather([1] * size) for size in SIZES])
    counter, rng = CompileCounter(), np.random.default_rng(0)
    counter.seal()
    for _ in range(30):
        from_blocks, to_blocks = (
            (1 + rng.permutation(BLOCKS - 1)[: rng.integers(1, 19)]).tolist() for _ in range(2)
        )
        for pieces in zip(cut(from_blocks, SIZES), cut(to_blocks, SIZES), strict=False):
            count = min(map(len, pieces))
            staged = carrier.carry(source.gather(pieces[0][:count]))
            if rng.random() < 0.3:
                staged = Staged(*to_host(staged, count))
            target.scatter(pieces[1][:count], staged)
    jax.block_until_ready(target.pools)
    assert counter.late == 0


def test_on_other_platforms_one_scatter_writes_the_same(monkeypatch):
    monkeypatch.setattr(moves, "platform_of", lambda device: "cuda")
    expect_moved(2, 4, 8, np.uint16, (3, 8))


# A sequence whose blocks move from a lane to another, by plans that the test writes.

STEPS = (Bucket(4, 4, True, False), Bucket(64, 4, False, False))
MOVE_SIZES = (1, 4)
ROW, PROMPT, DRAWN = 1, 55, 9
TABLE = 4  # blocks that hold PROMPT + DRAWN positions


def load(tokens, blocks):
    return Load(ROW, np.array(tokens, np.int32), np.array(blocks, np.int32), BLANK)


def launch(runner, step, start, count, draw, loads=()):
    """One row from `start` on."""
    rows = np.array([[ROW, start, count, 0, 0, draw]], np.int32)
    runner.launch(StepPlan(step, rows, tuple(loads), count, draw, count == 1, True))


def decode(runner, tokens, blocks):
    """DRAWN tokens of a sequence of which `blocks` hold all positions but the last."""
    for step in range(DRAWN):
        loads = () if step else [load(tokens, blocks)]
        launch(runner, 100 + step, len(tokens) - 1 + step, 1, 1, loads)
    return lambda: [int(runner.collect().tokens[0]) for _ in range(DRAWN)]


def prefill(runner, tokens, blocks):
    launch(runner, 0, 0, len(tokens) - 1, 0, [load(tokens, blocks)])


def prompt(seed):
    return np.random.default_rng(seed).integers(0, 211, PROMPT).tolist()


@pytest.mark.parametrize("tps", [(4, 2), (1, 4)], ids=str)
def test_a_sequence_goes_on_where_its_blocks_went_token_for_token(tps, make_runner):
    """All is dispatched before anything is waited for; both lanes use the blocks for others before and after."""
    here, there = (make_runner(tp, choices=STEPS, move_sizes=MOVE_SIZES, first=4 * k) for k, tp in enumerate(tps))
    alone = make_runner(1, choices=STEPS, move_sizes=MOVE_SIZES)
    for runner in (here, there, alone):
        runner.reset()
    prefill(alone, prompt(0), [1, 2, 3, 4])
    wanted_later = decode(alone, prompt(0), [1, 2, 3, 4])
    alone.collect()
    wanted = wanted_later()
    meshes = here.model.mesh, there.model.mesh
    carrier = Carrier(*meshes, overlaps(2, *((mesh.shape["kv"], mesh.shape["rep"]) for mesh in meshes)))
    from_blocks, to_blocks = [9, 300, 17, 4], [399, 2, 50, 33]
    here.reset()
    prefill(there, prompt(5), to_blocks)
    prefill(here, prompt(0), from_blocks)
    staged = carrier.carry(here.gather(from_blocks))
    prefill(here, prompt(6), from_blocks)
    there.scatter(to_blocks, staged)
    got = decode(there, prompt(0), to_blocks)
    there.collect()
    assert got() == wanted and len(set(wanted)) > 2
    for _ in range(2):
        here.collect()


def test_a_runner_that_moves_compiles_two_programs_a_size_and_none_later(make_runner):
    """A block of a bfloat16 lane goes round through the host and comes back as it was."""
    runner = make_runner(2, "fast", jnp.bfloat16, STEPS, MOVE_SIZES)
    assert len(runner.moves.gathers) == len(runner.moves.scatters) == len(MOVE_SIZES)
    runner.compiles.seal()
    prefill(runner, prompt(1), [1, 2, 3, 4])
    keys, values = to_host(runner.gather([1, 2, 3, 4]), 4)
    assert keys.dtype == np.uint16 and keys.any()
    runner.scatter([8, 6, 7], Staged(keys[:, :, :3].copy(), values[:, :, :3].copy()))
    again = to_host(runner.gather([8, 6, 7]), 3)
    assert np.array_equal(again[0], keys[:, :, :3]) and np.array_equal(again[1], values[:, :, :3])
    runner.collect()
    runner.reset()
    prefill(runner, prompt(1), [1, 2, 3, 4])
    runner.collect()
    assert runner.compiles.late == 0


def test_a_runner_that_does_not_move_has_no_programs_for_it(make_runner):
    runner = make_runner(1, choices=STEPS)
    assert not runner.moves.gathers and not runner.moves.scatters
