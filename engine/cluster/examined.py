"""The doctor's end of a pipe: an examiner on this machine or, over ssh, on another; each answer has a deadline.

    Examined(host) --ask(words)--> words, --events(words)--> words ... --close--> the examiner ends with its input

Silent says that a host does not answer, why as far as it is known, and what to do.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from engine.cluster.checks import MISSING, Facts
from engine.cluster.ssh import REFUSED, SAID, remote
from engine.cluster.topology import Host, Security
from engine.errors import SeracError

EXAMINE = ("-m", "engine.cluster.examine")
LONGEST_LINE = 2**20
MOST_WORDS = 200
END_S = 2.0
ENDED = ""


class Silent(SeracError):
    """A host that does not answer as it should."""

    exit_code = MISSING

    def __init__(self, why: str, todo: str):
        super().__init__(why)
        self.todo = todo


class Examined:
    """A host that answers."""

    def __init__(self, host: Host, security: Security):
        self.host = host
        command = [sys.executable, *EXAMINE]
        if not host.loopback:
            command = remote(host, security, {}, [host.python, *EXAMINE])
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors = ""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._answers, self._complaints)]
        for thread in self._threads:
            thread.start()

    def ask(self, words: Mapping[str, object], seconds: float) -> dict:
        """One answer. Raises Silent."""
        self._send(words)
        return self._next(time.monotonic() + seconds, seconds)

    def facts(self, words: Mapping[str, object], seconds: float) -> Facts:
        """The answer of a host of this version. Raises Silent."""
        found = self.ask(words, seconds).get("facts")
        if not isinstance(found, dict) or found.keys() != asdict(Facts()).keys():
            raise Silent("its Serac is of another version", "install the same version on every host")
        return Facts(**found)

    def events(self, words: Mapping[str, object], seconds: float) -> Iterator[dict]:
        """Every answer up to the one that says how it ended. Raises Silent when that is a failure."""
        until = time.monotonic() + seconds
        self._send(words)
        while "done" not in (event := self._next(until, seconds)):
            yield event
        if event["done"] != 0:
            said = str(event["problem"]).replace(self.host.address, self.host.name)[:MOST_WORDS]
            raise Silent(
                f"its process ended with code {event['done']}: {said}",
                "try serac doctor there alone; NCCL_DEBUG=INFO for NCCL",
            )

    def close(self, seconds: float = END_S) -> None:
        """End the examiner, and with it whatever it started; by force when that takes longer."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()
        process.stdout.close()
        process.stderr.close()

    def _send(self, words: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, as the next line tells
            print(json.dumps(words), file=self._process.stdin, flush=True)

    def _next(self, until: float, seconds: float) -> dict:
        while True:
            try:
                line = self._lines.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                why = f"no answer within {seconds:.0f} s"
                raise Silent(why, "is it up, and may this machine reach it?") from None
            if line == ENDED:
                raise self._ended()
            with contextlib.suppress(ValueError):  # a shell may greet first
                if isinstance(words := json.loads(line), dict):
                    return words

    def _ended(self) -> Silent:
        """Why there will be no answer."""
        self._lines.put(ENDED)  # for whoever asks next
        self._threads[1].join(END_S)
        code = self._process.wait()
        if not self.host.loopback and code == REFUSED:
            said = next((words for key, words in SAID.items() if key in self._errors), "ssh failed")
            return Silent(said, "try ssh to it by hand from here")
        if "No module named" in self._errors or "not found" in self._errors:
            return Silent("no Serac of this version there", "install it, or set python in its [[host]]")
        return Silent(f"its examiner ended with code {code}", "try serac doctor there")

    def _answers(self) -> None:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(LONGEST_LINE):
            self._lines.put(line)
        self._lines.put(ENDED)

    def _complaints(self) -> None:
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(LONGEST_LINE):
            self._errors = (self._errors + line)[-4096:]
