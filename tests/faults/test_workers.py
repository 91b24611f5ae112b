"""The embedded model on lanes in processes of their own, through the command line: its tokens, and its losses.

The prefill lane spans two processes. Costs a minute and a half on two free cores, most of it compiling; with
-m slow more: lanes of two rows, other losses, each until the lane is back. `-s` prints the times it took.
"""

import io
import os
import signal
import time
from pathlib import Path

import pytest

from engine import replay_report
from engine.config import Settings
from engine.core.plan import StepPlan
from engine.observe.plan_log import PlanLog
from tests.faults.served import Asked, Served, alone

LANES = "prefill:tp=2/2, decode:tp=2"
LOST = [("p0", signal.SIGKILL, 3.0), ("p0/1", signal.SIGKILL, 3.0), ("p0/1", signal.SIGSTOP, 6.0)]
PROMPTS = ["def read(self, path):\n", "import os\nimport sys\n\n\nclass Reader:\n" * 3, "for line in lines:\n    "]
KINDS = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7}]
BACK_S = 180.0  # where other programs compute too
ASKED = [(prompt, kind | {"max_tokens": 90, "ignore_eos": True}) for prompt in PROMPTS for kind in KINDS]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def rows(request):
    return request.param


@pytest.fixture(scope="module")
def served(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    served = Served(LANES, rows, folder / "log", f"--plan-log={folder / 'plans'}")
    yield served
    workers = served.workers()
    assert served.close() == 0
    assert not [pid for pid in workers.values() if os.path.exists(f"/proc/{pid}")], "a worker outlived its front"
    check_logs(folder / "plans")


def check_logs(folder):
    """What each worker did is there, a file a process; a prefill lane's can be run again, token for token."""
    logs = {path.name: PlanLog(path) for path in sorted(folder.iterdir())}
    assert {"lane-p0-0001.plans", "lane-d1-0001.plans"} <= set(logs)
    assert all(any(isinstance(record, StepPlan) for record in log.records()) for log in logs.values())
    out = io.StringIO()
    assert replay_report.run(logs["lane-p0-0001.plans"], Settings(numerics="invariant"), out) == 0, out.getvalue()


@pytest.fixture(scope="module")
def wanted(rows, served):
    return alone(rows, ASKED)


def ask(served):
    return [Asked(served, prompt, **options) for prompt, options in ASKED]


def lose(served, worker, answers, wanted, how=signal.SIGKILL, notice_s=3.0):
    """Kill or stop a worker while `answers` run: they go on, token for token, and its lane comes back."""
    slot, workers = worker.split("/")[0], served.workers()
    name, recoveries = served.lane(slot).name, served.client.load()["recoveries"]
    killed = served.kill(worker, how)
    noticed = served.wait(lambda: served.lane(slot).name != name, notice_s)
    assert served.lane(slot).state == "starting" and served.client.load()["lanes"] == 1
    assert [answer.result() for answer in answers] == wanted
    assert served.client.load()["recoveries"] > recoveries
    after = [at for answer in answers for at in answer.times if at > noticed]
    freed = served.wait(served.restored, 5.0)
    back = served.wait(lambda: served.client.load()["lanes"] == 2, BACK_S)
    assert served.lane(slot).name not in (slot, name) and served.lane(slot).state == "ready"
    changed = {each for each, pid in served.workers().items() if workers[each] != pid}
    assert changed == {each for each in workers if each.split("/")[0] == slot}, "all processes of a lane"
    assert not [each for each in changed if os.path.exists(f"/proc/{workers[each]}")]
    times = {"noticed": noticed, "resumed": min(after), "answered": max(after), "freed": freed, "back": back}
    said = ", ".join(f"{what} after {at - killed:.2f} s" for what, at in times.items())
    print(f"\n{worker} lost by {how.name}: {said}")
    return noticed - killed


def test_prompts_of_a_prefill_lane_are_decoded_as_one_device_decodes_them(served, wanted):
    assert [answer.result() for answer in ask(served)] == wanted
    load = served.client.load()
    assert load["handoffs_started"] > 0 and load["moved_blocks"] > 0 and load["lanes"] == 2
    assert load["compilations_after_ready"] == 0
    served.wait(served.restored, 5.0)
    if hasattr(os, "memfd_create"):
        assert all(map(shares_memory, served.workers().values())), "KV went through sockets"


def shares_memory(pid):
    """Whether the process has the segment that KV lies in on its way, as its own or as the other's."""
    mapped = Path(f"/proc/{pid}/maps").read_text()
    return "memfd:serac-kv" in mapped


def test_streams_outlive_the_worker_that_decodes_them(served, wanted):
    answers = ask(served)
    served.wait(lambda: any(len(answer.tokens) > 5 for answer in answers), 20.0)
    assert lose(served, "d1", answers, wanted) < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("worker, how, notice_s", LOST, ids=["leader", "follower", "a follower that is stopped"])
def test_prompts_outlive_any_worker_that_prefills_them(served, wanted, worker, how, notice_s):
    """Costs half a minute each, and more where others compute, until both processes have compiled again."""
    answers = ask(served)
    served.wait(lambda: served.client.load()["open_requests"] > 1, 20.0)
    lose(served, worker, answers, wanted, how, notice_s)


def test_a_drain_lets_streams_end_and_leaves_no_process(served, wanted):
    """Last: the server that the others share ends here."""
    answers = ask(served)
    served.wait(lambda: any(answer.tokens for answer in answers), 20.0)
    workers = served.workers()
    began = time.monotonic()
    served.front.terminate()
    assert [answer.result() for answer in answers] == wanted
    assert served.front.wait(30) == 0
    assert not [pid for pid in workers.values() if os.path.exists(f"/proc/{pid}")]
    print(f"\ndrained after {time.monotonic() - began:.2f} s")
