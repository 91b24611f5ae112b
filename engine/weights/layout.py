"""One row per array of the weights: what it is made of on disk, how its axes move, and where it lives.

    file [out, in]  --cut to the shard's slice--> part --move axes--> [in, out] --join parts--> local array

The weights of a lane are a dict:

    {"head_DV", "embed_VD" (untied only), "final_norm_D",
     "layers": ({"norms_2D", "qk_norms_2H", "wqkv_DX", "bqkv_X", "wo_XD", "bo_D",
                 "wgu_DX", "bgu_X", "wd_FD", "bd_D"}, ...)}

X is an interleaved axis: shard s holds [q of s | k of s | v of s], or [gate of s | up of s]. Fewer kv heads than
tp are repeated: shards s with equal s // rep hold the same ones. F and V are padded with zeros to a multiple of
lcm(8, tp), so that eighths of them are whole on every mesh. A folder on disk stays logical: all of this happens
while a device reads its part, and it reads nothing but the slices named by `cut`.

Cost: one copy of each part. Source: the fused, per-shard interleaved columns are the usual tensor-parallel form.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import lcm, prod
from typing import NamedTuple

import numpy as np

from engine.models.config import ModelConfig
from sharding.mesh import lane_axes
from sharding.rules import TENSOR

EIGHTHS = 8  # widths are cut in eighths whatever the mesh, see the numerics mode `invariant`
ALIGNMENT = 64  # bytes
BAND = 16  # rows moved together, 5 times as fast as a whole matrix

Index = tuple[slice, ...]
Read = Callable[[str, Index], np.ndarray]  # (name of a tensor, slice of each axis) -> that part of it


class Part(NamedTuple):
    """One tensor on disk, and how a shard's share of it is cut out."""

    name: str
    move: str  # "(N H) D -> D (N H)": axes of the file -> axes of the array, merged ones in parentheses
    shape: tuple[int, ...]  # in the file
    axis: int | None  # the axis of the file that is split over shards; None when every shard takes all
    step: int  # how much of that axis one shard takes, padding included
    repeat: int  # so many neighbouring shards take the same slice

    def cut(self, shard: int) -> Index:
        """The slice of the file that `shard` reads; empty where its share is all padding."""
        if self.axis is None:
            return tuple(slice(0, size) for size in self.shape)
        size = self.shape[self.axis]
        start = min(shard // self.repeat * self.step, size)
        split = slice(start, min(start + self.step, size))
        return tuple(split if axis == self.axis else slice(0, size) for axis, size in enumerate(self.shape))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the file in the order of the array."""
        source, target = (_groups(side) for side in self.move.split("->"))
        return tuple(source.index(group) for group in target)


@dataclass(frozen=True)
class Parameter:
    """One array of the weights."""

    path: tuple[str | int, ...]  # ("layers", 3, "wqkv_DX")
    letters: str  # one a axis; also its placement, by sharding.rules.TENSOR
    shape: tuple[int, ...]  # of the whole array, padding included
    parts: tuple[Part, ...]
    shards: int  # tp

    @property
    def name(self) -> str:
        """`layers.3.wqkv_DX`."""
        return ".".join(str(step) for step in self.path)

    @property
    def axis(self) -> int | None:
        """The axis that is split over the mesh, if any; with several parts it is interleaved per shard."""
        return next((axis for axis, letter in enumerate(self.letters) if letter in TENSOR), None)

    @property
    def stacked(self) -> bool:
        """Whether the parts are stacked on a new first axis, not joined along the split one."""
        return self.letters[0].isdigit()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of one shard's part."""
        return tuple(size // self.shards if axis == self.axis else size for axis, size in enumerate(self.shape))

    def shard(self, index: Index) -> int:
        """Which shard the slice `index` of the whole array is."""
        if self.axis is None:
            return 0
        return (index[self.axis].start or 0) // (self.shape[self.axis] // self.shards)


def padded(size: int, tp: int) -> int:
    """`size` rounded up so that its eighths and its shares over `tp` devices are whole and equal."""
    multiple = lcm(EIGHTHS, tp)
    return -(-size // multiple) * multiple


def parameters(config: ModelConfig, tp: int) -> tuple[Parameter, ...]:
    """Every array of the weights on a lane of `tp` devices, in the order they are loaded.

    Raises ShardingError when the heads do not split over tp.
    """
    lane_axes(tp, config.heads, config.kv_heads)
    top = [_parameter(config, tp, (), *row) for row in _top(config)]
    layers = [
        _parameter(config, tp, ("layers", layer), *row)
        for layer in range(config.num_layers)
        for row in _layer(config, layer)
    ]
    return (*top, *layers)


def read_part(parameter: Parameter, shard: int, read: Read, dtype: np.dtype) -> np.ndarray:
    """The local array of `shard` in `dtype`, zero where its share is padding.

    `read` is asked for the shard's own slices and for nothing else; empty ones are not asked for.
    """
    local = _zeros(parameter.local_shape, dtype)
    start = 0
    for number, part in enumerate(parameter.parts):
        target = local[number] if parameter.stacked else local
        if part.axis is not None:
            column = part.order.index(part.axis)
            target = local[(slice(None),) * column + (slice(start, start + part.step),)]
            start += part.step
        cut = part.cut(shard)
        if all(piece.stop > piece.start for piece in cut):
            _move(read(part.name, cut), part.order, target)
    return local


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that JAX takes over on a CPU device, where it would else copy them."""
    size = prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _move(source: np.ndarray, order: tuple[int, ...], target: np.ndarray) -> None:
    """Copies `source`, its axes in `order`, to the start of `target`, casting on the way.

    Narrow bands of rows: a transposing copy of a whole matrix would touch a new cache line for every number.
    """
    within = tuple(slice(0, source.shape[axis]) for axis in order)
    # A number too large for the dtype becomes infinite, and that is found by whoever looks for such numbers.
    with np.errstate(over="ignore", invalid="ignore"):
        if order != (1, 0):
            target[within] = source.transpose(order)
            return
        for row in range(0, source.shape[0], BAND):
            band = source[row : row + BAND]
            target[: source.shape[1], row : row + len(band)] = band.T


def _top(config: ModelConfig) -> list[tuple]:
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    rows = [
        ("head_DV", (embed if config.tied else head, "V D -> D V")),
        ("final_norm_D", ("model.norm.weight", "D -> D")),
    ]
    return rows if config.tied else [("embed_VD", (embed, "V D -> V D")), *rows]


def _layer(config: ModelConfig, layer: int) -> list[tuple]:
    at = f"model.layers.{layer}."
    q, k, v, o = (f"{at}self_attn.{name}_proj" for name in "qkvo")
    gate, up, down = (f"{at}mlp.{name}_proj" for name in ("gate", "up", "down"))
    norms = [(f"{at}{name}_layernorm.weight", "D -> D") for name in ("input", "post_attention")]
    qk_norms = [(f"{at}self_attn.{name}_norm.weight", "H -> H") for name in "qk"]
    queries, keys = "(N H)", "(K H)"
    rows = (
        (True, "norms_2D", *norms),
        (config.qk_norm, "qk_norms_2H", *qk_norms),
        (
            True,
            "wqkv_DX",
            (f"{q}.weight", f"{queries} D -> D {queries}"),
            *((f"{name}.weight", f"{keys} D -> D {keys}") for name in (k, v)),
        ),
        (
            config.qkv_bias,
            "bqkv_X",
            (f"{q}.bias", f"{queries} -> {queries}"),
            *((f"{name}.bias", f"{keys} -> {keys}") for name in (k, v)),
        ),
        (True, "wo_XD", (f"{o}.weight", f"D {queries} -> {queries} D")),
        (config.o_bias, "bo_D", (f"{o}.bias", "D -> D")),
        (True, "wgu_DX", *((f"{name}.weight", "F D -> D F") for name in (gate, up))),
        (config.mlp_bias, "bgu_X", *((f"{name}.bias", "F -> F") for name in (gate, up))),
        (True, "wd_FD", (f"{down}.weight", "D F -> F D")),
        (config.mlp_bias, "bd_D", (f"{down}.bias", "D -> D")),
    )
    return [row for present, *row in rows if present]


def _parameter(config: ModelConfig, tp: int, at: tuple, name: str, *sources: tuple[str, str]) -> Parameter:
    parts = tuple(_part(config, tp, *source) for source in sources)
    letters = name.rpartition("_")[2]
    first = parts[0]
    whole = [first.shape[axis] for axis in first.order]
    if letters[0].isdigit():
        return Parameter((*at, name), letters, (len(parts), *whole), parts, tp)
    if first.axis is not None:
        whole[first.order.index(first.axis)] = tp * sum(part.step for part in parts)
    return Parameter((*at, name), letters, tuple(whole), parts, tp)


def _part(config: ModelConfig, tp: int, name: str, move: str) -> Part:
    make = partial(Part, name, move)
    sizes = {
        "D": config.width,
        "F": config.ffn,
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_width,
        "V": config.vocab,
    }
    groups = _groups(move.split("->")[0])
    shape = tuple(prod(sizes[letter] for letter in group) for group in groups)
    axis = next((axis for axis, group in enumerate(groups) if group[0] in TENSOR), None)
    if axis is None:
        return make(shape, None, 0, 1)
    letter = groups[axis][0]
    width = prod(sizes[inner] for inner in groups[axis][1:])
    if letter == "K":
        kv, rep = lane_axes(tp, config.heads, config.kv_heads)
        return make(shape, axis, sizes["K"] // kv * width, rep)
    total = padded(sizes[letter], tp) if letter in "FV" else sizes[letter]
    return make(shape, axis, total // tp * width, 1)


def _groups(side: str) -> list[tuple[str, ...]]:
    """`"(N H) D"` -> `[("N", "H"), ("D",)]`."""
    return [tuple((merged or single).split()) for merged, single in re.findall(r"\((.*?)\)|(\w)", side)]
