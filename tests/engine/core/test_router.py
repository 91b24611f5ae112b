"""The router by itself: what it says to lanes and to clients in the scenes that its docstring draws."""

import numpy as np
import pytest

from engine.core import messages, whereabouts
from engine.core.events import Emission
from engine.core.journeys import Drawn, Ended, Scored, Started
from engine.core.messages import Cancel, Committed, Expect, Failed, Fence, Hold, Load, Over, Prefill, Submit
from engine.core.request import Request, Sampling, Stopping
from engine.core.router import MOST_LOSSES, Router
from engine.errors import DeadlineExceeded, DeviceError, Unavailable

BLOCK, CONTEXT, EOS = 4, 256, 7
LONG = tuple(range(100, 140))  # ten blocks
SHORT = tuple(range(100, 106))


class Front:
    """A router with lanes of given roles; the test plays the lanes."""

    def __init__(self, **lanes):
        self.router = Router(BLOCK, CONTEXT, (EOS,))
        for name, role in lanes.items():
            self.router.lane_up(name, role)

    def ask(self, ids=LONG, deadline_at=None, seed=3, salt=b"", **options):
        stopping = Stopping(**{k: options.pop(k) for k in list(options) if k in Stopping.__dataclass_fields__})
        request = Request("r", tuple(ids), Sampling(**options), stopping, deadline_at, salt)
        return self.router.submit(request, seed, 0.0)

    def said(self, kind=None):
        """(lane, message) since the last call, of one kind if given."""
        self.router.check()
        said, self.router.outbox = self.router.outbox, []
        return [(lane, message) for lane, message in said if kind is None or isinstance(message, kind)]

    def told(self, kind):
        told, self.router.events = self.router.events, []
        return [event for event in told if isinstance(event, kind)]

    def draw(self, lane, track, *tokens, serial=None, position=None):
        """`lane` has drawn these tokens of a choice, one a step."""
        for token in tokens:
            at = len(track.journey.request.prompt_ids) + len(track.tokens) if position is None else position
            arrays = [np.array([x]) for x in (track.serial if serial is None else serial, token, at)]
            self.router.receive(lane, Emission(*arrays))

    def report(self, lane, waiting=0, queued_tokens=0, available=100):
        values = dict.fromkeys(Load._fields, 0) | {"waiting": waiting, "queued_tokens": queued_tokens}
        self.router.receive(lane, Load(**values | {"available": available, "handoffs": ()}))

    def hand_off(self, **options):
        """A request whose prompt goes from p to d: (journey, its Expect, its Prefill)."""
        journey = self.ask(**options)
        (_, expect), (_, prefill) = self.said()
        return journey, expect, prefill


def pools():
    return Front(p="prefill", d="decode")


# -- placing ------------------------------------------------------------------------------------------------------


def test_without_a_lane_a_request_is_refused_and_not_remembered():
    front = Front()
    with pytest.raises(Unavailable, match="no lane is ready"):
        front.ask()
    assert not front.router.journeys


def test_a_long_prompt_goes_from_the_prefill_lane_to_the_decode_lane():
    front = pools()
    journey = front.ask(salt=b"x", deadline_at=9.0, temperature=0.5, n=2)
    (target, expect), (source, prefill) = front.said()
    assert (target, source) == ("d", "p") and isinstance(expect, Expect) and isinstance(prefill, Prefill)
    assert expect.handoff == prefill.handoff > 0 and (expect.source, prefill.target) == ("p", "d")
    assert expect.submit.request is journey.request and expect.submit.seed == 3
    assert [part.choice for part in expect.submit.parts] == [0, 1]
    computed = prefill.request
    assert computed.prompt_ids == LONG and (computed.salt, computed.deadline_at) == (b"x", 9.0)
    assert computed.sampling.n == 1 and front.router.handoffs == 1


def test_a_short_prompt_skips_the_prefill_lane():
    front = pools()
    front.ask(SHORT)
    assert [(lane, type(message)) for lane, message in front.said()] == [("d", Submit)]


def test_a_prompt_that_the_decode_lane_has_cached_skips_the_prefill_lane():
    front = pools()
    _, expect, _ = front.hand_off()
    front.ask([*LONG, 1, 2, 3])
    assert [type(message) for _, message in front.said()] == [Expect, Prefill], "it has not come yet"
    front.router.receive("d", Committed(expect.handoff))
    front.ask([*LONG, 1, 2, 3])
    assert [(lane, type(message)) for lane, message in front.said()] == [("d", Submit)]
    front.ask([*LONG, 1, 2, 3], salt=b"other")
    assert [type(message) for _, message in front.said()] == [Expect, Prefill]


