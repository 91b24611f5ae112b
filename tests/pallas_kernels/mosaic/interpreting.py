"""Mosaic GPU kernels on a machine without a GPU: every barrier, copy and thread is played by the host.

    with interpreted():              shared memory and outputs start as NaN, a read out of bounds raises
    with interpreted(races=True):    and two unordered accesses, one of them a write, fail the test
    with watched() as race:          and `race()` tells whether there were any, for planted bugs

A copy into boxes of 8 rows ends with the box that it begins in, unless it begins where one does: so does a GPU's,
whose source is cut into boxes from its beginning on, and jax's interpreter copies all.
It also lacks products whose left operand is in registers, which `multiply_registers` adds, and stores to
an accumulator, which `store_registers` adds. Whoever imports this module is skipped where jax is older than its
interpreter. A call costs seconds: tiny shapes only.
"""

import contextlib
import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.core import WGMMAAbstractAccumulatorRef
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.primitives import ref_swap

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic interpretation needs jax 0.11", allow_module_level=True)

# A thread that waits at a barrier holds one of XLA's, which are as many as processors unless told otherwise: on two
# of them four warpgroups wait for each other for ever. It is read when the first program runs.
os.environ.setdefault("NPROC", "8")


@contextlib.contextmanager
def interpreted(races=False):
    """Kernels traced and run within are interpreted. Results must be computed within, too."""
    with watched(races) as race:
        yield
        jax.effects_barrier()
        assert not race(), "a race was found: jax printed the two accesses"


@contextlib.contextmanager
def watched(races=True):
    """As `interpreted`, and gives a function that tells whether any kernel run so far had a race."""
    states = []

    def remember(*args, **kwargs):
        states.append(state(*args, **kwargs))
        return states[-1]

    interpreter = jaxpr_interpret.JaxprInterpreter
    state, product = gpu_callbacks.GPURaceDetectionState, interpreter._interpret_wgmma_ref_p
    store, swap = primitives.wgmma_accumulator_store, interpreter._interpret_swap_p
    copy = gpu_callbacks.copy_gmem_to_smem
    gpu_callbacks.copy_gmem_to_smem = functools.partial(copy_in_boxes, shared=copy)
    gpu_callbacks.GPURaceDetectionState = remember
    interpreter._interpret_wgmma_ref_p = functools.partialmethod(multiply, shared=product)
    primitives.wgmma_accumulator_store = lambda ref, x: ref_swap(ref, None, x)
    interpreter._interpret_swap_p = functools.partialmethod(store_accumulator, shared=swap)
    try:
        params = InterpretGPUParams(detect_races=races, uninitialized_memory="nan", out_of_bounds_reads="raise")
        with force_gpu_interpret_mode(params):
            yield lambda: any(seen.races_found for seen in states)
            jax.effects_barrier()
    finally:
        gpu_callbacks.GPURaceDetectionState = state
        interpreter._interpret_wgmma_ref_p = product
        primitives.wgmma_accumulator_store = store
        gpu_callbacks.copy_gmem_to_smem = copy
        interpreter._interpret_swap_p = swap
        gpu_callbacks.reset_gpu_interpret_mode_state()  # an exception leaves memory behind


def copy_in_boxes(*, src_transforms, dst_transforms, shared, **others):
    """Jax's own copy, of those rows that a GPU would copy."""
    boxes = [each.tiling[0] for each in dst_transforms if hasattr(each, "tiling")]
    if boxes:
        rows = places(src_transforms[-1])[-2][1]
        fits = boxes[0] - int(rows.start) % boxes[0]
        if fits < boxes[0] and rows.size > fits:
            src_transforms, dst_transforms = (cut(each, fits) for each in (src_transforms, dst_transforms))
    return shared(src_transforms=src_transforms, dst_transforms=dst_transforms, **others)


def places(indexer):
    """The slices among the indices, with where each stands."""
    return [(i, each) for i, each in enumerate(indexer.indices) if hasattr(each, "size") and hasattr(each, "start")]


def cut(transforms, rows):
    """With so many rows, in the last dimension but one that has any."""
    *before, indexer = transforms
    index, old = places(indexer)[-2]
    indices = list(indexer.indices)
    indices[index] = dataclasses.replace(old, size=rows)
    return (*before, dataclasses.replace(indexer, indices=tuple(indices)))


def store_accumulator(interpreter, eqn, token, get_invals, shared):
    """A store: jax's own unless it goes to an accumulator, which belongs to one thread and cannot race."""
    if not isinstance(eqn.invars[0].aval, WGMMAAbstractAccumulatorRef):
        return shared(interpreter, eqn, token, get_invals)
    key, value = get_invals()
    return callback.io_callback(
        functools.partial(store_registers, source_info=eqn.source_info),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, eqn.outvars[0].aval),
        token=token,
        key=key,
        value=value,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
    )


@gpu_callbacks.fail_on_exception
def store_registers(*, token, key, value, mesh_location, thread, source_info):
    """Put a value into an accumulator."""
    memory = gpu_callbacks._get_shared_memory()
    note = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    value = np.asarray(value)
    memory.store_buffer_content(key, memory.access(key, ()), value, thread, logging_info=note)
    return token, value


def multiply(interpreter, eqn, token, get_invals, shared):
    """A product on tensor cores: jax's own where both operands are in shared memory."""
    if hasattr(eqn.invars[1].aval, "inner_aval"):
        return shared(interpreter, eqn, token, get_invals)
    sum_key, a, b_key, *leaves = get_invals()
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    of_sum, _, of_b = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    sum_key, of_sum = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, sum_key, of_sum)
    b_key, of_b = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b_key, of_b)
    token = callback.io_callback(
        functools.partial(multiply_registers, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        a=a,
        operands=((sum_key, of_sum), (b_key, of_b)),
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
    )
    return token, []


@gpu_callbacks.fail_on_exception
def multiply_registers(*, token, a, operands, mesh_location, thread, source_info):
    """sum += a . b with a in registers."""
    memory = gpu_callbacks._get_shared_memory()
    note = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
    keys = [gpu_callbacks.HostAllocationKey.from_array(key) for key, _ in operands]
    places = [
        memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
        for key, (_, transforms) in zip(keys, operands, strict=True)
    ]
    (old, _, _), (b, _, _) = (
        memory.get_buffer_content(key, place, thread, logging_info=note)
        for key, place in zip(keys, places, strict=True)
    )
    with np.errstate(invalid="ignore"):  # rows that nobody reads may be NaN
        added = np.matmul(np.asarray(a).astype(np.float32), b.astype(np.float32)).astype(old.dtype)
    memory.store_buffer_content(keys[0], places[0], old + added, thread, logging_info=note)
    return token
