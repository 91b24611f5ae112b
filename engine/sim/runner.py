"""A device that is a hash: it runs StepPlans as the real runner does, in a few microseconds a row.

Its KV of a position is a hash of the KV before it and the token there; a drawn token is a hash of the KV of every
position that its row's block table names, the seed, the choice and the position. So a stale, foreign or unwritten
block anywhere changes a token, and `alone` says what every sequence must draw whatever shares its steps.
It keeps the runner's contract (launch, collect, reset, gather, scatter) and checks each plan against what the
device would do.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from engine.core.plan import BLOCK, COUNT, DRAW, ROW, SCORE, START, TOP, Draw, StepPlan, StepResult

MASK = (1 << 61) - 1


def mix(a: int, b: int) -> int:
    """A hash of two integers; order matters."""
    return (a * 6364136223846793005 + b * 1442695040888963407 + 1013904223) & MASK


def drawn(contents: list[int], draw: Draw, position: int, vocab: int) -> int:
    """The token drawn at `position` over the KV `contents` of every position before it."""
    state = mix(draw.seed & MASK, mix(draw.choice, position))
    for content in contents:
        state = mix(state, content)
    return (state >> 17) % vocab


def alone(prompt: list[int], draw: Draw, count: int, vocab: int) -> list[int]:
    """What a sequence draws when nothing else exists."""
    tokens, contents = list(prompt), []
    while len(tokens) < len(prompt) + count:
        while len(contents) < len(tokens):
            contents.append(mix(contents[-1] if contents else 7, tokens[len(contents)]))
        tokens.append(drawn(contents, draw, len(tokens), vocab))
    return tokens[len(prompt) :]


class ModelledRunner:
    """Runs plans at once; results wait for `collect` as they would on a device."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_length: int, vocab: int):
        self.sizes = (num_blocks, block_size, max_rows, max_length)
        self.vocab = vocab
        self.fail_launch: set[int] = set()  # steps whose launch raises, once each, before anything changes
        self.fail_collect: set[int] = set()  # steps whose result raises, once each; the pool is gone
        self.spoiled: set[int] = set()  # seeds whose logits are not finite
        self.poison: set[int] = set()  # seeds that make any step they are in raise
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a device failure."""
        num_blocks, block_size, max_rows, max_length = self.sizes
        self.kv = np.full((num_blocks, block_size), -1, np.int64)
        self.history = np.full((max_rows, max_length + 1), -1, np.int64)
        self.table = np.zeros((max_rows, -(-max_length // block_size)), np.int64)
        self.draws: dict[int, Draw] = {}
        self.broken = False
        self.results: deque[StepResult | Exception] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Run `plan`; its result is collected later."""
        if plan.step in self.fail_launch:
            self.fail_launch.discard(plan.step)
            raise RuntimeError("injected before launch")
        for load in plan.loads:
            self.history[load.row, : len(load.tokens)] = load.tokens
            self.table[load.row, : len(load.blocks)] = load.blocks
            self.draws[load.row] = load.draw
        seeds = {self.draws[row].seed for row in plan.rows[:, ROW].tolist()}
        if self.broken or plan.step in self.fail_collect or seeds & self.poison:
            self.fail_collect.discard(plan.step)
            self.broken = True  # the donated pool is gone, and every step behind this one with it
            self.results.append(RuntimeError("injected on the device"))
            return
        points = [point for row in plan.rows.tolist() for point in self._row(row)]
        assert len(points) == plan.num_points and int(plan.rows[:, COUNT].sum()) == plan.num_tokens
        self.results.append(self._result(plan, points))

    def collect(self) -> StepResult:
        """The result of the oldest step launched and not collected."""
        result = self.results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def gather(self, blocks: Sequence[int]) -> np.ndarray:
        """What `blocks` hold once every step launched before has run; [blocks, C]."""
        return self.kv[list(blocks)].copy()

    def scatter(self, blocks: Sequence[int], staged: np.ndarray) -> None:
        """Write what was gathered elsewhere into `blocks`."""
        assert 0 not in blocks and len(blocks) == len(staged)
        self.kv[list(blocks)] = staged

    def _row(self, planned: list[int]) -> list[tuple[int, bool]]:
        row, start, count = planned[ROW], planned[START], planned[COUNT]
        size, table, history = self.sizes[1], self.table[row], self.history[row]
        if planned[BLOCK]:
            table[(start + count - 1) // size] = planned[BLOCK]
        assert len({b for b in table[: -(-(start + count) // size)].tolist()} | {0}) > 1 or start + count == 0
        contents = [int(self.kv[table[p // size], p % size]) for p in range(start)]
        for p in range(start, start + count):
            assert table[p // size] > 0 and history[p] >= 0, (
                "a step reads a token or writes a block it does not have"
            )
            contents.append(mix(contents[-1] if contents else 7, int(history[p])))
            self.kv[table[p // size], p % size] = contents[-1]
        draw, points = self.draws[row], []
        for p in range(start + count - planned[SCORE] - planned[DRAW], start + count - planned[DRAW]):
            points.append((int(history[p + 1]), draw.seed not in self.spoiled))
        if planned[DRAW]:
            token = drawn(contents, draw, start + count, self.vocab)
            history[start + count] = token
            points.append((token, draw.seed not in self.spoiled))
        return points

    def _result(self, plan: StepPlan, points: list[tuple[int, bool]]) -> StepResult:
        tokens = np.array([token for token, _ in points], np.int32)
        finite = np.array([good for _, good in points], bool)
        if plan.plain:
            return StepResult(plan.step, tokens, finite)
        ranks = np.ones(len(points), np.int32)
        top = np.tile(tokens[:, None], (1, TOP))
        return StepResult(plan.step, tokens, finite, -tokens / 100.0, ranks, top, -top / 100.0)
