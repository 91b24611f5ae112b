"""Who can serve a part of attention on a target, and how each is called.

    part       the form of a call
    decode     attend(q_BNH, k, v, table_BM, lengths_B, *, base, ...)
    chunks     attend(q_TNH, k, v, rows, *, base, ...)
    ordered    the same

`dispatch.KERNELS` names the kernels; the XLA path stands after them and serves everything.
"""

import functools
from collections.abc import Callable

import jax

from pallas_kernels import served, tuned
from pallas_kernels.dispatch import KERNELS, Part
from pallas_kernels.shape import Shape
from pallas_kernels.target import Target
from pallas_kernels.xla import chunks, decode, ordered

Attend = Callable[..., tuple[jax.Array, jax.Array]]
XLA = {"decode": decode, "chunks": chunks, "ordered": ordered}


def shape_of(row: served.Row) -> Shape:
    """What the dispatcher sees of a served row."""
    model = served.MODELS[row.model]
    group = model.heads // model.kv_heads
    return Shape(group, model.head_width, row.block, row.dtype, row.pool or row.dtype)


def names(part: Part, target: Target, shape: Shape) -> list[str]:
    """Who serves the shape, the one that the dispatcher takes first."""
    return [name for name, kernel in KERNELS[part] if kernel.unserved(target, shape) is None] + ["xla"]


def refusals(part: Part, target: Target, shape: Shape) -> dict[str, str]:
    """Kernels that do not serve the shape, and why."""
    found = {name: kernel.unserved(target, shape) for name, kernel in KERNELS[part]}
    return {name: reason for name, reason in found.items() if reason is not None}


def attend_of(part: Part, by: str, target: Target, config: tuple | None = None) -> Attend:
    """How `by` is called for a part; `config` is for kernels, None means their rule."""
    if by != "xla":
        kernel = dict(KERNELS[part])[by]
        options = {} if config is None else {"config": config}
        return functools.partial(kernel.attend, target=target, **options)
    if part == "ordered":
        return ordered.attend
    return functools.partial(XLA[part].attend, platform=target.platform)


def tuned_config(part: Part, by: str, target: Target, shape: Shape, tokens: int) -> tuple | None:
    """The Config that was tuned for a step, as the dispatcher finds it."""
    if by == "xla" or part not in tuned.PARTS:
        return None
    kernel = dict(KERNELS[part])[by]
    found = tuned.find(target, part, shape, tokens, kernel=by, fields=kernel.Config._fields)
    return None if found is None else kernel.Config(**found)


def call_of(
    part: Part, attend: Attend, scale: float, window: int | None = None, soft_cap: float | None = None
) -> Attend:
    """One form for all parts: (base, q_TNH, k, v, rows, sinks_N); a decode step has a token in each live row."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}

    def call(base, q_TNH, k, v, rows, sinks_N=None):
        if part != "decode":
            return attend(q_TNH, k, v, rows, base=base, sinks_N=sinks_N, **options)
        lengths_B = rows.start_B + rows.count_B
        return attend(q_TNH, k, v, rows.table_BM, lengths_B, base=base, sinks_N=sinks_N, **options)

    return call
