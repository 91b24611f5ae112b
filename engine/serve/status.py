"""Our errors as google.rpc.Status, and back: the same class on both ends of a connection.

    SeracError --to_status--> code + message + ErrorInfo [+ BadRequest] [+ RetryInfo] --from_call--> SeracError

ErrorInfo.reason is the class name in capitals, so that a client finds the class and not only the code.
"""

import re

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2
from grpc_status import rpc_status

from engine import errors
from engine.errors import SeracError

DOMAIN = "serac"
TRAILER = "grpc-status-details-bin"
CODES = {code.name: code for code in grpc.StatusCode}


def reason(kind: type[SeracError]) -> str:
    """InvalidArgument -> INVALID_ARGUMENT."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()


def _tree(kind: type[SeracError]) -> list[type[SeracError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


BY_REASON = {reason(kind): kind for kind in _tree(SeracError)}
BY_CODE = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "CANCELLED": errors.Cancelled,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAVAILABLE": errors.Unavailable,
    "FAILED_PRECONDITION": errors.ModelError,
}


def to_status(error: SeracError, request_id: str = "") -> grpc.Status:
    """What a handler aborts with."""
    status = status_pb2.Status(code=CODES[error.grpc].value[0], message=str(error))
    info = details.ErrorInfo(reason=reason(type(error)), domain=DOMAIN)
    if error.field is not None:
        info.metadata["field"] = error.field
    if request_id:
        info.metadata["request_id"] = request_id
    parts = [info]
    if error.field is not None:
        violation = details.BadRequest.FieldViolation(field=error.field, description=str(error))
        parts.append(details.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry = details.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        parts.append(retry)
    for part in parts:
        status.details.append(Packed())
        status.details[-1].Pack(part)
    return rpc_status.to_status(status)


def from_call(call: grpc.RpcError) -> SeracError:
    """The error that a failed call of a client stands for; of a foreign server, by its code alone."""
    code = call.code().name if call.code() is not None else "UNKNOWN"
    message = call.details() or code
    info, retry_after_s = details.ErrorInfo(), None
    for part in _details(call):
        if part.Is(details.ErrorInfo.DESCRIPTOR):
            part.Unpack(info)
        elif part.Is(details.RetryInfo.DESCRIPTOR):
            retry = details.RetryInfo()
            part.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    kind = BY_REASON.get(info.reason) if info.domain == DOMAIN else BY_CODE.get(code)
    if kind is None:
        kind, message = SeracError, f"{code}: {message}"
    return kind(message, field=info.metadata.get("field"), retry_after_s=retry_after_s)


def _details(call: grpc.RpcError) -> list[Packed]:
    trailers = call.trailing_metadata() or ()
    packed = [value for key, value in trailers if key == TRAILER]
    return list(status_pb2.Status.FromString(packed[0]).details) if packed else []
