"""The embedded model on lanes that span 1 to 8 processes: what one process draws, they all draw, to the last bit.

Slow: every process compiles for itself, on two cores 1.5 to 3.5 minutes a case, about ten minutes in all. `-s`
prints what each took.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.served import Served

PROMPTS = ["def read(self, path):\n", "import os\nimport sys\n\n\nclass Reader:\n" * 8]
KINDS = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7}]
ASKED = [(p, kind | {"max_tokens": 24, "ignore_eos": True, "logprobs": 2}) for p in PROMPTS for kind in KINDS]

pytestmark = pytest.mark.slow


def drawn(lanes, folder):
    """Tokens and log-probabilities of every answer; what was moved; whether nothing is left in a pool."""
    began = time.monotonic()
    served = Served(lanes, 1, folder / "log")
    try:
        ready, processes = time.monotonic() - began, len(served.workers())
        with ThreadPoolExecutor() as pool:  # all at once, so that a prefill lane is asked too
            answers = list(pool.map(lambda it: served.client.generate(it[0], **it[1]), ASKED))
        took = time.monotonic() - began - ready
        served.wait(served.restored, 5.0)
        load = served.client.load()
    finally:
        code = served.close()
    print(f"\n{lanes}: {processes} processes ready after {ready:.0f} s, answered in {took:.1f} s more")
    assert code == 0 and load["compilations_after_ready"] == 0
    return [said(answer.choices[0]) for answer in answers], load


def said(choice):
    """Tokens, and what the server said of each: its log-probability and the two best, bit for bit."""
    scores = [score.SerializeToString(deterministic=True) for score in choice.logprobs]
    assert len(choice.token_ids) == len(scores) == 24
    return list(choice.token_ids), scores


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Of eight devices in one process."""
    return drawn("both:tp=8", tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_eight_devices_draw_the_same_in_however_many_processes(processes, wanted, tmp_path):
    """Costs two minutes with 2 processes, three and a half with 8."""
    assert drawn(f"both:tp=8/{processes}", tmp_path)[0] == wanted


def test_kv_goes_from_two_processes_to_two_others_of_another_mesh(wanted, tmp_path):
    """Costs two minutes."""
    found, load = drawn("prefill:tp=4/2, decode:tp=8/2", tmp_path)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert found == wanted
    assert load["handoffs_started"] > 0 and load["moved_blocks"] > 0
