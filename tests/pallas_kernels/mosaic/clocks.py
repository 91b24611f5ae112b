"""Clocks for what tensor cores read: jax's interpreter watches copies and threads, but not products.

    with products_have_clocks(), watched() as race:

A product reads shared memory on its own, like a copy: after what its thread has made visible by a fence or waited
for, and done when the thread takes the sum. So a read gets a clock of its own when the product begins, and the
thread gets that clock when the sum is taken. What is written between, or was not made visible, is a race.
So a fence that is missing before a product, a wait after it, and a place given back before its end are seen.
Kernels that wait for products otherwise than by taking the sum would be blamed without cause.
"""

import contextlib

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from tests.pallas_kernels.mosaic import interpreting


@contextlib.contextmanager
def products_have_clocks():
    """To be entered before `watched`."""
    begun = {}  # thread -> clocks of its products whose sums nobody took yet
    product, taken, registers = (
        gpu_callbacks.wgmma,
        gpu_callbacks.wgmma_accumulator_deref,
        interpreting.multiply_registers,
    )

    @gpu_callbacks.fail_on_exception
    def multiply(*, token, thread, source_info, **rest):
        places = [(rest[f"{name}_allocation_key_as_array"], rest[f"{name}_transforms"]) for name in "ab"]
        begun.setdefault(thread, []).append(read(places, thread, source_info))
        return product(token=token, thread=thread, source_info=source_info, **rest)

    @gpu_callbacks.fail_on_exception
    def multiply_registers(*, token, thread, source_info, operands, **rest):
        begun.setdefault(thread, []).append(read(operands[1:], thread, source_info))
        return registers(token=token, thread=thread, source_info=source_info, operands=operands, **rest)

    @gpu_callbacks.fail_on_exception
    def take(*, token, thread, **rest):
        memory = gpu_callbacks._get_shared_memory()
        with memory.lock:
            for clock in begun.pop(thread, []):
                memory.clocks[thread].update(clock)
        return taken(token=token, thread=thread, **rest)

    gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref = multiply, take
    interpreting.multiply_registers = multiply_registers
    try:
        yield
    finally:
        gpu_callbacks.wgmma, gpu_callbacks.wgmma_accumulator_deref = product, taken
        interpreting.multiply_registers = registers


def read(places, thread, source_info):
    """Watch a product read `places`, keys with transforms, and return its clock."""
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())
    for key, transforms in places:
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        when = clock.async_smem_clock.copy()
        gpu_callbacks.get_races().check_read(
            thread, when, key, memory.access(key, transforms), source_info=source_info
        )
    return clock
