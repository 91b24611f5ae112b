"""Which devices a lane steps on: from `--mesh` to one jax mesh per lane.

    "dp=2,tp=4" --parse_mesh--> MeshSpec(dp=2, tp=4) --lane_meshes--> 2 lanes of 4 devices, axes ('kv', 'rep')

A lane is one tensor-parallel mesh; no program spans two lanes. Its axes are kv = min(K, tp), which splits the
key/value heads, and rep = tp / kv, which repeats each of them; query heads, ffn and vocabulary are split over
both. Shard s = kv_index * rep + rep_index stands on device s of the lane.

Cost: none on the step path; read once at start.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.rules import TP, ShardingError

FORMS = "'tp=4', 'dp=2,tp=4' or a bare count such as '8' (which means tp=8), each number at least 1"
MOST = 1 << 16  # far above any machine; keeps a slip of the keyboard from being taken for a size


class MeshSpec(NamedTuple):
    """dp lanes of tp devices each."""

    dp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """How many devices all lanes take together."""
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"tp={self.tp}" if self.dp == 1 else f"dp={self.dp},tp={self.tp}"


def parse_mesh(text: str) -> MeshSpec:
    """The mesh that `text` names; an axis that is not given is 1. Raises ShardingError with the valid forms."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return MeshSpec(tp=_count(text, text))
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, number = (piece.strip() for piece in item.partition("="))
        if axis not in MeshSpec._fields:
            raise ShardingError(f"mesh: got {item!r:.64} in {text!r:.64}; expected {FORMS}")
        if axis in sizes:
            raise ShardingError(f"mesh: {axis} is given twice in {text!r:.64}; expected {FORMS}")
        sizes[axis] = _count(number, text)
    return MeshSpec(**sizes)


def lane_axes(tp: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """(kv, rep) of a lane: kv = min(K, tp) and kv * rep = tp.

    Raises ShardingError when tp does not divide the query heads, or neither of tp and the kv heads divides the
    other.
    """
    reason = _why_not(tp, heads, kv_heads)
    if reason is not None:
        sizes = ", ".join(str(size) for size in valid_sizes(heads, kv_heads))
        raise ShardingError(f"mesh: tp={tp} {reason}; valid tp sizes are {sizes}")
    kv = min(kv_heads, tp)
    return kv, tp // kv


def valid_sizes(heads: int, kv_heads: int) -> tuple[int, ...]:
    """Every tp that a model of so many heads can be split over, in order."""
    return tuple(tp for tp in range(1, heads + 1) if _why_not(tp, heads, kv_heads) is None)


def lane_meshes(
    spec: MeshSpec, heads: int, kv_heads: int, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, ...]:
    """One mesh with axes ('kv', 'rep') for each of the dp lanes, on the first `spec.size` of `devices`.

    devices  what there is, in the order of use; None stands for `jax.devices()`
    Raises ShardingError when the heads do not split (`lane_axes`) or there are too few devices.
    """
    kv, rep = lane_axes(spec.tp, heads, kv_heads)
    devices = jax.devices() if devices is None else devices
    check_devices(spec.size, len(devices), str(spec))
    lanes = np.array(devices[: spec.size], dtype=object).reshape(spec.dp, kv, rep)
    return tuple(Mesh(lane, TP, axis_types=(AxisType.Explicit,) * len(TP)) for lane in lanes)


def check_devices(wanted: int, visible: int, what: str) -> None:
    """Raises ShardingError when `what` wants more devices than there are."""
    if wanted > visible:
        raise ShardingError(
            f"mesh: {what} needs more devices than there are: {wanted} requested, {visible} visible; "
            f"expected at most {visible} together"
        )


def _why_not(tp: int, heads: int, kv_heads: int) -> str | None:
    if tp < 1 or heads % tp:
        return f"does not divide the {heads} query heads"
    if kv_heads % tp and tp % kv_heads:
        return f"and the {kv_heads} kv heads: neither divides the other"
    return None


def _count(number: str, text: str) -> int:
    if number.isascii() and number.isdigit() and len(number) < 9 and 1 <= int(number) <= MOST:
        return int(number)
    raise ShardingError(f"mesh: got {number!r:.64} in {text!r:.64}; expected {FORMS}")
