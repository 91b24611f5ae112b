import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bench.programs import array_bytes, by_kind, collectives
from sharding.mesh import MeshSpec, lane_meshes


@pytest.mark.parametrize(
    "dtype, sizes, expected",
    [("f32", "64,256", 65536), ("bf16", "2,3", 12), ("pred", "7", 7), ("s32", "", 4), ("f8e4m3fn", "5", 5)],
)
def test_the_bytes_of_an_array_are_read_from_its_text(dtype, sizes, expected):
    assert array_bytes(dtype, sizes) == expected


def test_a_collective_that_starts_and_ends_apart_is_counted_once():
    text = """
      %ar = f32[4]{0} all-reduce-start(%x), replica_groups={}
      %done = f32[4]{0} all-reduce-done(%ar)
      %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%y), dimensions={0}
      %done.1 = f32[8]{0} all-gather-done(%ag)
      %both = (f32[4]{0}, s32[2]{0}) all-reduce(%a, %b), channel_id=1
      %pair = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%z), channel_id=1
    """
    assert by_kind(collectives(text)) == {"all-reduce": (3, 16 + 24 + 16), "all-gather": (1, 32)}


def test_the_collectives_of_a_compiled_program_are_found():
    mesh = lane_meshes(MeshSpec(tp=4), 8, 2)[0]

    def local(x):
        y = lax.psum(x, ("kv", "rep"))
        return y, lax.all_gather(jnp.sin(y) * x, ("kv", "rep"))

    whole, split = PartitionSpec(), PartitionSpec(("kv", "rep"))
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=(whole, whole), check_vma=False))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, split))
    text = mapped.lower(x).compile().as_text()
    assert by_kind(collectives(text)) == {"all-reduce": (1, 128), "all-gather": (1, 512)}
