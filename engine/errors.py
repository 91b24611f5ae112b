"""Every error this project raises on purpose, as one tree.

    SeracError                      bug or unexpected state         INTERNAL            500  exit 1
      InvalidArgument               the request is wrong            INVALID_ARGUMENT    400
        Malformed                   bytes unlike their schema       INVALID_ARGUMENT    400  exit 2
      Unsupported                   a part of a contract not there  UNIMPLEMENTED       501
      Forbidden                     needs another proof of who asks PERMISSION_DENIED   403
      NotFound                      no such model, adapter, stream  NOT_FOUND           404
      AlreadyExists                 a request id that still runs    ALREADY_EXISTS      409
      Cancelled                     the client or operator left     CANCELLED           499
      DeadlineExceeded              the deadline passed             DEADLINE_EXCEEDED   504  exit 124
      ResourceExhausted             a limit is reached, retry later RESOURCE_EXHAUSTED  429  retry
        OutOfBlocks                 the KV pool cannot serve now    RESOURCE_EXHAUSTED  429  retry
      Unavailable                   starting or draining            UNAVAILABLE         503  retry
        GroupLost                   a process of the lane is gone   UNAVAILABLE         503  exit 75
      Misfit                        processes that do not fit       FAILED_PRECONDITION 409  exit 78
      ConfigError                   a flag or a file of settings    INVALID_ARGUMENT    400  exit 2
      ModelError                    a model folder or checkpoint    FAILED_PRECONDITION 409  exit 2
      DeviceError                   the device or its program       INTERNAL            500  exit 70
        NumericError                non-finite numbers in one row   INTERNAL            500  exit 70

A message says what was wanted, what was found and what to change; `wrong` writes the usual form. No message
holds prompt text, tokens, keys or addresses.

Exit codes: 0 drained, 1 bug, 2 configuration, 69 peer or host missing, 70 device or numeric, 75 group restart
wanted, 78 versions differ, 124 deadline.
"""

ECHO_CHARS = 64  # a value is echoed to this length


class SeracError(Exception):
    """Base of every error raised on purpose. `field` names the input that was wrong, when one was."""

    grpc = "INTERNAL"
    http = 500
    exit_code = 1
    retry_after_s: float | None = None  # a number means that trying again helps

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.field = field
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidArgument(SeracError):
    """The request itself is wrong; sending it again unchanged cannot help."""

    grpc, http, exit_code = "INVALID_ARGUMENT", 400, 2


class Malformed(InvalidArgument):
    """Bytes of a file or a peer are not what their schema says."""


class Unsupported(SeracError):
    """The contract knows this, this server does not serve it."""

    grpc, http, exit_code = "UNIMPLEMENTED", 501, 2


class Forbidden(SeracError):
    """Whoever asks has not shown what this needs."""

    grpc, http, exit_code = "PERMISSION_DENIED", 403, 2


class NotFound(SeracError):
    """No model, adapter, request or stream has this name."""

    grpc, http, exit_code = "NOT_FOUND", 404, 2


class AlreadyExists(SeracError):
    """A request with this id still runs."""

    grpc, http = "ALREADY_EXISTS", 409


class Cancelled(SeracError):
    """The client or an operator ended the request."""

    grpc, http = "CANCELLED", 499


class DeadlineExceeded(SeracError):
    """The deadline of the request passed before it was done."""

    grpc, http, exit_code = "DEADLINE_EXCEEDED", 504, 124


class ResourceExhausted(SeracError):
    """A queue, quota or pool is full; trying again later helps."""

    grpc, http, retry_after_s = "RESOURCE_EXHAUSTED", 429, 1.0


class OutOfBlocks(ResourceExhausted):
    """The KV pool cannot serve this now; waiting or preempting helps."""


class Unavailable(SeracError):
    """Starting, draining or gone; another replica or a later try helps."""

    grpc, http, exit_code, retry_after_s = "UNAVAILABLE", 503, 69, 1.0


class GroupLost(Unavailable):
    """A process of a lane is gone or cannot go on; all of its processes start anew, with it."""

    exit_code = 75


class Misfit(SeracError):
    """Two processes of one lane are of other versions, settings or models; starting again cannot help."""

    grpc, http, exit_code = "FAILED_PRECONDITION", 409, 78


class NotReady(SeracError):
    """Something is not in the state that this needs, and would come to harm; look at it first."""

    grpc, http, exit_code = "FAILED_PRECONDITION", 409, 69


class ConfigError(SeracError):
    """A flag, an environment variable or a settings file is wrong."""

    grpc, http, exit_code = "INVALID_ARGUMENT", 400, 2


class ModelError(SeracError):
    """A model folder or checkpoint cannot be served as it is."""

    grpc, http, exit_code = "FAILED_PRECONDITION", 409, 2


class DeviceError(SeracError):
    """A device program failed, or a device is missing."""

    exit_code = 70


class NumericError(DeviceError):
    """A row produced numbers that are not finite; its neighbours are unharmed."""


def shown(value: object) -> str:
    """`value` for a message: escaped and cut at `ECHO_CHARS` characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.encode("unicode_escape").decode("ascii") if not text.isascii() else text
    return text if len(text) <= ECHO_CHARS else text[: ECHO_CHARS - 3] + "..."


def wrong(field: str, got: object, expected: str) -> str:
    """The usual message: `max_tokens: got -1; expected an integer 1..32767`."""
    return f"{field}: got {shown(got)}; expected {expected}"