def test_a_prompt_whose_tokens_are_scored_is_served_whole_by_one_lane():
    front = pools()
    front.ask(prompt_logprobs=1)
    assert [(lane, type(message)) for lane, message in front.said()] == [("d", Submit)]


@pytest.mark.parametrize("roles", [("prefill",), ("prefill", "prefill"), ("decode",), ("both", "both")])
def test_without_a_lane_of_the_right_role_any_other_serves(roles):
    front = Front(**{f"l{k}": role for k, role in enumerate(roles)})
    front.ask()
    assert [type(message) for _, message in front.said()] == [Submit], "and it serves alone"


def test_a_request_goes_to_the_lane_with_the_shorter_queue():
    front = Front(a="both", b="both")
    front.report("a", queued_tokens=5000)
    front.ask()
    assert front.said()[0][0] == "b"
    front.report("b", waiting=20)
    front.ask(range(50, 90))
    assert front.said()[0][0] == "a"
    front.report("a", available=3)
    front.report("b")
    front.ask(range(150, 190))
    assert front.said()[0][0] == "b", "a pool that is full makes it wait"


def test_requests_that_no_report_counts_yet_spread():
    front = Front(a="both", b="both")
    for k in range(4):
        front.ask(range(k * 40, k * 40 + 40))
    assert sorted(lane for lane, _ in front.said()) == ["a", "a", "b", "b"]


def test_a_request_goes_where_its_prefix_is_cached_until_the_queue_there_is_longer():
    front = Front(a="both", b="both")
    front.report("a", queued_tokens=1)
    front.ask()
    front.said()
    front.report("b", queued_tokens=20)
    front.report("a")
    front.ask([*LONG, 1])
    assert front.said()[0][0] == "b", "its prompt is there"
    front.report("b", queued_tokens=5000)
    front.ask([*LONG, 2])
    assert front.said()[0][0] == "a"


def test_blocks_that_a_lane_is_remembered_for_are_bounded(monkeypatch):
    monkeypatch.setattr(whereabouts, "REMEMBERED", 16)
    front = Front(a="both", b="both")
    for k in range(10):
        front.ask(range(k * 40, k * 40 + 40))
    assert len(front.router._where._where) == 16


def test_a_lane_is_placed_on_by_its_new_role_and_what_it_serves_stays():
    front = Front(p="prefill", d="decode", b="decode")
    front.router.set_role("b", "prefill")
    front.router.set_role("p", "decode")
    front.router.set_role("nobody", "decode")
    journey = front.ask()
    assert {lane: type(message) for lane, message in front.said()}["b"] is Prefill
    front.router.set_role("b", "decode")
    assert not front.said() and not front.told(Ended) and journey in front.router.journeys


# -- what lanes say -----------------------------------------------------------------------------------------------


def test_tokens_are_taken_only_at_the_position_that_comes_next():
    front = Front(a="both")
    track = front.ask().tracks[0]
    front.draw("a", track, 11, 12)
    front.draw("a", track, 12, position=41)  # again
    assert track.tokens == [11, 12] and [len(drawn.entries) for drawn in front.told(Drawn)] == [1, 1]
    old = track.serial
    front.said()
    front.draw("a", track, 14, position=43)  # one is missing
    assert front.router.gaps == 1 and track.tokens == [11, 12] and track.serial != old
    ((_, cancel), (_, submit)) = front.said()
    assert isinstance(cancel, Cancel) and cancel.serials == (old,)
    assert submit.parts == ((track.serial, 0, (11, 12)),)


def test_what_an_attempt_that_was_given_up_still_says_is_not_taken():
    front = Front(a="both", b="both")
    track = front.ask().tracks[0]
    (lane, _), old = front.said()[0], track.serial
    front.router.lane_lost(lane)
    front.draw(lane, track, 11, serial=old)
    front.router.receive(lane, Over(old, "length", None, None))
    front.router.receive(lane, Committed(old))
    front.router.receive(lane, Failed(old, "late"))
    assert not track.tokens and not front.told(Ended)


def test_a_choice_starts_once_though_two_lanes_say_so():
    front = pools()
    journey, expect, prefill = front.hand_off()
    front.router.receive("p", messages.Started(prefill.handoff, 8))
    front.router.receive("d", messages.Started(journey.tracks[0].serial, 0))
    front.router.receive("d", messages.Started(99, 0))
    assert front.told(Started) == [Started(journey.tracks[0], 8)]


