"""The processes of one lane as one JAX runtime: who joins, where they meet, and which devices are whose.

    rank 0 (coordinator) <---- ranks 1.. ----      join -> jax.devices() has the devices of all, rank after rank

A group lives and dies as one: JAX ends every process of it when one is lost. Its coordinator asks nobody who they
are, so it listens on one address, which the caller has found to be loopback or private. NCCL connects by the
interface that NCCL_SOCKET_IFNAME names, the gloo collectives of CPUs by the address of the host's name.
"""

import logging
from collections.abc import Sequence

import jax

HEARTBEAT_S = 60  # JAX's own, a backstop: the lane notices a lost process within seconds by itself
MEET_S = 120


def join(rank: int, processes: int, coordinator: str, devices: Sequence[int] | None = None) -> None:
    """Become process `rank` of so many that meet at `coordinator`; before JAX has touched a device.

    devices  numbers of the GPUs that are this process's, None where all that it sees are; never guessed, since JAX
             under Slurm would take one a task
    Raises RuntimeError when the others do not come within MEET_S.
    """
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=rank,
        local_device_ids=None if devices is None else list(devices),
        coordinator_bind_address=coordinator if rank == 0 else None,
        initialization_timeout=MEET_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
    )
