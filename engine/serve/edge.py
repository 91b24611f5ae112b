"""The edge of every RPC: bytes in, bytes out, and each way a call can fail turned into one status.

    bytes -> wire.parse -> method -> message
                 |            |-- SeracError -> its own code with details
                 |            `-- anything else -> INTERNAL with an id; the log has one line with the same id
                 `-- refused, or no message at all -> INVALID_ARGUMENT

The handlers of a service come from its descriptor: RPC `GenerateUnary` is the servicer's `generate_unary`.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from engine.errors import InvalidArgument, SeracError
from engine.serve import status
from engine.serve.wire import parser

log = logging.getLogger("serac.serve")
Call = grpc.aio.ServicerContext
Method = Callable[[Message, Call], Awaitable[Message | None]]


def snake(name: str) -> str:
    """GenerateUnary -> generate_unary."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """The RPCs of `service`, each answered by the coroutine method of `servicer` that bears its name."""
    table = {method.name: _handler(method, getattr(servicer, snake(method.name))) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, table)


def _handler(method: MethodDescriptor, answer: Method) -> grpc.RpcMethodHandler:
    kind = (
        grpc.stream_stream_rpc_method_handler if method.server_streaming else grpc.stream_unary_rpc_method_handler
    )
    return kind(
        guarded(method.full_name, answer),
        request_deserializer=parser(GetMessageClass(method.input_type)),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def guarded(name: str, answer: Method) -> Callable[[object, Call], Awaitable[Message | None]]:
    """`answer` with every failure turned into a status; a cancelled call stays cancelled.

    The one message is read here: grpc's own handlers for a single message never answer a client that sends none.
    """

    async def call(_: object, context: Call) -> Message | None:
        request_id = ""
        try:
            request = await context.read()
            if request is grpc.aio.EOF:
                raise InvalidArgument("request: got no message; expected one")
            if isinstance(request, SeracError):
                raise request
            try:
                return await answer(request, context)
            finally:
                request_id = getattr(request, "request_id", "")
        except SeracError as error:
            failure = error
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            failure = _unexpected(name, error, request_id)
        await context.abort_with_status(status.to_status(failure, request_id))
        raise AssertionError("abort_with_status always raises")

    return call


def _unexpected(name: str, error: Exception, request_id: str) -> SeracError:
    """What the client learns of a bug: an id. The log line says where it happened, and no content."""
    incident = uuid.uuid4().hex[:16]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
    kind = type(error).__name__
    log.error(
        "rpc failed: error_id=%s request_id=%s method=%s kind=%s at=%s", incident, request_id, name, kind, where
    )
    return SeracError(f"internal error; error id {incident}")