def scores(serial, first, count):
    return messages.Scored(serial, first, *(np.zeros((count, *shape)) for shape in ((), (), (20,), (20,))))


def test_a_score_is_reported_once_over_two_attempts():
    front = Front(a="both", b="both")
    track = front.ask(prompt_logprobs=1).tracks[0]
    lane = front.said()[0][0]
    front.router.receive(lane, scores(track.serial, 1, 10))
    front.router.lane_lost(lane)
    (other,) = front.router.lanes
    front.router.receive(other, scores(track.serial, 1, 6))
    front.router.receive(other, scores(track.serial, 7, 8))
    told = [(event.scores.first, len(event.scores.logprob)) for event in front.told(Scored)]
    assert told == [(1, 10), (11, 4)] and track.scored == 14
    front.router.receive(other, scores(track.serial, 17, 2))
    assert front.router.gaps == 1 and not front.told(Scored), "two are missing: the attempt is given up"


# -- a lane that is lost, in each phase of a handoff --------------------------------------------------------------


@pytest.mark.parametrize("lost", ["p", "d"])
@pytest.mark.parametrize("committed", [False, True])
def test_a_lane_lost_in_any_phase_costs_an_attempt_only(lost, committed):
    front = Front(p="prefill", d="decode", q="prefill", e="decode")
    journey = front.ask()
    (target, expect), (source, _) = front.said()
    track, before = journey.tracks[0], journey.tracks[0].serial
    if committed:
        front.router.receive(target, Committed(expect.handoff))
        front.draw(target, track, 11, 12)
    name = {"p": source, "d": target}[lost]
    front.router.lane_lost(name)
    said = front.said()
    assert {lane for lane, message in said if isinstance(message, Fence)} == set("pdqe") - {name}
    if committed and lost == "p":
        assert track.serial == before and front.router.recoveries == 0, "it is needed no more"
        return
    other = {"p": target, "d": source}[lost]
    stopped = [m for lane, m in said if lane == other and isinstance(m, Cancel)]
    assert front.router.recoveries == 1 and track.serial != before
    assert [m.handoff for m in stopped] == [0 if committed else expect.handoff]
    again = [m for _, m in said if isinstance(m, Expect)]
    assert again and again[0].submit.parts == ((track.serial, 0, tuple(track.tokens)),)
    prompt = [m.request.prompt_ids for _, m in said if isinstance(m, Prefill)]
    assert prompt == [(*LONG, *track.tokens)]


def test_choices_go_on_alone_after_a_loss():
    front = Front(a="both", b="both")
    journey = front.ask(n=3, max_tokens=9)
    ((lane, submit),) = front.said(Submit)
    assert len(submit.parts) == 3
    one, two, three = journey.tracks
    front.draw(lane, one, 11), front.draw(lane, two, 21, 22)
    front.router.receive(lane, Over(three.serial, "length", None, None))
    front.router.lane_lost(lane)
    parts = [message.parts for _, message in front.said(Submit)]
    assert parts == [((one.serial, 0, (11,)),), ((two.serial, 1, (21, 22)),)]
    assert [event.track for event in front.told(Ended)] == [three]


def test_without_a_lane_requests_are_parked_for_the_next():
    front = Front(a="both")
    kept, cancelled = front.ask(), front.ask(SHORT)
    front.said()
    front.router.lane_lost("a")
    front.router.cancel(cancelled)
    assert not front.said(Submit)
    front.router.lane_up("b", "decode")
    assert [(lane, message.parts[0].serial) for lane, message in front.said()] == [("b", kept.tracks[0].serial)]


def test_nothing_new_is_placed_on_a_retired_lane_and_what_it_serves_goes_on():
    front = Front(a="both", b="both")
    track = front.ask().tracks[0]
    ((lane, _),) = front.said()
    other = {"a": "b", "b": "a"}[lane]
    front.router.retire(lane)
    for _ in range(4):
        front.ask()
    assert [name for name, _ in front.said(Submit)] == [other] * 4
    front.draw(lane, track, 11)
    assert [event.entries[0][1] for event in front.told(Drawn)] == [track]
    assert front.router.serves(lane) == 1 and front.router.serves(other) == 4
    front.router.receive(lane, Over(track.serial, "length", None, None))
    assert front.router.serves(lane) == front.router.serves("gone") == 0


@pytest.mark.parametrize(("retired", "serves"), [("p", "d"), ("d", "p")])
def test_a_lane_of_another_role_serves_while_one_is_retired(retired, serves):
    front = pools()
    front.router.retire(retired)
    front.ask()
    assert [(lane, type(message)) for lane, message in front.said()] == [(serves, Submit)]


