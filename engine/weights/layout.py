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
from collections.abc import Callable, Iterator
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
BAND = 16  # rows moved together: a transposing copy of more at once misses the cache at every number
PIECE = 1 << 22  # numbers read at once

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


class Piece(NamedTuple):
    """A slice of a tensor on disk, and where in a shard's part it goes."""

    name: str
    cut: Index
    order: tuple[int, ...]  # axes of the file in the order of the part
    target: tuple[int | slice, ...]


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


def pieces(parameter: Parameter, shard: int) -> Iterator[Piece]:
    """What `shard` reads, a few megabytes at a time: its own slices and nothing else, none of them empty."""
    taken = 0  # of the split axis, by the parts before
    for number, part in enumerate(parameter.parts):
        cut, order = part.cut(shard), part.order
        corner = [taken if axis == part.axis else 0 for axis in range(len(cut))]
        taken += part.step
        width = prod(piece.stop - piece.start for piece in cut[1:])
        rows = max(PIECE // max(width, 1) // BAND, 1) * BAND
        for first in range(cut[0].start, cut[0].stop if width else 0, rows):
            piece = (slice(first, min(first + rows, cut[0].stop)), *cut[1:])
            start = [corner[0] + first - cut[0].start, *corner[1:]]
            target = tuple(slice(start[axis], start[axis] + piece[axis].stop - piece[axis].start) for axis in order)
            yield Piece(part.name, piece, order, (number, *target) if parameter.stacked else target)


def blank(parameter: Parameter, dtype: np.dtype) -> np.ndarray:
    """A shard's part before anything is read: zeros, at an address that a CPU device takes over without a copy."""
    size = prod(parameter.local_shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(parameter.local_shape)


def fill(local: np.ndarray, piece: Piece, read: Read) -> None:
    """Reads a piece into the part it belongs to, casting on the way.

    A number too large for the dtype becomes infinite, and that is found by whoever looks for such numbers.
    """
    source, target = read(piece.name, piece.cut), local[piece.target]
    with np.errstate(over="ignore", invalid="ignore"):
        if piece.order != (1, 0):
            target[...] = source.transpose(piece.order)
            return
        for row in range(0, source.shape[0], BAND):
            target[:, row : row + BAND] = source[row : row + BAND].T


def read_part(parameter: Parameter, shard: int, read: Read, dtype: np.dtype) -> np.ndarray:
    """The part of `shard` in `dtype`, zero where its share is padding."""
    local = blank(parameter, dtype)
    for piece in pieces(parameter, shard):
        fill(local, piece, read)
    return local


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
