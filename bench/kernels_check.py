"""Is a kernel right on this device? Every served shape beside float64, with traps where nobody may look.

    a served row -> a ragged step (NaN in what was not written, wild tables) -> the kernel, twice
      sampled tokens, all heads       float64 NumPy: error of outputs and of masses      BOUNDS
      every token of a row            finite, the same bits both times
      ordered                         a row alone, and its chunk cut in two: the same bits

The rows hold the edges (1, a block less one, a block, a block and one, a full table, a window's edge) and what is
drawn between; empty rows and tokens of no row stand among them.
Cost: one compilation a row and kernel (three for ordered), and seconds of NumPy.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels_process import Row
from bench.kernels_scenes import Scene, Span, judged
from bench.kernels_serve import attend_of, call_of, shape_of, tuned_config
from bench.kernels_time import this_target
from pallas_kernels import served
from pallas_kernels.rows import Rows

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}  # of max|o - ref| / max|ref| of a token
MASS_BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # of the log of a softmax's mass
SAMPLED = 24
HUGE = 1e30  # an error that is not finite, as JSON can say it
POSITIONS = 32768  # of all rows together, about, beside one that fills its table
SMALL = {"tokens": 24, "rows": 6, "blocks": 64, "columns": 6}
Outputs = tuple[np.ndarray, np.ndarray]


def shrunk(row: served.Row) -> served.Row:
    """The same kind of step with few tokens, rows and blocks."""
    tokens = min(row.tokens, SMALL["tokens"] if row.rows else SMALL["rows"])
    rows = min(row.rows, SMALL["rows"])
    columns = max(2, SMALL["columns"] * 16 // row.block)
    return row._replace(tokens=tokens, rows=rows, blocks=SMALL["blocks"], columns=columns)


def check(case: str, part: str, by: str, small: bool, config: tuple | None = None) -> Row:
    """The row of figures of one served row, part and implementation; `failed` says what was wrong.

    config   of a kernel; None leaves it to its rule
    """
    row = {row.name: row for row in served.SERVED}[case]
    row = shrunk(row) if small else row
    rng = np.random.default_rng(sum(map(ord, case)))
    spans = mixed_spans(rng, row) if row.rows else decode_spans(rng, row)
    scene = judged(rng, row, spans, row.tokens)
    model = served.MODELS[row.model]
    sinks_N = jnp.asarray(rng.standard_normal(model.heads), jnp.float32) if model.sinks else None
    attend = attend_of(part, by, this_target(), config)
    run = jax.jit(call_of(part, attend, model.head_width**-0.5, model.window, model.soft_cap))

    def outputs(rows: Rows) -> Outputs:
        found = run(jnp.int32(scene.base), scene.q_TNH, scene.k, scene.v, jax.tree.map(jnp.asarray, rows), sinks_N)
        return tuple(np.asarray(jax.device_get(each), np.float32) for each in found)

    found = outputs(scene.rows)
    figures = judge(scene, model, sinks_N, found, rng)
    live_T = live(scene.rows, row.tokens)
    wrong = {
        "error": figures["error_max"] > BOUNDS[row.dtype],
        "mass": figures["mass_error_max"] > MASS_BOUNDS[row.dtype],
        "not finite": not all(np.isfinite(part_T[live_T]).all() for part_T in found),
        "not repeatable": not same(found, outputs(scene.rows), live_T),
        "not invariant": part == "ordered" and not invariant(scene, found, outputs),
    }
    return figures | {"failed": ", ".join(name for name, is_wrong in wrong.items() if is_wrong)}


def tuned_for(case: str, part: str, by: str) -> tuple | None:
    """The config that the dispatcher would hand to `by` for a served row."""
    row = {row.name: row for row in served.SERVED}[case]
    return tuned_config(part, by, this_target(), shape_of(row), row.tokens)


def decode_spans(rng: np.random.Generator, row: served.Row) -> list[Span]:
    """Each token is a row; lengths at the edges first, then drawn, then none."""
    full, C = row.columns * row.block, row.block
    most = int(np.clip(4 * POSITIONS // row.tokens, 2, full))
    window = served.MODELS[row.model].window or C
    edges = [full, 1, C + 1, 0, C, C - 1, 64, 65, window, window + 1]
    drawn = np.exp(rng.uniform(0, np.log(most), row.tokens)).astype(int)
    lengths = [min(length, full) for length in [*edges, *drawn.tolist()][: row.tokens]]
    return [(max(length - 1, 0), int(length > 0)) for length in lengths]


def mixed_spans(rng: np.random.Generator, row: served.Row) -> list[Span]:
    """A third of the rows has one token, one has none, the others share what is left less some padding."""
    full = row.columns * row.block
    ones = row.rows // 3
    chunks = row.rows - ones - 1
    left = row.tokens - ones - min(7, row.tokens // 8)
    cuts = np.sort(rng.choice(np.arange(1, left), chunks - 1, replace=False))
    counts = [min(int(count), full) for count in np.diff([0, *cuts, left])]
    counts = [1] * ones + [0] + counts
    most = max(2, 2 * POSITIONS // row.rows)
    starts = [min(int(np.exp(rng.uniform(0, np.log(most)))), full - count) for count in counts]
    starts[0], starts[-1] = full - counts[0], 0
    order = rng.permutation(len(counts))
    return [(starts[b], counts[b]) for b in order]


def live(rows: Rows, tokens: int) -> np.ndarray:
    """Which tokens belong to a row: bool [T]."""
    token_T = np.arange(tokens)[:, None]
    return ((token_T >= rows.first_B) & (token_T < rows.first_B + rows.count_B)).any(axis=1)


def same(first: Outputs, second: Outputs, live_T: np.ndarray) -> bool:
    """Equal bits in the places of live tokens."""
    pairs = zip(first, second, strict=True)
    return all(np.array_equal(a[live_T].view(np.uint32), b[live_T].view(np.uint32)) for a, b in pairs)


def invariant(scene: Scene, found: Outputs, outputs: Callable[[Rows], Outputs]) -> bool:
    """The longest chunk alone, and cut in two, has the bits that it had beside all others."""
    rows = scene.rows
    b = int(rows.count_B.argmax())
    count = int(rows.count_B[b])
    tokens = slice(int(rows.first_B[b]), int(rows.first_B[b]) + count)
    mine_T = np.zeros(len(found[0]), bool)
    mine_T[tokens] = True
    alone = rows._replace(count_B=np.where(np.arange(len(rows.count_B)) == b, rows.count_B, 0))
    cut = count // 3
    ok = same(found, outputs(alone), mine_T)
    for first, size in ((0, cut), (cut, count - cut)):
        count_B, start_B, first_B = (part.copy() for part in (alone.count_B, alone.start_B, alone.first_B))
        count_B[b], start_B[b], first_B[b] = size, start_B[b] + first, first_B[b] + first
        piece_T = np.zeros_like(mine_T)
        piece_T[tokens.start + first : tokens.start + first + size] = True
        ok &= same(found, outputs(Rows(first_B, start_B, count_B, alone.table_BM)), piece_T)
    return ok


def judge(
    scene: Scene, model: served.Model, sinks_N: jax.Array | None, found: Outputs, rng: np.random.Generator
) -> Row:
    """The largest error of outputs and of masses over sampled tokens."""
    q_TNH = np.asarray(scene.q_TNH.astype(jnp.float32), np.float64)
    sinks_N = None if sinks_N is None else np.asarray(sinks_N, np.float64)
    worst, mass_worst, judged_tokens = 0.0, 0.0, 0
    for b, tokens in sampled(rng, scene.rows):
        keys_SKH, values_SKH = scene.seen(b)
        for t in tokens:
            position = int(scene.rows.start_B[b]) + t - int(scene.rows.first_B[b])
            begin = 0 if model.window is None else max(0, position - model.window + 1)
            seen = slice(begin, position + 1)
            o_NH, lse_N = attention64(q_TNH[t], keys_SKH[seen], values_SKH[seen], model, sinks_N)
            off = np.abs(found[0][t] - o_NH).max() / np.abs(o_NH).max()
            mass_off = np.abs(found[1][t] - lse_N).max()
            worst = max(worst, float(np.nan_to_num(off, nan=HUGE, posinf=HUGE)))
            mass_worst = max(mass_worst, float(np.nan_to_num(mass_off, nan=HUGE, posinf=HUGE)))
            judged_tokens += 1
    return {"error_max": worst, "mass_error_max": mass_worst, "judged": judged_tokens}


def sampled(rng: np.random.Generator, rows: Rows) -> Sequence[tuple[int, list[int]]]:
    """Rows and some of their tokens: the first and the last of each, the longest rows among them."""
    live_rows = np.flatnonzero(rows.count_B)
    longest = live_rows[np.argsort(-(rows.start_B + rows.count_B)[live_rows])][:4]
    others = rng.permutation(np.setdiff1d(live_rows, longest))[: SAMPLED - len(longest)]
    found = []
    for b in [*longest, *others]:
        first, count = int(rows.first_B[b]), int(rows.count_B[b])
        found.append((int(b), sorted({first, first + count // 2, first + count - 1})))
    return found


def attention64(
    q_NH: np.ndarray,
    keys_SKH: np.ndarray,
    values_SKH: np.ndarray,
    model: served.Model,
    sinks_N: np.ndarray | None,
) -> Outputs:
    """One token's attention over all of these positions, float64, and the log of each head's mass."""
    N, H = q_NH.shape
    q_KGH = q_NH.reshape(model.kv_heads, -1, H)
    scores_NS = np.einsum("KGH,SKH->KGS", q_KGH, keys_SKH).reshape(N, -1) * model.head_width**-0.5
    if model.soft_cap is not None:
        scores_NS = model.soft_cap * np.tanh(scores_NS / model.soft_cap)
    all_NS = scores_NS if sinks_N is None else np.concatenate([scores_NS, sinks_N[:, None]], axis=1)
    top_N = all_NS.max(axis=1)
    lse_N = top_N + np.log(np.exp(all_NS - top_N[:, None]).sum(axis=1))
    weights_NS = np.exp(scores_NS - lse_N[:, None])
    o_KGH = np.einsum("KGS,SKH->KGH", weights_NS.reshape(*q_KGH.shape[:2], -1), values_SKH)
    return o_KGH.reshape(N, H), lse_N