@pytest.mark.parametrize("retired", ["p", "d"])
def test_a_handoff_from_or_to_a_retired_lane_goes_on(retired):
    front = pools()
    journey, expect, _ = front.hand_off()
    front.router.retire(retired)
    front.router.receive("d", Committed(expect.handoff))
    front.draw("d", journey.tracks[0], 11)
    assert front.told(Drawn) and not front.said() and front.router.recoveries == 0
    assert front.router.serves(retired) == {"p": 0, "d": 1}[retired]


def test_requests_for_the_only_lane_wait_until_its_next_life_unless_nobody_waits_for_that():
    front = Front(a="both")
    front.router.max_wait_s = 30.0
    front.router.retire("a")
    first = front.ask()
    front.router.lane_lost("a")
    second = front.ask(SHORT)
    assert not front.said() and front.router.ready
    front.router.lane_up("b", "both")
    front.router.returned("a")
    serials = [message.parts[0].serial for _, message in front.said(Submit)]
    assert serials == [first.tracks[0].serial, second.tracks[0].serial]
    front.router.retire("b"), front.router.lane_lost("b"), front.router.returned("b")
    assert not front.router.ready
    with pytest.raises(Unavailable, match="no lane is ready"):
        front.ask()


def test_who_waits_for_a_lane_waits_no_longer_than_it_may_but_a_stream_that_began_does():
    front = Front(a="both")
    front.router.max_wait_s = 30.0
    begun = front.ask(max_tokens=9).tracks[0]
    front.draw("a", begun, 11)
    front.router.retire("a")
    new, late = front.ask().tracks[0], front.ask(deadline_at=5.0).tracks[0]
    front.router.lane_lost("a")
    front.told(Drawn), front.said(), front.router.tick(5.0)
    assert [(event.track, event.reason) for event in front.told(Ended)] == [(late, "deadline")]
    front.router.tick(30.0)
    assert not front.told(Ended)
    front.router.tick(30.1)
    (ended,) = front.told(Ended)
    assert ended.track is new and isinstance(ended.error, Unavailable)
    assert "max_wait: no lane was ready within 30 s" in str(ended.error)
    front.router.lane_up("b", "both")
    assert [message.parts for _, message in front.said(Submit)] == [((begun.serial, 0, (11,)),)]


def test_a_stream_outlives_more_restarts_than_it_may_have_losses():
    front = Front(a0="both")
    track = front.ask(max_tokens=99).tracks[0]
    for k in range(MOST_LOSSES + 2):
        front.draw(f"a{k}", track, 11)
        front.router.retire(f"a{k}"), front.router.lane_lost(f"a{k}")
        front.router.lane_up(f"a{k + 1}", "both"), front.router.returned(f"a{k}")
    assert not track.over and len(track.tokens) == MOST_LOSSES + 2 and track.losses == 0
    assert front.router.recoveries == MOST_LOSSES + 2


def test_no_prompt_is_held_for_another_replica_on_a_retired_lane():
    front = Front(a="both", b="both")
    request = Request("r", LONG, Sampling(), Stopping())
    front.router.offer(request, 0.0)
    ((lane, _),) = front.said(Prefill)
    front.router.retire(lane)
    assert front.router.serves(lane) == 1
    for _ in range(3):
        front.router.offer(request, 0.0)
    assert {name for name, _ in front.said(Prefill)} == {"a", "b"} - {lane}


def test_a_deadline_ends_a_request_that_is_parked_or_served():
    front = Front(a="both")
    parked = front.ask(deadline_at=5.0)
    front.router.lane_lost("a")
    front.router.tick(4.9)
    assert not front.told(Ended)
    front.router.tick(5.0)
    (ended,) = front.told(Ended)
    assert ended.track is parked.tracks[0] and ended.reason == "deadline"
    assert isinstance(ended.error, DeadlineExceeded) and not front.router.journeys
    front = pools()
    _, expect, _ = front.hand_off(deadline_at=5.0)
    front.router.tick(6.0)
    assert {lane: m.handoff for lane, m in front.said(Cancel)} == {"d": expect.handoff, "p": expect.handoff}


