"""The gRPC server of a replica: a public listener, an admin listener, health, reflection, drain.

    start() -> serving -> drain(): not ready, new calls refused, open ones finish or are cut off -> stop()

Both listeners stand on loopback by default. Clients may ping each 10 s, with or without a call: without these
options a quiet stream dies of `too_many_pings`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.clock import Clock
from engine.errors import ConfigError
from engine.serve.access import Access, TokenGuard, check_address, credentials, read_tokens
from engine.serve.contract import Replica, Streams
from engine.serve.control import ControlService
from engine.serve.edge import handlers
from engine.serve.gate import Gate
from engine.serve.inference import InferenceService
from engine.serve.proto.serac.v1 import control_pb2, inference_pb2

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_POLL_S = 0.5
LAST_WRITES_S = 1.0
Door = Callable[[InferenceService, Gate], tuple[ServiceDescriptor, object]]  # one more public service


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen and what to bear. Port 0 takes any free port."""

    host: str = "127.0.0.1"
    port: int = 50051
    admin_host: str = "127.0.0.1"
    admin_port: int = 50052
    access: Access = field(default_factory=Access)
    max_message_bytes: int = 4 * 2**20
    max_calls: int = 4096
    stall_s: float = 30.0
    drain_s: float = 30.0

    def check(self) -> None:
        """Raises ConfigError for what cannot be listened on; callable before a model is loaded."""
        check_address(("host", "port"), self.host, self.port, self.access)
        check_address(("admin_host", "admin_port"), self.admin_host, self.admin_port, self.access)
        if self.port == self.admin_port != 0 and self.host == self.admin_host:
            raise ConfigError(
                f"admin_port: got {self.admin_port}; expected another port than port", field="admin_port"
            )
        credentials(self.access, self.access.tls_client_ca)


def options(listen: Listen) -> list[tuple[str, int]]:
    """Channel arguments of a listener."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", listen.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


class Server:
    """Serves one replica; all of it runs on one event loop."""

    def __init__(
        self,
        replica: Replica,
        streams: Streams,
        listen: Listen,
        clock: Clock,
        *,
        version: str = "",
        facts: Mapping[str, str] | None = None,
        doors: Sequence[Door] = (),
    ):
        self._replica, self._listen, self._clock = replica, listen, clock
        self.gate = Gate(replica)
        self.drained = asyncio.Event()
        self._health = health.aio.HealthServicer()
        inference = InferenceService(replica, streams, self.gate, clock, stall_s=listen.stall_s)
        control = ControlService(replica, self.gate, clock, self.drain, version, facts or {}, listen.drain_s)
        access = listen.access
        guards = [TokenGuard(read_tokens(access.token_file))] if access.token_file else []
        public = [(INFERENCE, inference), *(door(inference, self.gate) for door in doors)]
        self._public = self._listener(guards, public)
        self._admin = self._listener(guards, [(CONTROL, control)])
        self._names = ["", CONTROL.full_name, *(service.full_name for service, _ in public)]
        self._watch: asyncio.Task[None] | None = None

    def _listener(
        self, guards: list[grpc.aio.ServerInterceptor], services: Sequence[tuple[ServiceDescriptor, object]]
    ) -> grpc.aio.Server:
        listen = self._listen
        server = grpc.aio.server(
            interceptors=guards, options=options(listen), maximum_concurrent_rpcs=listen.max_calls
        )
        server.add_generic_rpc_handlers(tuple(handlers(service, servicer) for service, servicer in services))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [*(service.full_name for service, _ in services), health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        return server

    async def start(self) -> tuple[str, str]:
        """Listen; returns the public and the admin address."""
        listen = self._listen
        listen.check()
        public, admin = credentials(listen.access, listen.access.tls_client_ca), credentials(listen.access)
        addresses = (
            _bind(self._public, listen.host, listen.port, public),
            _bind(self._admin, listen.admin_host, listen.admin_port, admin),
        )
        await self._set_health()
        await self._public.start()
        await self._admin.start()
        self._watch = asyncio.create_task(self._follow_readiness())
        return addresses

    async def drain(self, timeout_s: float | None = None) -> int:
        """Refuse new calls at once, let open ones finish, cut off the rest; returns how many were cut off."""
        end_at = self._clock.now() + (self._listen.drain_s if timeout_s is None else timeout_s)
        self.gate.close()
        await self._set_health()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(end_at - self._clock.now(), 0)):
                await self.gate.idle.wait()
        unfinished = self.gate.open_calls
        await self._public.stop(LAST_WRITES_S if unfinished == 0 else 0)
        await asyncio.to_thread(self._replica.drain, max(end_at - self._clock.now(), 0))
        self.drained.set()
        return unfinished

    async def stop(self) -> None:
        """End both listeners; open calls are cancelled after their last writes."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self._public.stop(0)
        await self._admin.stop(LAST_WRITES_S)

    async def _set_health(self) -> None:
        status = SERVING if self.gate.ready else NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def _follow_readiness(self) -> None:
        """A replica that stops being ready says so to who asks for health, within half a second."""
        known = self.gate.ready
        while True:
            await asyncio.sleep(HEALTH_POLL_S)
            if self.gate.ready != known:
                known = self.gate.ready
                await self._set_health()


def _bind(server: grpc.aio.Server, host: str, port: int, secret: grpc.ServerCredentials | None) -> str:
    name = f"[{host}]" if ":" in host else host
    try:
        if secret is None:
            bound = server.add_insecure_port(f"{name}:{port}")
        else:
            bound = server.add_secure_port(f"{name}:{port}", secret)
    except RuntimeError:
        raise ConfigError(f"port: got {port}; expected a free port on {host}", field="port") from None
    return f"{name}:{bound}"
