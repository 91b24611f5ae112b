import logging
import threading

import pytest

from engine.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from engine.replica.replica import HELD_TOKENS


def test_text_is_the_decoding_of_the_tokens_and_usage_counts_them(life):
    output = life.submit(max_tokens=40)
    life.run()
    shown, ids, finish = life.whole("a")
    assert ids == life.alone(output, 40)
    assert shown == life.text.decode(ids) and finish.reason == "length"
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (len(output.request.prompt_ids), 40)
    assert output.done and life.restored and life.metrics.value("requests", "length") == 1


def test_the_log_has_one_line_a_request_with_its_times(life, caplog, monkeypatch):
    caplog.set_level("INFO", "serac.replica")
    monkeypatch.setattr(logging.getLogger("serac"), "propagate", True)
    life.submit(max_tokens=6)
    life.submit("b", max_tokens=6, deadline_at=1.5)
    for _ in range(4):
        life.clock.advance(0.5)
        life.turn()
    life.run()
    lines = {record.request_id: record for record in caplog.records if record.getMessage() == "request"}
    assert sorted(lines) == ["a", "b"] and len(caplog.records) == 2
    line = lines["a"]
    assert (line.outcome, line.prompt_tokens, line.completion_tokens) == ("length", 3, 6)
    assert (line.queue_s, line.first_token_s, line.total_s, line.revision) == (0.5, 1.5, 2.0, "r1")
    assert (lines["b"].outcome, lines["b"].code, hasattr(line, "prompt")) == (
        "deadline",
        "DEADLINE_EXCEEDED",
        False,
    )


def test_a_request_without_a_seed_gets_a_recorded_one(life):
    life.submit(max_tokens=2)
    (journey,) = life.replica.router.journeys
    assert journey.request.sampling.seed is None and journey.seed == 11