def test_a_request_whose_attempts_all_fail_counts_as_the_cause():
    front = pools()
    journey = front.ask()
    for _ in range(MOST_LOSSES):
        front.router.receive("d", Failed(max(front.router._legs), "no room for its blocks"))
        assert not front.told(Ended)
    front.router.receive("d", Failed(max(front.router._legs), "no room for its blocks"))
    (ended,) = front.told(Ended)
    assert isinstance(ended.error, Unavailable) and "no room for its blocks" in str(ended.error)
    assert journey not in front.router.journeys and not front.router._legs


def test_many_choices_do_not_use_up_each_others_attempts():
    front = Front(a="both", b="both", c="both")
    front.ask(n=3 * MOST_LOSSES)
    for _ in range(2):
        front.router.lane_lost(front.said(Submit)[-1][0])
    assert not front.told(Ended) and len(front.router._tracks) == 3 * MOST_LOSSES


def test_a_handoff_that_no_other_lane_can_serve_ends_its_choices():
    front = pools()
    journey, expect, _ = front.hand_off(n=2)
    error = DeviceError("its lone step failed again")
    front.router.receive("p", Failed(expect.handoff, "error", error))
    ended = front.told(Ended)
    assert [(event.reason, event.error) for event in ended] == [("error", error)] * 2
    assert not front.router.journeys and not front.router._legs and journey.tracks[1].over


@pytest.mark.parametrize(
    ("options", "drawn", "reason", "stop"),
    [
        ({"max_tokens": 2}, (11, 12), "length", None),
        ({}, (11, EOS), "stop", EOS),
        ({"stop_token_ids": (12,)}, (11, 12), "stop", 12),
        ({"ignore_eos": True, "max_tokens": 2}, (11, EOS), "length", None),
    ],
)
def test_a_finished_choice_whose_terminal_was_lost_is_ended_and_not_served_again(options, drawn, reason, stop):
    front = Front(a="both", b="both")
    track = front.ask(**options).tracks[0]
    lane = front.said()[0][0]
    front.draw(lane, track, *drawn)
    front.router.lane_lost(lane)
    assert [(event.reason, event.stop, event.error) for event in front.told(Ended)] == [(reason, stop, None)]
    assert not front.said(Submit) and not front.router.journeys


def test_eos_that_is_ignored_and_a_context_that_is_full():
    front = Front(a="both", b="both")
    track = front.ask(ignore_eos=True).tracks[0]
    lane = front.said()[0][0]
    front.draw(lane, track, EOS)
    front.router.lane_lost(lane)
    assert front.said(Submit) and not front.told(Ended)
    front.draw("b" if lane == "a" else "a", track, *[9] * (CONTEXT - len(LONG) - 1))
    front.router.lane_up("c", "both")
    front.router.lane_lost("b" if lane == "a" else "a")
    assert [event.reason for event in front.told(Ended)] == ["length"]


# -- what clients ask ---------------------------------------------------------------------------------------------


def test_a_cancel_ends_each_choice_once_and_the_handoff_with_the_last():
    front = pools()
    journey, expect, _ = front.hand_off(n=2)
    one, two = journey.tracks
    serials = one.serial, two.serial
    front.router.end(one, "abort")
    assert front.said() == [("d", Cancel((serials[0],), 0, "abort"))]
    front.router.cancel(journey)
    front.router.cancel(journey)
    cancel = Cancel((serials[1],), expect.handoff, "abort")
    assert front.said() == [("d", cancel), ("p", Cancel((), expect.handoff, "abort"))]
    assert [event.track for event in front.told(Ended)] == [one, two] and not front.router._legs
    front.router.receive("d", Committed(expect.handoff))
    front.draw("d", two, 11, serial=serials[1])
    assert not front.told(Drawn)


def test_a_hold_is_kept_over_a_recovery():
    front = Front(a="both", b="both")
    journey = front.ask()
    track = journey.tracks[0]
    lane = front.said()[0][0]
    front.router.hold(journey, True)
    assert front.said() == [(lane, Hold((track.serial,), True))]
    front.router.lane_lost(lane)
    assert [message for _, message in front.said(Hold)] == [Hold((track.serial,), True)]
    front.router.hold(journey, False)
    assert [message for _, message in front.said(Hold)] == [Hold((track.serial,), False)]
    front.router.lane_lost(next(iter(front.router.lanes)))
    front.router.lane_up("c", "both")
    assert front.said(Submit) and not front.said(Hold)


def test_a_hold_during_a_handoff_is_said_again_when_the_choices_begin():
    front = pools()
    journey, expect, _ = front.hand_off()
    front.router.hold(journey, True)
    front.said()
    front.router.receive("d", Committed(expect.handoff))
    assert front.said() == [("d", Hold((journey.tracks[0].serial,), True))]
