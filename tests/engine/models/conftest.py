"""A lane for tests of the decoder: one mesh, its weights, a paged pool, and steps of any rows and chunks."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.models.config import from_hf
from engine.models.decoder import forward_local, logits_local
from engine.weights.drawn import draw
from engine.weights.layout import parameters, read_part
from pallas_kernels.dispatch import Rows
from sharding.mesh import MeshSpec, lane_meshes
from sharding.rules import TENSOR, TP, place

GOLDEN = Path(__file__).parent / "golden"
BLOCK = 16
POOL = P(None, "kv")


class Lane:
    """Runs `forward_local` and `logits_local` on a mesh of tp devices.

    Each row b of a step owns blocks 1 + b * reach ... of a pool, so that rows never share one.
    """

    def __init__(self, config, tp, numerics="fast", seed=7, dtype=np.float32, num_rows=4, reach=8):
        self.config, self.numerics, self.num_rows, self.reach = config, numerics, num_rows, reach
        (self.mesh,) = lane_meshes(MeshSpec(1, tp), config.heads, config.kv_heads)
        self.num_blocks = 1 + num_rows * reach
        self.weights = self._weights(np.dtype(dtype), seed)
        self.table_BM = 1 + np.arange(num_rows * reach, dtype=np.int32).reshape(num_rows, reach)
        shape = (config.num_layers * self.num_blocks, config.kv_heads, BLOCK, config.head_width)
        stored = np.uint16 if np.dtype(dtype) == jnp.bfloat16 else dtype
        pool = jax.device_put(np.zeros(shape, stored), NamedSharding(self.mesh, POOL))
        self.pools = pool, pool
        self.program = jax.jit(self._program(), static_argnames="one_token")

    def _weights(self, dtype, seed):
        drawn = {}

        def read(name, cut):
            return drawn[name][cut]

        weights = {"layers": tuple({} for _ in range(self.config.num_layers))}
        for parameter in parameters(self.config, self.mesh.size):
            drawn = {part.name: draw(seed, part.name, part.shape, dtype) for part in parameter.parts}
            sharding = place(parameter.letters, parameter.shape, TENSOR, self.mesh)
            local = partial(lambda row, index: read_part(row, row.shard(index), read, dtype), parameter)
            *outer, name = parameter.path
            target = weights["layers"][outer[1]] if outer else weights
            target[name] = jax.make_array_from_callback(parameter.shape, sharding, local)
        return weights

    def _program(self):
        specs = jax.tree.map(lambda array: array.sharding.spec, self.weights)

        def program(weights, pools, tokens_T, positions_T, rows, slots_T, points_B, one_token):
            def step(weights, k_PKCH, v_PKCH, tokens_T, positions_T, rows, slots_T, points_B):
                inputs = (tokens_T, positions_T, rows, slots_T, self.num_blocks, self.numerics, one_token)
                x_TD, k_PKCH, v_PKCH = forward_local(self.config, weights, k_PKCH, v_PKCH, *inputs)
                return logits_local(self.config, weights, x_TD[points_B], self.numerics), k_PKCH, v_PKCH

            sharded = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(specs, POOL, POOL, P(), P(), P(), P(), P()),
                out_specs=(P(None, TP), POOL, POOL),
                check_vma=False,
            )
            logits_BV, *pools = sharded(weights, *pools, tokens_T, positions_T, rows, slots_T, points_B)
            return logits_BV, tuple(pools)

        return program

    def step(self, pieces, starts, padded=None, everywhere=False):
        """Logits of each row's last token, or of every token; `pieces` are the tokens of each row, some empty.

        padded  tokens of the step, padding included
        """
        counts = np.array([len(piece) for piece in pieces], np.int32)
        firsts = np.cumsum(counts) - counts
        num_tokens = padded or max(int(counts.sum()), 1)
        tokens_T, positions_T = np.zeros((2, num_tokens), np.int32)
        slots_T = np.full(num_tokens, -1, np.int32)
        for row, (piece, start, first) in enumerate(zip(pieces, starts, firsts, strict=True)):
            span = slice(first, first + len(piece))
            tokens_T[span] = piece
            positions_T[span] = start + np.arange(len(piece))
            slots_T[span] = self.table_BM[row][positions_T[span] // BLOCK]
        rows = Rows(firsts.astype(np.int32), np.array(starts, np.int32), counts, self.table_BM[: len(pieces)])
        points_B = np.arange(num_tokens) if everywhere else np.maximum(firsts + counts - 1, 0)
        in_place = (firsts == np.arange(len(pieces)))[counts > 0]  # row b has token b
        one_token = num_tokens == len(pieces) and counts.max() <= 1 and in_place.all()
        arrays = (tokens_T, positions_T, rows, slots_T, points_B.astype(np.int32))
        logits_BV, self.pools = self.program(self.weights, self.pools, *arrays, one_token=bool(one_token))
        return np.asarray(logits_BV)

    def logits(self, tokens, chunk):
        """Logits at every position of one sequence, computed in chunks in row 0; [T, V padded]."""
        starts = range(0, len(tokens), chunk)
        parts = [self.step([tokens[i : i + chunk]], [i], chunk, everywhere=True) for i in starts]
        return np.concatenate(parts)[: len(tokens)]

    def greedy(self, prompts, num_new, chunk):
        """Greedy continuations of all prompts together, every row in its own chunks; int [rows, num_new]."""
        known, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
        targets = [len(prompt) + num_new for prompt in prompts]
        while any(len(tokens) < target for tokens, target in zip(known, targets, strict=True)):
            wanted = [
                0 if len(t) == end else len(t) - c for t, c, end in zip(known, computed, targets, strict=True)
            ]
            width = 1 if max(wanted) == 1 else chunk
            pieces = [t[c : c + min(width, w)] for t, c, w in zip(known, computed, wanted, strict=True)]
            logits_BV = self.step(pieces, computed, padded=width * len(prompts))
            for row, piece in enumerate(pieces):
                computed[row] += len(piece)
                if piece and computed[row] == len(known[row]):
                    known[row].append(int(logits_BV[row].argmax()))
        return np.array([tokens[-num_new:] for tokens in known])


@pytest.fixture
def lane():
    """Makes a Lane: `lane(config, tp, ...)`."""
    return Lane


@pytest.fixture
def golden():
    """`golden(name)` -> (ModelConfig, what record_golden.py stored)."""

    def load(name):
        values = json.loads((GOLDEN / "models.json").read_text())[name]
        return from_hf(values), np.load(GOLDEN / f"{name}.npz")

    return load
