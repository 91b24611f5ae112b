"""What this package asks of a replica, as Protocols: the replica's own classes fit them, and so do those of tests.

A stream yields lists of deltas, everything that waits at each wake, and ends after every choice has had its finish:

    open(request) -> [delta, delta] -> [delta] -> ... -> [delta with finish] -> end
                \\______________ close(): whatever still runs is aborted ______/
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from threading import Event
from typing import Protocol

from engine.core.request import Request
from engine.errors import SeracError


class ModelInfo(Protocol):
    """What is served. `defaults`: numbers of the generation config, by field of core.request.Sampling."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def defaults(self) -> Mapping[str, float]: ...


class Text(Protocol):
    """Between text and token ids."""

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def encode_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class TokenLogprob(Protocol):
    """A token's log-probability; `rank` 1 is the best, `top` holds (token id, log-probability), best first."""

    token_id: int
    logprob: float
    rank: int | None
    top: Sequence[tuple[int, float]]


class Usage(Protocol):
    """What one choice cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Finish(Protocol):
    """Why a choice ended: stop, length, abort, deadline or error. `stop` is the string or token that matched."""

    reason: str
    stop: str | int | None
    usage: Usage
    error: SeracError | None


class Delta(Protocol):
    """What is new of one choice."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None
    prompt_logprobs: Sequence[TokenLogprob | None] | None
    finish: Finish | None


class Stream(Protocol):
    """The running output of one request."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]: ...
    def close(self) -> None: ...


class Streams(Protocol):
    """Opens streams; `open` raises InvalidArgument, AlreadyExists, ResourceExhausted or Unavailable.

    paired  what another replica says that holds the request's prompt
    """

    async def open(self, request: Request, paired: str = "") -> Stream: ...


class ProcessNow(Protocol):
    """One process of a lane: "awaited", "starting" with its stage, or "ready"."""

    @property
    def rank(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def of(self) -> int: ...


class Standing(Protocol):
    """What is known of a lane's processes; none where it is in this one."""

    @property
    def processes(self) -> Sequence[ProcessNow]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def since_s(self) -> float: ...
    @property
    def problem(self) -> str: ...


class LaneLoad(Protocol):
    """One lane: its name and role, `state` "ready", "starting", "draining" or "given up", its gauges, processes."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def gauges(self) -> Mapping[str, float]: ...
    @property
    def standing(self) -> Standing: ...


class Replica(Protocol):
    """One engine as its doors see it. `drain` blocks until nothing runs or the time is up.

    restart(lanes, drain_s, tell(lane, state, message), leave) blocks until all are back, or the one after `leave`.
    """

    @property
    def info(self) -> ModelInfo: ...
    @property
    def text(self) -> Text: ...
    @property
    def ready(self) -> bool: ...
    def abort(self, request_id: str) -> bool: ...
    def load(self) -> Mapping[str, float]: ...
    def lane_loads(self) -> Sequence[LaneLoad]: ...
    def drain(self, timeout_s: float) -> object: ...
    @property
    def restart(self) -> Callable[[Sequence[str], float, Callable[[str, str, str], None], Event], None]: ...
