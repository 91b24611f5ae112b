"""Weights of 8 or 4 bits: the formats, what they mean, how they are cut and placed.

    PerColumn   numbers_XD int8 or float8_e4m3fn, scales_X    weight[d, x] = number[x, d] * scale[x]
    Grouped     pairs_XD two 4-bit numbers a byte, scales_DX  weight[d, x] = number[x, d] * scale[d / 128, x]
                byte j of a column holds numbers 2j (low bits) and 2j + 1

All is symmetric: no zero points; scales are float32. D is the axis that is summed over, X the columns of the
product. Numbers lie with D last, unlike plain weights: 8-bit tensor cores take operands so, and any other order
costs a transposing copy of the weights in every step (116 MB of temporaries for 4096 x 28672). CPUs read either
order equally fast. Rejected: 4-bit numbers as jnp.int4, three times slower on CPU, and a bitcast to it inside a
product aborts XLA's GPU compiler.
Source: LLM.int8() and SmoothQuant (scales a column and a token); GPTQ (groups of 128).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

GROUP = 128
NOTHING = 1e-30  # columns and tokens no larger than this are zeros: their scale would not be a normal float32
Kind = Literal["int8", "fp8", "int4"]
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}


class PerColumn(NamedTuple):
    """8-bit numbers with one scale a column."""

    numbers_XD: jax.Array
    scales_X: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """D, X."""
        X, D = self.numbers_XD.shape
        return D, X


class Grouped(NamedTuple):
    """4-bit numbers, two a byte, with one scale for each 128 numbers of a column."""

    pairs_XD: jax.Array
    scales_DX: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """D, X."""
        X, half = self.pairs_XD.shape
        return 2 * half, X


Quantised = PerColumn | Grouped


def quantise(w_DX: jax.Array, kind: Kind) -> Quantised:
    """The nearest numbers of `kind`; the largest of a column, or group, becomes the largest number.

    Raises ValueError for int4 where D is no multiple of 128.
    """
    w_DX = w_DX.astype(jnp.float32)
    D, X = w_DX.shape
    if kind != "int4":
        numbers_XD, scales_X = rounded(w_DX.T, kind)
        return PerColumn(numbers_XD, scales_X[:, 0])
    if D % GROUP:
        raise ValueError(
            f"int4 weights of {D} rows: expected a multiple of {GROUP}, the numbers that share a scale"
        )
    numbers, scales = rounded(w_DX.T.reshape(X, D // GROUP, GROUP), kind)
    pairs = (numbers[..., ::2] & 15) | (numbers[..., 1::2] << 4)
    return Grouped(pairs.reshape(X, D // 2), scales[..., 0].T)


def dequantise(w: Quantised) -> jax.Array:
    """The weights that `w` stands for, float32 [D, X]."""
    return widened(w).T


def split(w: Quantised, letter: Literal["D", "X"], axes: str | tuple[str, ...]) -> Quantised:
    """The placement of each array of `w`, as PartitionSpecs: axis `letter` over the mesh axes `axes`.

    Scales split with their columns; over D those of a column are whole everywhere and those of groups split.
    """
    letters = (name.rpartition("_")[2] for name in w._fields)
    return type(w)(*(PartitionSpec(*(axes if each == letter else None for each in name)) for name in letters))


def cut(w: Quantised, letter: Literal["D", "X"], start: int, stop: int) -> Quantised:
    """Rows (D) or columns (X) start..stop - 1 of `w`.

    Raises ValueError where a cut would part numbers that share a scale.
    """
    if isinstance(w, PerColumn):
        if letter == "D":
            return w._replace(numbers_XD=w.numbers_XD[:, start:stop])
        return PerColumn(w.numbers_XD[start:stop], w.scales_X[start:stop])
    if letter == "X":
        return Grouped(w.pairs_XD[start:stop], w.scales_DX[:, start:stop])
    if start % GROUP or stop % GROUP:
        raise ValueError(f"int4 weights cut at rows {start} and {stop}: expected multiples of {GROUP}")
    return Grouped(w.pairs_XD[:, start // 2 : stop // 2], w.scales_DX[start // GROUP : stop // GROUP])


def columns(w: Quantised, start: jax.Array, count: int) -> Quantised:
    """As many columns of `w`, from one that is known when the program runs."""

    def take(x: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, count, axis)

    if isinstance(w, PerColumn):
        return PerColumn(take(w.numbers_XD, 0), take(w.scales_X, 0))
    return Grouped(take(w.pairs_XD, 0), take(w.scales_DX, 1))


def check(x_TD: jax.Array, w: Quantised) -> None:
    """Raises ValueError where shapes or dtypes do not make a product."""
    D, X = w.shape
    if isinstance(w, PerColumn):
        if w.numbers_XD.dtype not in (jnp.int8, jnp.float8_e4m3fn) or w.scales_X.shape != (X,):
            raise ValueError(
                f"weights of {w.numbers_XD.dtype} {w.numbers_XD.shape} with scales {w.scales_X.shape}: "
                f"expected int8 or float8_e4m3fn and scales {(X,)}"
            )
    elif w.pairs_XD.dtype != jnp.int8 or D % GROUP or w.scales_DX.shape != (D // GROUP, X):
        raise ValueError(
            f"int4 weights as {w.pairs_XD.dtype} {w.pairs_XD.shape} with scales {w.scales_DX.shape}: expected int8 "
            f"pairs of a multiple of {GROUP} rows and scales {(D // GROUP, X)}"
        )
    if x_TD.ndim != 2 or x_TD.shape[1] != D:
        raise ValueError(f"tokens {x_TD.shape}: expected [T, {D}] for weights of {D} rows and {X} columns")


def rounded(x: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Numbers of `kind` (int4 as int8) and the scale that all of the last axis share, that axis 1 wide."""
    largest = LARGEST[kind]
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(top <= NOTHING, 1.0, top / largest)
    x = jnp.clip(x / scale, -largest, largest)
    return (x.astype(jnp.float8_e4m3fn) if kind == "fp8" else jnp.round(x).astype(jnp.int8)), scale


def widened(w: Quantised) -> jax.Array:
    """The weights in float32, [X, D]."""
    if isinstance(w, PerColumn):
        return w.numbers_XD.astype(jnp.float32) * w.scales_X[:, None]
    D, X = w.shape
    numbers = jnp.stack(halves(w.pairs_XD), axis=-1).reshape(X, D // GROUP, GROUP)
    return (numbers.astype(jnp.float32) * w.scales_DX.T[:, :, None]).reshape(X, D)


def halves(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 4-bit numbers in the low and in the high bits of int8, as int8 of -8..7."""
    return (pairs << 4) >> 4, pairs >> 4
