"""The output of a request while it runs: drawn tokens become text, stop strings end a choice, what waits is taken.

    Choice   RUNNING --stop string | Ended--> FINISHED --take--> gone          one a sequence
    Output   its choices; `done` when every finish was taken

Pure: it is fed events and asked for deltas, on one thread. Tokens after a stop string are dropped and not counted.
The text of the token id that stopped a sequence is not shown unless include_stop.
Cost: 5-10 us a token, most of it detokenising.
"""

from dataclasses import dataclass, field

from engine.core.events import Emission, Ended, Scored
from engine.core.request import Request
from engine.core.sequence import Sequence
from engine.errors import SeracError
from engine.replica.delta import Delta, Finish, TokenLogprob, Usage
from engine.text.stops import StopMatcher
from engine.text.text import Text


def token_logprob(event: Emission | Scored, k: int, token_id: int, count: int) -> TokenLogprob:
    """Entry `k` of an event, with the `count` best tokens."""
    assert event.logprob is not None and event.rank is not None
    assert event.top_ids is not None and event.top_logprobs is not None
    ids, values = event.top_ids[k, :count].tolist(), event.top_logprobs[k, :count].tolist()
    top = tuple((i, value) for i, value in zip(ids, values, strict=True) if i >= 0)
    return TokenLogprob(token_id, float(event.logprob[k]), int(event.rank[k]), top)


class Choice:
    """One sequence's text and tokens since they were last taken."""

    def __init__(self, request: Request, index: int, text: Text):
        stopping = request.stopping
        self.index, self._request = index, request
        self._detokenizer = text.detokenizer(request.prompt_ids[-8:], request.skip_special_tokens)
        self._matcher = StopMatcher(stopping.stop, stopping.include_stop, stopping.min_tokens)
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._scores: list[TokenLogprob | None] | None = None
        self.count = 0  # tokens of the output
        self.finish: Finish | None = None
        self.taken = False  # its finish was taken

    @property
    def waiting(self) -> int:
        """Tokens that nobody has taken."""
        return len(self._ids)

    def token(self, token_id: int, stops: bool, logprob: TokenLogprob | None) -> str | None:
        """Add a drawn token, which `stops` the sequence or not; the stop string that its text completes, if any."""
        self.count += 1
        self._ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if stops and not self._request.stopping.include_stop:
            return None
        shown, stop = self._matcher.push(self._detokenizer.step([token_id]), self.count)
        self._text.append(shown)
        return stop

    def score(self, event: Scored) -> None:
        """Add log-probabilities of prompt tokens."""
        count = self._request.sampling.prompt_logprobs or 0
        self._scores = self._scores if self._scores is not None else [None]
        for k in range(len(event.logprob)):
            self._scores.append(token_logprob(event, k, self._request.prompt_ids[event.first + k], count))

    def end(self, reason: str, cached: int, stop: str | int | None = None, error: SeracError | None = None) -> None:
        """No token follows."""
        if not (reason == "stop" and isinstance(stop, str)):
            shown, matched = self._matcher.push(self._detokenizer.flush(), self.count)
            self._text += [shown, self._matcher.flush()]
            reason, stop = ("stop", matched) if matched is not None and reason == "length" else (reason, stop)
        usage = Usage(len(self._request.prompt_ids), self.count, cached)
        self.finish = Finish(reason, usage, stop, error)

    def take(self) -> Delta | None:
        """What is new, None if nothing is. Text that may yet be part of a stop string waits."""
        scores = self._scores if self.count or self.finish else None
        if not (self._ids or scores or (self.finish and not self.taken)):
            return None
        logprobs = self._logprobs if self._request.sampling.logprobs is not None else None
        delta = Delta(self.index, "".join(self._text), self._ids, logprobs, scores, self.finish)
        self._text, self._ids, self._logprobs = [], [], []
        self._scores = None if scores else self._scores
        self.taken = self.finish is not None
        return delta


@dataclass(slots=True)
class Output:
    """A request in a lane, from admission to its last delta."""

    request: Request
    choices: list[Choice]
    sequences: list[Sequence] = field(default_factory=list)  # set by the lane's thread when it submits
    started_at: float = 0.0
    first_at: float | None = None  # when tokens first came
    last_at: float | None = None  # when they last came
    last_count: int = 0
    held: bool = False
    closed: bool = False  # nobody reads any more

    @property
    def ended(self) -> bool:
        """Every choice has its finish."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def done(self) -> bool:
        """Every finish was taken."""
        return all(choice.taken for choice in self.choices)

    @property
    def waiting(self) -> int:
        """Tokens that nobody has taken."""
        return sum(choice.waiting for choice in self.choices)

    @property
    def count(self) -> int:
        """Tokens of the output so far."""
        return sum(choice.count for choice in self.choices)

    def take(self) -> list[Delta]:
        """Everything that waits, choice by choice."""
        return [delta for choice in self.choices if (delta := choice.take()) is not None]


def open_output(request: Request, text: Text, now: float) -> Output:
    """The empty output of `request`."""
    return Output(request, [Choice(request, k, text) for k in range(request.sampling.n)], started_at=now)


@dataclass(frozen=True, slots=True)
class Started:
    """A lane took a request; its sequences have serials from now on."""

    output: Output
    sequences: list[Sequence]


class Desk:
    """Feeds the events of one lane to the outputs they belong to. One thread calls it.

    `deliver` returns the outputs that have something new, and the sequences that a stop string ended.
    """

    def __init__(self) -> None:
        self._seats: dict[int, tuple[Output, Choice, Sequence]] = {}

    def deliver(self, events: list) -> tuple[list[Output], list[Sequence]]:
        """Take in what a turn of the lane brought."""
        touched: dict[int, Output] = {}
        stopped: list[Sequence] = []
        for event in events:
            if isinstance(event, Emission):
                self._emission(event, touched, stopped)
            elif isinstance(event, Started):
                for sequence, choice in zip(event.sequences, event.output.choices, strict=True):
                    self._seats[sequence.serial] = (event.output, choice, sequence)
            elif isinstance(event, Scored):
                if (seat := self._seats.get(event.sequence.serial)) is not None:
                    seat[1].score(event)
            elif isinstance(event, Ended):
                self._ended(event, touched)
        return list(touched.values()), stopped

    def _emission(self, event: Emission, touched: dict[int, Output], stopped: list[Sequence]) -> None:
        for k, (serial, token) in enumerate(zip(event.serials.tolist(), event.tokens.tolist(), strict=True)):
            if (seat := self._seats.get(serial)) is None:
                continue
            output, choice, sequence = seat
            count = output.request.sampling.logprobs
            logprob = None if count is None or event.logprob is None else token_logprob(event, k, token, count)
            stop = choice.token(token, token in sequence.stop_ids, logprob)
            touched[id(output)] = output
            if stop is not None:
                choice.end("stop", sequence.cached, stop)
                del self._seats[serial]
                stopped.append(sequence)

    def _ended(self, event: Ended, touched: dict[int, Output]) -> None:
        if (seat := self._seats.pop(event.sequence.serial, None)) is not None:
            output, choice, sequence = seat
            choice.end(event.reason, sequence.cached, event.stop, event.error)
            touched[id(output)] = output
