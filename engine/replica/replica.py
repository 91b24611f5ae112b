"""One engine as its doors see it: lanes behind one `submit`, and the requests that are open.

    STARTING --start--> READY --drain--> DRAINING --idle or time is up--> STOPPED

A request goes to the lane with the fewest open. Events of a lane are delivered on the thread that `dispatch`
chooses (the event loop's, or the caller's own offline), where text is made and stop strings are matched. A client
that does not read holds about HELD_TOKENS tokens: then its sequences pause until it takes some.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.clock import Clock
from engine.core.request import MAX_SEED, Limits, Request, check_request
from engine.core.scheduler import Scheduler
from engine.errors import AlreadyExists, NotFound, ResourceExhausted, Unavailable, wrong
from engine.observe.logs import RequestLine, log_request
from engine.observe.metrics import Metrics
from engine.replica.delta import Finish
from engine.replica.lane import Lane
from engine.replica.output import Desk, Output, Started, open_output
from engine.text.text import Text

HELD_TOKENS = 256
DRAIN_POLL_S = 0.02

logger = logging.getLogger("serac.replica")

Notify = Callable[[Output], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served. defaults: sampling defaults of the model's generation config."""

    name: str
    revision: str
    context: int
    vocab: int
    eos_ids: tuple[int, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Entry:
    """An open request: its output, the lane it is in, who is told when something waits."""

    output: Output
    lane: int
    notify: Notify


class Replica:
    """Lanes with a common vocabulary, model and admission. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        info: ModelInfo,
        text: Text,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
        seeds: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED + 1),
        max_open: int = 4096,
    ):
        self.info, self.text, self.limits, self.clock, self.metrics = info, text, limits, clock, metrics
        self.lanes: list[Lane] = []
        self._desks: list[Desk] = []
        self._seeds, self._max_open = seeds, max_open
        self._open: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._draining = False
        metrics.refresh = self.refresh
        self.dispatch: Callable[[Callable[[], None]], None] = lambda call: call()
        self.describe: Mapping[str, object] = {}
        self.late_compiles: Callable[[], int] = lambda: 0

    # -- building and stopping ------------------------------------------------------------------------------------

    def add_lane(self, make: Callable[[Callable[[list], None]], Lane]) -> None:
        """Add the lane that `make` makes around its sink."""
        index = len(self.lanes)
        self._desks.append(Desk())
        self.lanes.append(make(lambda events: self.dispatch(lambda: self._deliver(index, events))))

    def start(self) -> None:
        """Run every lane on a thread of its own."""
        for lane in self.lanes:
            thread = threading.Thread(target=lane.run, name=f"lane-{lane.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stop the lanes; what still runs is lost."""
        for lane in self.lanes:
            lane.stop()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let open ones end, then stop; False if some had to be aborted. Blocks."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while self._open and time.monotonic() < until:
            time.sleep(DRAIN_POLL_S)
        whole = not self._open
        for request_id in list(self._open):
            self.abort(request_id)
        until = time.monotonic() + 1.0
        while self._open and time.monotonic() < until:
            time.sleep(DRAIN_POLL_S)
        self.stop()
        return whole

    @property
    def ready(self) -> bool:
        return bool(self._threads) and not self._draining and all(thread.is_alive() for thread in self._threads)

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, notify: Notify) -> Output:
        """Admit `request`; `notify` is called, where events are delivered, whenever its output has something new.

        Raises InvalidArgument, NotFound, AlreadyExists, ResourceExhausted or Unavailable.
        """
        check_request(request, self.limits)
        if request.adapter:
            raise NotFound(f"adapter: {request.adapter!r:.64} is not loaded; available: none", field="adapter")
        now = self.clock.now()
        output = open_output(request, self.text, now)
        with self._lock:
            if self._draining:
                raise Unavailable("replica: draining; try another replica")
            if request.request_id in self._open:
                raise AlreadyExists(f"request_id: {request.request_id!r:.64} still runs; expected a new one")
            if len(self._open) >= self._max_open:
                raise ResourceExhausted(
                    wrong("requests", f"{len(self._open)} open", f"at most {self._max_open}; try again later")
                )
            index = self._least_loaded()
            self._open[request.request_id] = Entry(output, index, notify)
        seed = self._seeds()
        lane = self.lanes[index]

        def begin(scheduler: Scheduler) -> None:
            output.sequences = scheduler.submit(request, seed)
            scheduler.events.append(Started(output, output.sequences))

        lane.post(begin)
        return output

    def abort(self, request_id: str) -> bool:
        """End a request; False when none with this id is open."""
        entry = self._open.get(request_id)
        if entry is None:
            return False
        output = entry.output

        def cancel(scheduler: Scheduler) -> None:
            for sequence in output.sequences:
                scheduler.cancel(sequence)

        self.lanes[entry.lane].post(cancel)
        return True

    def taken(self, output: Output) -> None:
        """Say that `output` was read, so that paused sequences go on."""
        if output.held and output.waiting < HELD_TOKENS:
            self._hold(output, False)

    def _least_loaded(self) -> int:
        open_in = [0] * len(self.lanes)
        for entry in self._open.values():
            open_in[entry.lane] += 1
        return min(range(len(self.lanes)), key=open_in.__getitem__)

    def _hold(self, output: Output, held: bool) -> None:
        output.held = held
        entry = self._open.get(output.request.request_id)
        if entry is not None:
            self.lanes[entry.lane].post(lambda scheduler: [scheduler.hold(s, held) for s in output.sequences])

    # -- what lanes bring -----------------------------------------------------------------------------------------

    def _deliver(self, index: int, events: list) -> None:
        touched, stopped = self._desks[index].deliver(events)
        if stopped:
            self.lanes[index].post(lambda scheduler: [scheduler.cancel(s, "stop") for s in stopped])
        now = self.clock.now()
        for output in touched:
            entry = self._open.get(output.request.request_id)
            self._time(output, now)
            if output.ended:
                self._settle(output, now)
            elif not output.held and output.waiting >= HELD_TOKENS:
                self._hold(output, True)
            if entry is not None:
                entry.notify(output)

    def _time(self, output: Output, now: float) -> None:
        """Time the first token of a request, then the gaps between its tokens."""
        count = output.count
        if count == output.last_count:
            return
        if output.last_at is None:
            output.first_at = now
            self.metrics.observe("time_to_first_token_seconds", now - output.started_at)
        else:
            fresh = count - output.last_count
            self.metrics.observe("inter_token_latency_seconds", (now - output.last_at) / fresh, fresh)
        output.last_at, output.last_count = now, count

    def _settle(self, output: Output, now: float) -> None:
        """Count a request whose every choice has ended, and forget it."""
        if self._open.pop(output.request.request_id, None) is None:
            return
        finishes = [choice.finish for choice in output.choices if choice.finish is not None]
        worst = next((f.reason for f in finishes if f.reason in ("error", "deadline", "abort")), finishes[0].reason)
        self.metrics.add("requests", 1, worst)
        if worst == "abort":
            self.metrics.add("cancelled")
        self.metrics.add("prefix_queries")
        self.metrics.add("prefix_hits", finishes[0].usage.cached_tokens > 0)
        self.metrics.add("tokens", finishes[0].usage.prompt_tokens, "prompt")
        self.metrics.add("tokens", finishes[0].usage.cached_tokens, "cached")
        self.metrics.add("tokens", sum(f.usage.completion_tokens for f in finishes), "generated")
        self.metrics.observe("request_seconds", now - output.started_at)
        log_request(logger, _line(output, worst, finishes, now, self.info.revision))

    def refresh(self) -> None:
        """Bring the gauges and totals of the metrics up to date."""
        load = self.load()
        for name in ("running", "waiting", "steps", "preemptions", "compilations_after_ready"):
            self.metrics.set(name, load[name])
        held = load["blocks"] - load["blocks_available"]
        free = load["blocks_available"] - load["blocks_cached"]
        for state, count in (("held", held), ("cached", load["blocks_cached"]), ("free", free)):
            self.metrics.set("blocks", count, state)

    def load(self) -> dict[str, float]:
        """Gauges of this moment, summed over lanes."""
        schedulers = [lane.scheduler for lane in self.lanes]
        totals = {
            "running": sum(len(s.running) for s in schedulers),
            "waiting": sum(len(s.live) - len(s.running) for s in schedulers),
            "in_flight_steps": sum(len(s.flights) for s in schedulers),
            "blocks": sum(s.pool.usable for s in schedulers),
            "blocks_available": sum(s.pool.available for s in schedulers),
            "blocks_cached": sum(s.pool.cached for s in schedulers),
            "preemptions": sum(s.preemptions for s in schedulers),
            "prompt_tokens": sum(s.prompt_tokens for s in schedulers),
            "cached_tokens": sum(s.cached_tokens for s in schedulers),
            "steps": sum(lane.steps for lane in self.lanes),
            "open_requests": len(self._open),
            "compilations_after_ready": self.late_compiles(),
        }
        return {name: float(value) for name, value in totals.items()}


def _line(output: Output, outcome: str, finishes: list[Finish], now: float, revision: str) -> RequestLine:
    """What the log says of a request that has ended."""
    seated = [s.seated_at for s in output.sequences if s.seated_at is not None]
    error = next((finish.error for finish in finishes if finish.error is not None), None)
    return RequestLine(
        output.request.request_id,
        outcome,
        finishes[0].usage.prompt_tokens,
        finishes[0].usage.cached_tokens,
        sum(finish.usage.completion_tokens for finish in finishes),
        queue_s=min(seated, default=now) - output.started_at,
        first_token_s=None if output.first_at is None else output.first_at - output.started_at,
        total_s=now - output.started_at,
        revision=revision,
        code="" if error is None else error.grpc,
    )
