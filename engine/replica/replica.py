"""One engine as its doors see it: lanes behind one `submit`, and the requests that are open.

    STARTING --start--> READY --drain--> DRAINING --idle or time is up--> STOPPED

The router (engine/core/router.py) places a request on lanes and sees it through. What lanes say is taken in on the
thread that `dispatch` chooses (the event loop's, or the caller's own offline), where text is made and stop strings
are matched. A client that does not read holds about HELD_TOKENS tokens: then its sequences pause.
"""

import functools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.clock import Clock
from engine.core import handoff
from engine.core.blocks import Content
from engine.core.directory import Reader
from engine.core.handoff import State
from engine.core.holds import Claim
from engine.core.journeys import Event, Journey
from engine.core.messages import FRONT, ToFront
from engine.core.request import MAX_SEED, Limits, Request, check_request
from engine.core.roles import Role
from engine.core.router import Router
from engine.errors import AlreadyExists, NotFound, NotReady, ResourceExhausted, SeracError, Unavailable, wrong
from engine.movers.links import Links
from engine.observe.logs import RequestLine, log_request
from engine.observe.metrics import Metrics
from engine.replica.delta import Finish
from engine.replica.lane import Lane, Said
from engine.replica.loads import DRAINING, READY, LaneLoad, Standing, block_states, gauges, totals
from engine.replica.output import Desk, Output, open_output
from engine.replica.pairing import Pairing
from engine.replica.remote import Remote
from engine.replica.restarts import Restart, nothing_to_restart
from engine.text.text import Text

HELD_TOKENS = 256
DRAIN_POLL_S = 0.02

logger = logging.getLogger("serac.replica")

Notify = Callable[[Output], None]
Told = Callable[[str | SeracError], None]  # what a decoding replica must show


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
    """An open request: its output, its way over the lanes, who is told when something waits."""

    output: Output
    journey: Journey
    notify: Notify


