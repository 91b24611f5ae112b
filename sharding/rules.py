"""Where each array axis lives, as a table from axis letter to mesh axis.

One letter names one axis in the whole project: in variable suffixes (`wq_DNH`), in einsum strings
and here. The letters are those of `jax.nn.dot_product_attention`, plus ours:

    T tokens in a step   S positions attended   B sequences   L layers      V vocabulary
    D model width        F ffn width            E experts     N query heads
    K key/value heads    G = N // K             H head width  R LoRA rank
    P blocks in a pool   C positions in a block               M blocks in a table
    X columns of a fused projection, interleaved so that each device holds its own q|k|v or gate|up

A lane's mesh has two axes: `kv` splits the key/value heads, `rep` splits the query heads of one of
them; tp = kv * rep, and K lives on kv alone, so that fewer kv heads than tp are replicated over rep.
A placement is written as in the JAX scaling book: `D K_kv H` is wk split over mesh axis kv.
"""

from collections.abc import Mapping
from math import prod

from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]  # a letter that is not listed is replicated

TP = ("kv", "rep")
TENSOR: Rules = {"N": TP, "K": ("kv",), "F": TP, "V": TP, "X": TP}
EXPERT: Rules = {"N": TP, "K": ("kv",), "V": TP, "X": TP, "E": TP}


class ShardingError(ValueError):
    """These rules cannot place this array on this mesh."""


def describe(letters: str, rules: Rules) -> str:
    """`describe("DNH", TENSOR) == "D N_kv_rep H"`."""
    return " ".join("_".join((letter, *rules.get(letter, ()))) for letter in letters)


def place(letters: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> NamedSharding:
    """The sharding of an array with axes `letters` of sizes `shape`.

    Raises ShardingError when two axes want the same mesh axis, or a size does not divide.
    """
    owner: dict[str, str] = {}
    for letter, size in zip(letters, shape, strict=True):
        axes = rules.get(letter, ())
        if taken := [axis for axis in axes if axis in owner]:
            raise ShardingError(f"[{describe(letters, rules)}]: {owner[taken[0]]} already has mesh axis {taken[0]}")
        if size % (ways := prod(mesh.shape[axis] for axis in axes)):
            raise ShardingError(f"[{describe(letters, rules)}]: {letter}={size} does not split {ways} ways")
        owner |= dict.fromkeys(axes, letter)
    return NamedSharding(mesh, PartitionSpec(*(rules.get(letter) for letter in letters)))
