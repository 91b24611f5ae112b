"""Clients of a server: `Client` waits, `AsyncClient` awaits; both speak serac.v1 and raise engine.errors.

    with Client("127.0.0.1:50051") as client:
        for part in client.stream("def add(a, b):", max_tokens=32):
            print(part.text, end="", flush=True)

Leaving a stream before its end cancels it, which frees its blocks on the server. Keyword arguments of `generate`
and `stream` are the fields of Sampling, Stopping and GenerateRequest; `timeout_s` is the deadline of the call.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from engine.errors import ConfigError
from engine.serve import calls
from engine.serve.calls import Parameter, Prompt, Reply, read_reply, write_generate
from engine.serve.proto.serac.v1 import control_pb2, inference_pb2
from engine.serve.proto.serac.v1 import inference_pb2 as pb
from engine.serve.status import from_call

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
Channel = grpc.Channel | grpc.aio.Channel
Rpc = grpc.UnaryUnaryMultiCallable | grpc.UnaryStreamMultiCallable


def stubs(channel: Channel, service: ServiceDescriptor) -> dict[str, Rpc]:
    """A callable for each RPC of `service`, by its name."""
    table = {}
    for method in service.methods:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        table[method.name] = make(
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
    return table


class Wires:
    """The channels of a client and their stubs; those of ControlService only when an admin address is given."""

    def __init__(self, aio: bool, target: str, admin: str | None, token: str | None, tls_ca: bytes | None):
        module = grpc.aio if aio else grpc
        secret = calls.channel_credentials(tls_ca)

        def open_channel(address: str) -> Channel:
            if secret is None:
                return module.insecure_channel(address, options=calls.OPTIONS)
            return module.secure_channel(address, secret, options=calls.OPTIONS)

        self.metadata = calls.metadata(token)
        self.channels = [open_channel(address) for address in (target, admin) if address is not None]
        self._rpcs = stubs(self.channels[0], INFERENCE)
        if admin is not None:
            self._rpcs |= stubs(self.channels[1], CONTROL)

    def rpc(self, name: str) -> Rpc:
        """Raises ConfigError for an RPC of the admin listener when its address is not known."""
        if name not in self._rpcs:
            raise ConfigError(f"admin: got no address; expected that of the admin listener, which answers {name}")
        return self._rpcs[name]


class Client:
    """Blocking calls; safe to use from several threads. `admin` is the address of the admin listener."""

    def __init__(
        self, target: str, *, admin: str | None = None, token: str | None = None, tls_ca: bytes | None = None
    ):
        self._wires = Wires(False, target, admin, token, tls_ca)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; calls that run are cancelled."""
        for channel in self._wires.channels:
            channel.close()

    def _call(self, name: str, message: Message, timeout_s: float | None = None) -> Message:
        try:
            return self._wires.rpc(name)(message, timeout=timeout_s, metadata=self._wires.metadata)
        except grpc.RpcError as error:
            raise from_call(error) from None

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **parameters: Parameter) -> Reply:
        """The whole answer to a text, token ids or chat messages."""
        message = write_generate(pb.GenerateUnaryRequest, prompt, parameters)
        return read_reply(self._call("GenerateUnary", message, timeout_s))

    def stream(self, prompt: Prompt, *, timeout_s: float | None = None, **parameters: Parameter) -> Iterator[Reply]:
        """The same in parts, as they come."""
        message = write_generate(pb.GenerateRequest, prompt, parameters)
        call = self._wires.rpc("Generate")(message, timeout=timeout_s, metadata=self._wires.metadata)
        try:
            for part in call:
                yield read_reply(part)
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()

    def chat(self, messages: Sequence[Mapping[str, str]], **parameters: Parameter) -> Reply:
        """The assistant's next turn."""
        return self.generate(messages, **parameters)

    def tokenize(self, prompt: Prompt, **parameters: Parameter) -> list[int]:
        """The token ids of a text or of chat messages."""
        return list(self._call("Tokenize", calls.write_tokenize(prompt, parameters)).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call("Detokenize", request).text

    def models(self) -> list[pb.Model]:
        """What the server answers for."""
        return list(self._call("ListModels", pb.ListModelsRequest()).models)

    def abort(self, request_id: str) -> bool:
        """End a running request; False when none has this id."""
        return self._call("Abort", pb.AbortRequest(request_id=request_id)).aborted

    def info(self) -> control_pb2.GetServerInfoResponse:
        """Version, model, mesh, readiness."""
        return self._call("GetServerInfo", control_pb2.GetServerInfoRequest())

    def load(self) -> dict[str, float]:
        """The gauges of the replica, and `open_requests`."""
        return calls.read_load(self._call("GetLoad", control_pb2.GetLoadRequest()))

    def lanes(self) -> list[control_pb2.LaneLoad]:
        """Each lane for itself."""
        return list(self._call("GetLoad", control_pb2.GetLoadRequest()).lanes)

    def drain(self, timeout_s: float | None = None) -> int:
        """End the server without dropping a stream; returns how many were cut off when the time was up."""
        return self._call("Drain", control_pb2.DrainRequest(timeout_s=timeout_s)).unfinished

    def restart(
        self, lanes: Sequence[str] = (), drain_s: float | None = None
    ) -> Iterator[control_pb2.RestartResponse]:
        """Restart lanes one after another, all by default, and say each step; the end is that all are back."""
        message = control_pb2.RestartRequest(lanes=lanes, drain_s=drain_s)
        call = self._wires.rpc("Restart")(message, metadata=self._wires.metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()


class AsyncClient:
    """The calls of Client, awaited; create it on the event loop that uses it."""

    def __init__(
        self, target: str, *, admin: str | None = None, token: str | None = None, tls_ca: bytes | None = None
    ):
        self._wires = Wires(True, target, admin, token, tls_ca)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections; calls that run are cancelled."""
        for channel in self._wires.channels:
            await channel.close()

    async def _call(self, name: str, message: Message, timeout_s: float | None = None) -> Message:
        try:
            return await self._wires.rpc(name)(message, timeout=timeout_s, metadata=self._wires.metadata)
        except grpc.RpcError as error:
            raise from_call(error) from None

    async def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **parameters: Parameter) -> Reply:
        """The whole answer to a text, token ids or chat messages."""
        message = write_generate(pb.GenerateUnaryRequest, prompt, parameters)
        return read_reply(await self._call("GenerateUnary", message, timeout_s))

    async def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **parameters: Parameter
    ) -> AsyncIterator[Reply]:
        """The same in parts, as they come."""
        message = write_generate(pb.GenerateRequest, prompt, parameters)
        call = self._wires.rpc("Generate")(message, timeout=timeout_s, metadata=self._wires.metadata)
        try:
            async for part in call:
                yield read_reply(part)
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()

    async def chat(self, messages: Sequence[Mapping[str, str]], **parameters: Parameter) -> Reply:
        """The assistant's next turn."""
        return await self.generate(messages, **parameters)

    async def tokenize(self, prompt: Prompt, **parameters: Parameter) -> list[int]:
        """The token ids of a text or of chat messages."""
        return list((await self._call("Tokenize", calls.write_tokenize(prompt, parameters))).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call("Detokenize", request)).text

    async def models(self) -> list[pb.Model]:
        """What the server answers for."""
        return list((await self._call("ListModels", pb.ListModelsRequest())).models)

    async def abort(self, request_id: str) -> bool:
        """End a running request; False when none has this id."""
        return (await self._call("Abort", pb.AbortRequest(request_id=request_id))).aborted

    async def info(self) -> control_pb2.GetServerInfoResponse:
        """Version, model, mesh, readiness."""
        return await self._call("GetServerInfo", control_pb2.GetServerInfoRequest())

    async def load(self) -> dict[str, float]:
        """The gauges of the replica, and `open_requests`."""
        return calls.read_load(await self._call("GetLoad", control_pb2.GetLoadRequest()))

    async def lanes(self) -> list[control_pb2.LaneLoad]:
        """Each lane for itself."""
        return list((await self._call("GetLoad", control_pb2.GetLoadRequest())).lanes)

    async def drain(self, timeout_s: float | None = None) -> int:
        """End the server without dropping a stream; returns how many were cut off when the time was up."""
        return (await self._call("Drain", control_pb2.DrainRequest(timeout_s=timeout_s))).unfinished

    async def restart(
        self, lanes: Sequence[str] = (), drain_s: float | None = None
    ) -> AsyncIterator[control_pb2.RestartResponse]:
        """Restart lanes one after another, all by default, and say each step; the end is that all are back."""
        message = control_pb2.RestartRequest(lanes=lanes, drain_s=drain_s)
        call = self._wires.rpc("Restart")(message, metadata=self._wires.metadata)
        try:
            async for step in call:
                yield step
        except grpc.RpcError as error:
            raise from_call(error) from None
        finally:
            call.cancel()