class Replica:
    """Lanes with a common vocabulary, model and admission. Every method may be called from any thread."""

    def __init__(
        self,
        info: ModelInfo,
        text: Text,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
        root: bytes = b"",
        seeds: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED + 1),
        max_open: int = 4096,
        max_wait_s: float = math.inf,
    ):
        self.info, self.text, self.limits, self.clock, self.metrics = info, text, limits, clock, metrics
        self.router = Router(limits.block_size, limits.context, limits.eos_ids, root)
        self.router.max_wait_s = max_wait_s
        self._here: dict[str, Lane] = {}  # lanes of this process, by name
        self._desk = Desk()
        self._seeds, self._max_open = seeds, max_open
        self._open: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._draining = False
        metrics.refresh = self.refresh
        self.dispatch: Callable[[Callable[[], None]], None] = lambda call: call()
        self.describe: Mapping[str, object] = {}
        self.late_compiles: Callable[[], int] = lambda: 0
        self.block_bytes = 0  # of the KV of one block, all heads together
        self.on_stop: list[Callable[[], None]] = []
        self.on_reload: list[Callable[[], None]] = []  # files that this process was started with may be new
        self.remote: Remote | None = None
        self.pairing: Pairing | None = None  # with replicas that share a secret with this one
        self._offers: dict[int, tuple[int, Told]] = {}  # prompts that others wait for, with their tokens
        self.generated_tokens = 0
        # Lanes that are not there, given the names of those that are: whoever starts them knows.
        self.absent: Callable[[list[str]], list[LaneLoad]] = lambda present: []
        self.standing: Callable[[str], Standing] = lambda slot: Standing()
        self.restart: Restart = nothing_to_restart

    # -- building and stopping ------------------------------------------------------------------------------------

    def add_lane(self, lane: Lane, role: Role = "both") -> None:
        """Serve with `lane`, which is on this machine and turns in this process."""
        self._here[lane.name] = lane
        lane.connect(self._hear)
        with self._lock:
            self.router.lane_up(lane.name, role)

    @property
    def lanes(self) -> list[Lane]:
        """Those that turn in this process."""
        return list(self._here.values())

    def pass_on(self, receiver: str, sender: str, message: handoff.Message) -> None:
        """What a lane of this process says to another; nobody hears what is said to a lane that is not here."""
        if (lane := self._here.get(receiver)) is not None:
            lane.hear(sender, message)

    def serve_remote(self, links: Links) -> Remote:
        """Serve with the lanes of other processes, which come over the front's `links`; it closes them."""
        first_session = secrets.randbelow(1 << 40) << 16
        self.remote = Remote(self.router, self.clock, links, first_session, self._route)
        self.remote.start(lambda: self._locked)
        return self.remote

    def _locked(self, call: Callable[[], None]) -> None:
        def under_lock() -> None:
            with self._lock:
                call()

        self.dispatch(under_lock)

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
        if self.remote is not None:
            self.remote.stop()
        while self.on_stop:
            self.on_stop.pop()()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let open ones end, then stop; False if some had to be aborted. Blocks."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while self._open and time.monotonic() < until:
            time.sleep(DRAIN_POLL_S)
        whole = not self._open
        for request_id in list(self._open):
            self.dispatch(functools.partial(self.abort, request_id))
        until = time.monotonic() + 1.0
        while self._open and time.monotonic() < until:
            time.sleep(DRAIN_POLL_S)
        self.stop()
        return whole

    @property
    def ready(self) -> bool:
        if self._draining or not all(thread.is_alive() for thread in self._threads):
            return False
        return bool(self._threads) if self.remote is None else self.router.ready

    def retire(self, name: str) -> None:
        """Place nothing new on a lane, and wait for its next life until `returned`. Raises NotReady."""
        with self._lock:
            if name not in self.router.lanes:
                raise NotReady(f"lane {name.split('.')[0]}: it is not there any more")
            self.router.retire(name)

    def serves(self, name: str) -> int:
        """Choices and prompts that are under way on a lane."""
        with self._lock:
            return self.router.serves(name)

    def returned(self, name: str) -> None:
        """A lane that was retired is there again, or is not waited for any more."""
        with self._lock:
            self.router.returned(name)

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, notify: Notify, paired: str = "") -> Output:
        """Admit `request`; `notify` is called, where events are delivered, whenever its output has something new.

        paired  what the replica said that holds its prompt, if one does
        Raises InvalidArgument, NotFound, AlreadyExists, ResourceExhausted or Unavailable.
        """
        check_request(request, self.limits)
        if request.adapter:
            raise NotFound(f"adapter: {request.adapter!r:.64} is not loaded; available: none", field="adapter")
        output = open_output(request, self.text, self.limits.eos_ids, self.clock.now())
        with self._lock:
            if self._draining:
                raise Unavailable("replica: draining; try another replica")
            if request.request_id in self._open:
                raise AlreadyExists(f"request_id: {request.request_id!r:.64} still runs; expected a new one")
            if len(self._open) >= self._max_open:
                raise ResourceExhausted(
                    wrong("requests", f"{len(self._open)} open", f"at most {self._max_open}; try again later")
                )
            claim = self.pairing.read(paired, len(request.prompt_ids)) if self.pairing and paired else None
            journey = self.router.submit(request, self._seeds(), self.clock.now(), claim)
            self._open[request.request_id] = Entry(output, journey, notify)
            self._desk.seat(output, journey)
            self._route()
        return output

    def offer(self, request: Request, told: Told) -> int:
        """Have a prompt computed and held for another replica; `told`, where events are delivered, what that shows.

        Raises as `submit` does. The number is for `close_offer`.
        """
        assert self.pairing is not None
        check_request(request, self.limits)
        with self._lock:
            if self._draining:
                raise Unavailable("replica: draining; try another replica")
            number = self.router.offer(request, self.clock.now())
            self._offers[number] = len(request.prompt_ids), told
            self._route()
        return number

    def close_offer(self, number: int) -> None:
        """Whoever asked waits no more; what is held goes by its lease."""
        with self._lock:
            if self._offers.pop(number, None) is not None:
                self.router.holds.close(number)
                self._route()

    def abort(self, request_id: str) -> bool:
        """End a request; False when none with this id is open."""
        with self._lock:
            entry = self._open.get(request_id)
            if entry is None:
                return False
            self.router.cancel(entry.journey)
            self._route()
        return True

    # -- what can be found by prefix ------------------------------------------------------------------------------

    def read_blocks(self, wake: Callable[[], None]) -> tuple[Reader, list[Content]]:
        """A reader of the lanes' published blocks, and those known now. `wake` is called where events are."""
        with self._lock:
            opened = self.router.read_blocks(wake)
            self._route()
        return opened

    def close_blocks(self, reader: Reader) -> None:
        """It reads no more."""
        with self._lock:
            self.router.close_blocks(reader)
            self._route()

    def forget_blocks(self) -> None:
        """Let nobody find a block that is published now."""
        with self._lock:
            self.router.forget_blocks()
            self._route()

    def taken(self, output: Output) -> None:
        """Say that `output` was read, so that paused sequences go on."""
        if output.held and output.waiting < HELD_TOKENS:
            self._hold(output, False)

    def _hold(self, output: Output, held: bool) -> None:
        output.held = held
        with self._lock:
            entry = self._open.get(output.request.request_id)
            if entry is not None:
                self.router.hold(entry.journey, held)
                self._route()

    # -- what lanes bring -----------------------------------------------------------------------------------------

    def _hear(self, sender: str, said: list[Said]) -> None:
        """What a lane says in a turn: to other lanes at once, to the front where `dispatch` chooses."""
        to_front = []
        for peer, message in said:
            if peer == FRONT:
                to_front.append(message)
            else:
                self.pass_on(peer, sender, message)  # type: ignore[arg-type]  # only the front hears the others
        if to_front:
            self.dispatch(lambda: self._take(sender, to_front))

    def _take(self, sender: str, said: list[ToFront]) -> None:
        with self._lock:
            for message in said:
                self.router.receive(sender, message)
            self.router.tick(self.clock.now())
            self._route()

    def _route(self) -> None:
        """Bring what the router has to say to the lanes, and what happened to the outputs."""
        while self.router.outbox or self.router.events:
            outbox, self.router.outbox = self.router.outbox, []
            for name, message in outbox:
                if (lane := self._here.get(name)) is not None:
                    lane.hear(FRONT, message)
                elif self.remote is not None:
                    self.router.outbox.append((name, message))
            if self.remote is not None:
                self.remote.flush()
            events, self.router.events = self.router.events, []
            self._deliver(events)
        held, self.router.holds.told = self.router.holds.told, []
        for number, answer in held:
            if (offer := self._offers.pop(number, None)) is not None:
                tokens, told = offer
                self.metrics.add("held", isinstance(answer, Claim))
                told(self._shown(answer, tokens) if isinstance(answer, Claim) else answer)

    def _shown(self, claim: Claim, tokens: int) -> str:
        """A claim with the way to its lane."""
        assert self.pairing is not None and self.remote is not None
        found = self.remote.members.reached(claim.lane)
        return self.pairing.write(claim._replace(addresses=found.addresses, tp=found.tp), tokens)

    def _deliver(self, events: list[Event]) -> None:
        now = self.clock.now()
        touched, stopped = self._desk.deliver(events, now)
        for track in stopped:
            self.router.end(track, "stop")
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
        self.generated_tokens += count - output.last_count
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
        for name in ("running", "waiting", "steps", "preemptions", "compilations_after_ready", "moved_blocks"):
            self.metrics.set(name, load[name])
        for name in ("recoveries", "handoffs_started", "handoffs_asked_again"):
            self.metrics.set(name, load[name])
        for made, count in (self.pairing.counts if self.pairing else {}).items():
            self.metrics.set("claims", count, made)
        self.metrics.set("moved_bytes", load["moved_blocks"] * self.block_bytes)
        for state, count in block_states(load).items():
            self.metrics.set("blocks", count, state)
        for state in State:
            self.metrics.set("handoffs", load[f"handoffs_{state.value}"], state.value)

    def lane_loads(self) -> list[LaneLoad]:
        """Every lane for itself, those that are being started last."""
        with self._lock:
            known = list(self.router.lanes.values())
        reports = {lane.name: lane.agent.load() for lane in self.lanes}
        loads = []
        for lane in known:
            report = reports.get(lane.name, lane.load)
            state, standing = DRAINING if lane.retired else READY, self.standing(lane.name.split(".")[0])
            now = {} if report is None else gauges(report)
            loads.append(LaneLoad(lane.name, lane.role, state, now, standing))
        return loads + self.absent([lane.name for lane in known])

    def load(self) -> dict[str, float]:
        """Gauges of this moment, summed over lanes, and totals since the start."""
        lanes = self.lane_loads()
        summed = totals(lanes) | {
            "lanes": sum(lane.state == READY for lane in lanes),
            "handoffs_started": self.router.handoffs,
            "recoveries": self.router.recoveries,
            "generated_tokens": self.generated_tokens,
            "open_requests": len(self._open),
            "compilations_after_ready": self.late_compiles(),
        }
        return {name: float(value) for name, value in summed.items()}


def _line(output: Output, outcome: str, finishes: list[Finish], now: float, revision: str) -> RequestLine:
    """What the log says of a request that has ended."""
    seated_at = now if output.seated_at is None else output.seated_at
    error = next((finish.error for finish in finishes if finish.error is not None), None)
    return RequestLine(
        output.request.request_id,
        outcome,
        finishes[0].usage.prompt_tokens,
        finishes[0].usage.cached_tokens,
        sum(finish.usage.completion_tokens for finish in finishes),
        queue_s=seated_at - output.started_at,
        first_token_s=None if output.first_at is None else output.first_at - output.started_at,
        total_s=now - output.started_at,
        revision=revision,
        code="" if error is None else error.grpc,
    )
