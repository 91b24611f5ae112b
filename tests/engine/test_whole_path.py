"""The whole path: gRPC client -> server -> replica -> a model sharded over a mesh of devices, and back."""

import asyncio
import contextlib
import threading
import time

import pytest

from engine.clock import SystemClock
from engine.config import Settings
from engine.errors import DeadlineExceeded, InvalidArgument
from engine.replica import build
from engine.replica.streams import Streams
from engine.serve.client import Client
from engine.serve.server import Listen, Server

SETTINGS = Settings(
    model="embedded", mesh="tp=2", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, max_wait=600.0
)
PROMPT = "def read(self, path):\n"


class Site:
    """A server on an event loop of its own thread."""

    def __init__(self):
        self.replica = build.replica(SETTINGS)
        self.replica.start()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(60)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.server = Server(self.replica, Streams(self.replica), Listen(port=0, admin_port=0), SystemClock())
        self.public, self.admin = await self.server.start()
        self._up.set()
        await self.server.drained.wait()
        await self.server.stop()

    def close(self):
        asyncio.run_coroutine_threadsafe(self.server.drain(10.0), self.loop).result(30)
        self._thread.join(30)

    def idle(self, within_s: float = 5.0) -> bool:
        """Every block is back, within the time."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            load = self.replica.load()
            if load["blocks_available"] == load["blocks"] and not load["in_flight_steps"]:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def client(site):
    with Client(site.public, admin=site.admin) as client:
        yield client


def test_a_streamed_answer_equals_the_whole_one_and_names_its_revision(site, client):
    whole = client.generate(PROMPT, temperature=0.0, max_tokens=24)
    parts = list(client.stream(PROMPT, temperature=0.0, max_tokens=24))
    assert "".join(part.text for part in parts) == whole.text and whole.text
    assert whole.revision == site.replica.info.revision and parts[-1].choices[-1].finish_reason == "length"


def test_a_hundred_parallel_streams_each_draw_what_they_draw_alone(site, client):
    alone = [client.generate(PROMPT, temperature=1.0, seed=seed, max_tokens=8).text for seed in range(3)]
    texts: dict[int, str] = {}

    def ask(k: int) -> None:
        texts[k] = "".join(part.text for part in client.stream(PROMPT, temperature=1.0, seed=k % 3, max_tokens=8))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(texts) == 100 and all(text == alone[k % 3] for k, text in texts.items())
    assert site.idle()


def test_a_client_that_leaves_frees_its_blocks(site, client):
    for _ in range(5):
        stream = client.stream(PROMPT, ignore_eos=True, max_tokens=200)
        next(stream)
        stream.close()
    assert site.idle()


def test_a_deadline_frees_blocks_and_is_told(site, client):
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, ignore_eos=True, max_tokens=240, timeout_s=0.05)
    assert site.idle()


def test_a_bad_request_disturbs_nobody(site, client):
    with contextlib.closing(client.stream(PROMPT, temperature=0.0, max_tokens=40, ignore_eos=True)) as neighbour:
        first = next(neighbour).text
        with pytest.raises(InvalidArgument, match="top_p"):
            client.generate(PROMPT, top_p=1.5)
        text = first + "".join(part.text for part in neighbour)
    assert text == client.generate(PROMPT, temperature=0.0, max_tokens=40, ignore_eos=True).text


def test_the_operator_sees_load_and_that_nothing_was_compiled_late(client):
    load = client.load()
    assert load["compilations_after_ready"] == 0 and load["steps"] > 0 and load["blocks"] > 0
    assert client.info().ready and client.info().facts is not None
