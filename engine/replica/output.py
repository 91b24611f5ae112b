"""The output of a request while it runs: drawn tokens become text, stop strings end a choice, what waits is taken.

    Choice   RUNNING --stop string | Ended--> FINISHED --take--> gone          one a sequence
    Output   its choices; `done` when every finish was taken

Pure: it is fed the router's events and asked for deltas, on one thread. Tokens after a stop string are dropped and
not counted. The text of the token id that stopped a sequence is not shown unless include_stop.
Cost: 5-10 us a token, most of it detokenising.
"""

from dataclasses import dataclass

from engine.core import messages
from engine.core.events import Emission
from engine.core.journeys import Drawn, Event, Journey, Scored, Started, Track
from engine.core.request import Request
from engine.errors import SeracError
from engine.replica.delta import Delta, Finish, TokenLogprob, Usage
from engine.text.stops import StopMatcher
from engine.text.text import Text


def token_logprob(event: Emission | messages.Scored, k: int, token_id: int, count: int) -> TokenLogprob:
    """Entry `k` of an event, with the `count` best tokens."""
    assert event.logprob is not None and event.rank is not None
    assert event.top_ids is not None and event.top_logprobs is not None
    ids, values = event.top_ids[k, :count].tolist(), event.top_logprobs[k, :count].tolist()
    top = tuple((i, value) for i, value in zip(ids, values, strict=True) if i >= 0)
    return TokenLogprob(token_id, float(event.logprob[k]), int(event.rank[k]), top)


class Choice:
    """One sequence's text and tokens since they were last taken."""

    def __init__(self, request: Request, index: int, text: Text, eos_ids: tuple[int, ...]):
        stopping = request.stopping
        self.index, self._request = index, request
        self._stop_ids = {*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_ids)}
        self._detokenizer = text.detokenizer(request.prompt_ids[-8:], request.skip_special_tokens)
        self._matcher = StopMatcher(stopping.stop, stopping.include_stop, stopping.min_tokens)
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._scores: list[TokenLogprob | None] | None = None
        self.count = 0  # tokens of the output
        self.cached: int | None = None  # prompt tokens found by prefix, once it is known
        self.finish: Finish | None = None
        self.taken = False  # its finish was taken

    @property
    def waiting(self) -> int:
        """Tokens that nobody has taken."""
        return len(self._ids)

    def token(self, token_id: int, logprob: TokenLogprob | None) -> str | None:
        """Add a drawn token; the stop string that its text completes, if any."""
        self.count += 1
        self._ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token_id in self._stop_ids and not self._request.stopping.include_stop:
            return None
        shown, stop = self._matcher.push(self._detokenizer.step([token_id]), self.count)
        self._text.append(shown)
        return stop

    def score(self, event: messages.Scored) -> None:
        """Add log-probabilities of prompt tokens."""
        count = self._request.sampling.prompt_logprobs or 0
        self._scores = self._scores if self._scores is not None else [None]
        for k in range(len(event.logprob)):
            self._scores.append(token_logprob(event, k, self._request.prompt_ids[event.first + k], count))

    def end(self, reason: str, stop: str | int | None = None, error: SeracError | None = None) -> None:
        """No token follows."""
        if not (reason == "stop" and isinstance(stop, str)):
            shown, matched = self._matcher.push(self._detokenizer.flush(), self.count)
            self._text += [shown, self._matcher.flush()]
            reason, stop = ("stop", matched) if matched is not None and reason == "length" else (reason, stop)
        usage = Usage(len(self._request.prompt_ids), self.count, self.cached or 0)
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
    """A request from admission to its last delta."""

    request: Request
    choices: list[Choice]
    started_at: float = 0.0
    seated_at: float | None = None  # when it first took part in steps
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


def open_output(request: Request, text: Text, eos_ids: tuple[int, ...], now: float) -> Output:
    """The empty output of `request`."""
    choices = [Choice(request, k, text, eos_ids) for k in range(request.sampling.n)]
    return Output(request, choices, started_at=now)


class Desk:
    """Feeds what the router brings to the outputs it belongs to. One thread calls it.

    `deliver` returns the outputs that have something new, and the choices that a stop string ended.
    """

    def __init__(self) -> None:
        self._seats: dict[Track, tuple[Output, Choice]] = {}

    def seat(self, output: Output, journey: Journey) -> None:
        """From now on what `journey` draws is the output's."""
        for track, choice in zip(journey.tracks, output.choices, strict=True):
            self._seats[track] = (output, choice)

    def deliver(self, events: list[Event], now: float) -> tuple[list[Output], list[Track]]:
        """Take in what happened since the last call."""
        touched: dict[int, Output] = {}
        stopped: list[Track] = []
        for event in events:
            if isinstance(event, Drawn):
                self._drawn(event, touched, stopped)
            elif (seat := self._seats.get(event.track)) is not None:
                output, choice = seat
                if isinstance(event, Started):
                    output.seated_at = now if output.seated_at is None else output.seated_at
                    choice.cached = event.cached if choice.cached is None else choice.cached
                elif isinstance(event, Scored):
                    choice.score(event.scores)
                else:
                    choice.end(event.reason, event.stop, event.error)
                    del self._seats[event.track]
                    touched[id(output)] = output
        return list(touched.values()), stopped

    def _drawn(self, event: Drawn, touched: dict[int, Output], stopped: list[Track]) -> None:
        emission, tokens = event.emission, event.emission.tokens.tolist()
        for k, track in event.entries:
            if (seat := self._seats.get(track)) is None:
                continue
            output, choice = seat
            count = output.request.sampling.logprobs
            logprob = (
                None if count is None or emission.logprob is None else token_logprob(emission, k, tokens[k], count)
            )
            stop = choice.token(tokens[k], logprob)
            touched[id(output)] = output
            if stop is not None:
                choice.end("stop", stop)
                del self._seats[track]
                stopped.append(track)
