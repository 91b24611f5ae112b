"""`serac serve`: settings -> a replica -> its gRPC server, until it is drained.

    addresses checked -> model loaded, programs compiled -> listening -> banner -> drained -> 0

Whatever is wrong with an address, a port or a key is said before a model is read.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from engine import banner
from engine.clock import SystemClock
from engine.config import Settings
from engine.observe import logs
from engine.progress import progress
from engine.replica.replica import Replica
from engine.replica.streams import Streams
from engine.serve import process
from engine.serve.access import Access, check_address
from engine.serve.server import Door, Listen, Server
from engine.serve.vllm_engine import stubs
from engine.serve.vllm_engine.service import VllmEngineService, descriptor

BYTES = "_bytes"

Progress = Callable[[str, int, int], None]  # (what, done, of)


def listen_of(settings: Settings) -> Listen:
    """Where and how to listen."""
    access = Access(
        token_file=settings.token_file,
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
        insecure_allow_remote=settings.insecure_allow_remote,
    )
    return Listen(
        host=settings.host,
        port=settings.port,
        admin_host=settings.admin_host,
        admin_port=settings.admin_port,
        access=access,
        max_message_bytes=settings.max_message_size,
        max_calls=settings.max_calls,
        stall_s=settings.stall,
        drain_s=settings.drain,
    )


def serve(settings: Settings, build: Callable[[Settings, Progress], Replica], version: str, out: TextIO) -> int:
    """Serve what `build` makes until it is drained; the banner goes to `out`. Returns the exit code."""
    logs.start(sys.stderr, "text" if sys.stderr.isatty() else "json", settings.log_level)
    listen = listen_of(settings)
    listen.check()
    if settings.worker_api == "vllm":
        stubs.check()
    if settings.metrics_port is not None:  # scrapes bring no token, so a token guards nothing here
        open_to_all = Access(insecure_allow_remote=settings.insecure_allow_remote)
        check_address(("admin_host", "metrics_port"), settings.admin_host, settings.metrics_port, open_to_all)
    with progress(sys.stderr) as bar:
        replica = build(settings, bar.show)
    doors: dict[str, object] = {}
    if settings.metrics_port is not None:
        port = replica.metrics.serve(settings.admin_host, settings.metrics_port)
        doors["metrics"] = f"http://{settings.admin_host}:{port}/metrics"
    replica.start()
    try:
        return asyncio.run(_serve(replica, listen, version, doors, out, worker_api=settings.worker_api == "vllm"))
    finally:
        replica.stop()
        logging.getLogger("serac").info("left")


async def _serve(
    replica: Replica, listen: Listen, version: str, doors: Mapping[str, object], out: TextIO, worker_api: bool
) -> int:
    facts = {name: banner.readable(value) for name, value in replica.describe.items()}
    more = [worker_door(replica, version)] if worker_api else []
    server = Server(replica, Streams(replica), listen, SystemClock(), version=version, facts=facts, doors=more)

    def announce(public: str, admin: str) -> None:
        info = replica.info
        addresses = {"grpc": public, "admin": admin, **doors}
        banner.show(f"serac {version} {info.name}", addresses | shown(replica.describe, out.isatty()), out)

    def reload() -> None:
        for each in replica.on_reload:
            each()

    return await process.run(server, announce, reload)


def worker_door(replica: Replica, version: str) -> Door:
    """The contract of gateways, over a replica."""
    return lambda inference, gate: (
        descriptor(),
        VllmEngineService(replica, inference, gate, SystemClock(), version),
    )


def shown(facts: Mapping[str, object], to_person: bool) -> dict[str, object]:
    """The facts of a replica for the banner; for a person, bytes in units and memory in one line."""
    if not to_person:
        return dict(facts)
    memory = {
        name.removesuffix(BYTES): banner.size(value)
        for name, value in facts.items()
        if name.endswith(BYTES) and isinstance(value, (int, float))
    }
    rest = {name: value for name, value in facts.items() if not name.endswith(BYTES)}
    return rest | {"memory of a device": memory}