def test_a_stop_string_ends_the_text_before_it_and_drops_what_follows(life):
    life.submit("whole", max_tokens=40, seed=1)
    life.run()
    shown, ids, _ = life.whole("whole")
    cut = shown[len(shown) // 2 :][:3]
    life.submit("cut", max_tokens=40, seed=1, stop=(cut,))
    life.submit("kept", max_tokens=40, seed=1, stop=(cut,), include_stop=True)
    life.run()
    text, fewer, finish = life.whole("cut")
    assert text == shown[: shown.index(cut)] and (finish.reason, finish.stop) == ("stop", cut)
    assert fewer == ids[: len(fewer)] and len(fewer) < 40 and finish.usage.completion_tokens == len(fewer)
    assert life.whole("kept")[0] == text + cut and life.restored


def test_min_tokens_lets_a_stop_string_pass(life):
    life.submit("whole", max_tokens=40, seed=1)
    life.run()
    first = life.whole("whole")[0][:2]
    life.submit("late", max_tokens=40, seed=1, stop=(first,), min_tokens=30)
    life.run()
    assert len(life.whole("late")[1]) >= 30


def test_the_text_of_a_stop_token_is_not_shown_unless_asked_for(life):
    life.submit("whole", max_tokens=20, seed=1)
    life.run()
    _, ids, _ = life.whole("whole")
    life.submit("cut", max_tokens=20, seed=1, stop_token_ids=(ids[5],))
    life.submit("kept", max_tokens=20, seed=1, stop_token_ids=(ids[5],), include_stop=True)
    life.run()
    end = ids.index(ids[5])
    assert life.whole("cut")[1] == ids[: end + 1] and life.whole("cut")[2].stop == ids[5]
    assert life.whole("cut")[0] == life.text.decode(ids[:end])
    assert life.whole("kept")[0] == life.text.decode(ids[: end + 1])


def test_each_choice_has_its_own_text_and_one_terminal(life):
    life.submit(n=3, max_tokens=10, seed=4, prompt="x = [" * 8)
    life.run()
    assert len({life.whole("a", k)[0] for k in range(3)}) == 3
    assert [life.whole("a", k)[2].reason for k in range(3)] == ["length"] * 3
    assert life.whole("a", 1)[2].usage.cached_tokens > 0


def test_logprobs_come_with_their_tokens_and_only_when_asked_for(life):
    life.submit("with", max_tokens=5, logprobs=2)
    life.submit("without", max_tokens=5)
    life.run()
    scores = [score for delta in life.deltas["with"] for score in delta.logprobs]
    assert [score.token_id for score in scores] == life.whole("with")[1] and len(scores[0].top) == 2
    assert all(delta.logprobs is None for delta in life.deltas["without"])


def test_prompt_logprobs_come_once_with_the_first_delta(life):
    output = life.submit(prompt="x = 1\n" * 40, max_tokens=3, prompt_logprobs=1)
    life.run()
    scored = [delta.prompt_logprobs for delta in life.deltas["a"] if delta.prompt_logprobs]
    assert len(scored) == 1 and scored[0][0] is None
    assert [score.token_id for score in scored[0][1:]] == list(output.request.prompt_ids[1:])


def test_an_abort_is_answered_once_and_frees_the_blocks(life):
    life.submit(max_tokens=400)
    life.turn(6)
    assert life.replica.abort("a") and life.run().whole("a")[2].reason == "abort"
    assert life.restored and not life.replica.abort("a") and not life.replica.abort("never")
    assert life.metrics.value("cancelled") == 1


def test_an_abort_before_the_lane_knows_the_request_works(life):
    life.submit(max_tokens=400)
    life.replica.abort("a")
    assert life.run().whole("a")[2].reason == "abort" and life.whole("a")[1] == []


def test_a_deadline_ends_a_request_with_its_error(life):
    life.submit(max_tokens=400, deadline_at=5.0)
    life.turn(6)
    life.clock.advance(5.0)
    finish = life.run().whole("a")[2]
    assert finish.reason == "deadline" and isinstance(finish.error, DeadlineExceeded) and life.restored


def test_a_client_that_does_not_read_pauses_its_sequence_until_it_does(life):
    output = life.submit(reads=False, max_tokens=450)
    life.turn(800)
    waiting = output.waiting
    assert HELD_TOKENS <= waiting < HELD_TOKENS + 4 and not output.ended
    life.read(output)
    life.turn(800)
    life.read(output)
    life.run()
    life.read(output)
    assert len(life.whole("a")[1]) == 450 and life.restored


def test_the_same_id_twice_is_refused_while_it_runs_and_not_after(life):
    life.submit(max_tokens=3)
    with pytest.raises(AlreadyExists, match="request_id"):
        life.submit(max_tokens=3)
    life.run()
    life.submit(max_tokens=3)
    assert life.run().whole("a")[2].reason == "length"


def test_too_many_open_requests_are_refused_with_a_hint_to_come_back(make_life):
    life = make_life(max_open=2)
    life.submit("a", max_tokens=3), life.submit("b", max_tokens=3)
    with pytest.raises(ResourceExhausted, match="2 open") as refused:
        life.submit("c", max_tokens=3)
    assert refused.value.retry_after_s is not None


def test_what_cannot_be_served_is_refused_before_anything_is_queued(life):
    with pytest.raises(InvalidArgument, match="max_tokens: got 600; expected an integer"):
        life.submit(max_tokens=600)
    assert life.replica.load()["open_requests"] == 0


def test_requests_spread_over_lanes(make_life):
    life = make_life(roles=("both", "both"))
    for k in range(6):
        life.submit(f"{k}", max_tokens=5)
    life.turn()
    assert [len(lane.agent.scheduler.live) for lane in life.replica.lanes] == [3, 3]
    life.run()
    assert all(life.whole(f"{k}")[2].reason == "length" for k in range(6))


def test_a_draining_replica_refuses_new_requests_and_finishes_open_ones(life):
    life.submit(max_tokens=100)
    life.replica.start()
    whole = []
    drained = threading.Thread(target=lambda: whole.append(life.replica.drain(20.0)))
    drained.start()
    drained.join(20.0)
    assert whole == [True] and life.whole("a")[2].reason == "length"
    with pytest.raises(Unavailable, match="draining"):
        life.submit("b")


def test_a_failing_device_is_invisible_to_clients(life):
    life.devices[0].fail_collect |= {2, 9}
    output = life.submit(max_tokens=40)
    ids = life.run().whole("a")[1]
    assert ids == life.alone(output, 40)
    assert not life.devices[0].fail_collect


def test_metrics_say_what_the_replica_did(life):
    life.submit("a", max_tokens=20), life.submit("b", max_tokens=20)
    life.turn(4)
    assert b"serac_running 2.0" in life.metrics.exposition()
    life.run()
    lines = life.metrics.exposition().decode()
    assert 'serac_tokens_total{kind="generated"} 40.0' in lines and "serac_running 0.0" in lines
    assert "serac_inter_token_latency_seconds_count 38.0" in lines
    assert (
        "serac_time_to_first_token_seconds_count 2.0" in lines
        and "serac_compilations_after_ready_total 0.0" in lines
    )
