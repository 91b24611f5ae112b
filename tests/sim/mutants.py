"""Bugs on purpose, one line each, in the code that serves: the simulator is worth what it finds of them.

Each is a row: a name, the module, what stands there (once), what stands there instead. They are of the kinds that
engines with prefill and decode pools have shipped: blocks given out too early, messages taken twice or too late,
tokens of attempts that were given up, leaks, missing answers.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    name: str
    module: str
    before: str
    after: str


ROWS = (
    Mutant("publish a block when it is allocated", "engine.core.scheduler",
           "        self.running[sequence.serial] = self.prefilling[sequence.serial] = sequence\n",
           "        self.running[sequence.serial] = self.prefilling[sequence.serial] = sequence\n"
           "        self.publish(sequence, self.rows.blocks(sequence.row), len(sequence.tokens))\n"),
    Mutant("offer a block when its chunk is planned", "engine.core.scheduler",
           "        table.computed[row] += count\n",
           "        table.computed[row] += count\n        self.say_computed(sequence, start + count)\n"),
    Mutant("say nothing of a prompt that is all cached", "engine.core.scheduler",
           "        self.say_computed(sequence, computed)\n        if sequence", "        if sequence"),
    Mutant("share the block of the last token", "engine.core.scheduler",
           "self.pool.share(sequence.chain[: (len(sequence.tokens) - 1) // size])",
           "self.pool.share(sequence.chain[: len(sequence.tokens) // size])"),
    Mutant("lose the record of a row that no step takes", "engine.core.scheduler",
           "len(draft.chunks) == 0:\n            return None\n",
           "len(draft.chunks) == 0:\n            self._loads.clear()\n            return None\n"),
    Mutant("leak the blocks of what ends without a row", "engine.core.scheduler",
           "        self.pool.drop(sequence.blocks)\n        sequence.blocks = []\n",
           "        sequence.blocks = []\n"),
    Mutant("let blocks that wait for a row wait behind those without", "engine.core.scheduler",
           "(self.waiting.first, self.waiting.arrived)", "(self.waiting.first,)"),
    Mutant("evict a block and still find it", "engine.core.blocks",
           "        self._unpublish(block)\n        return block\n", "        return block\n"),
    Mutant("free one reference twice", "engine.core.blocks",
           "self._refs[block] -= 1\n", "self._refs[block] -= 1 + (self._refs[block] > 1)\n"),
    Mutant("count the draws of rows that were left", "engine.core.settle",
           "    if flight.era != table.era:\n", "    if False:\n"),
    Mutant("end a sequence one token late", "engine.core.rows",
           "ends: np.ndarray = self._next[rows] >= self._end[rows]",
           "ends: np.ndarray = self._next[rows] > self._end[rows]"),
    Mutant("draw every choice alike", "engine.core.sequence", "choice=choice,\n", "choice=0,\n"),
    Mutant("take a part of an earlier asking", "engine.core.handoff",
           "(part.generation, part.first) != wanted", "part.first > self.have"),
    Mutant("count a doubled part twice", "engine.core.handoff",
           "(part.generation, part.first) != wanted", "part.generation != self.generation"),
    Mutant("leave the last block behind", "engine.core.agent",
           "        total = -(-(tokens - 1) // self.scheduler.shape.block_size)\n",
           "        total = (tokens - 1) // self.scheduler.shape.block_size\n"),
    Mutant("write a part over the blocks before it", "engine.core.agent",
           "self.scheduler.reserved.held(target.handoff)[before : target.have]",
           "self.scheduler.reserved.held(target.handoff)[: target.have - before]"),
    Mutant("read the first blocks for every part", "engine.core.agent",
           "self.scheduler.blocks_of(sequence)[first : first + count]",
           "self.scheduler.blocks_of(sequence)[:count]"),
    Mutant("say nothing of a handoff that failed", "engine.core.agent",
           "            self._tell(Failed(target.handoff, target.reason))\n", "            pass\n"),
    Mutant("keep what was reserved for a handoff that failed", "engine.core.agent",
           "self.targets[target.handoff]\n            self.scheduler.reserved.drop(target.handoff)\n",
           "self.targets[target.handoff]\n"),
    Mutant("commit KV that the device lost", "engine.core.agent",
           '            target.state, target.reason = State.ABORTED, "the device failed"\n', ""),
    Mutant("reserve before the prompt has its blocks", "engine.core.agent",
           "target.offered = self._early.pop(message.handoff, None) == message.source", "target.offered = True"),
    Mutant("run what was cancelled before it began", "engine.core.agent",
           "parts = tuple(part for part in expected.submit.parts if part.serial not in message.serials)",
           "parts = expected.submit.parts"),
    Mutant("never say Stop again", "engine.core.handoff",
           "        return [Done(self.handoff) if self.state is State.COMMITTED else Stop(self.handoff)]\n",
           "        return []\n"),
    Mutant("never ask again", "engine.core.handoff",
           "            return self._ask(now)\n        self.ask_at, self.wait_s = now",
           "            return []\n        self.ask_at, self.wait_s = now"),
    Mutant("take tokens of an attempt that was given up", "engine.core.router",
           "            self._tracks.pop(track.serial, None)\n            if track.over:",
           "            if track.over:"),
    Mutant("go on with what had ended", "engine.core.router",
           "            elif (last := self._finished(track)) is not None:  # only its terminal was lost\n",
           "            elif (last := None) is not None:\n"),
    Mutant("say the terminal twice", "engine.core.router",
           "        if track.over:\n            return\n        leg =", "        leg ="),
    Mutant("forget what a lost lane served", "engine.core.router",
           '            self._again(leg, f"lane {name} was lost", blame=not lane.retired)\n', "            pass\n"),
    Mutant("tell no lane that another is lost", "engine.core.router",
           "            self._to(other, Fence(name))\n", "            pass\n"),
    Mutant("leave a cancelled choice running", "engine.core.router",
           "            self._to(leg.target, Cancel((track.serial,), handoff, reason))\n", ""),
    Mutant("deliver a doubled packet twice", "engine.core.session",
           "        if self._received < packet.number <= self._received + AHEAD:\n            self._early",
           "        self._received = min(self._received, packet.number - 1)\n        if True:\n"
           "            self._early"),
    Mutant("never repeat a packet", "engine.core.session",
           "        if self._unacknowledged and now >= self._again_at:\n", "        if False:\n"),
    Mutant("wait for a silent lane for ever", "engine.core.session",
           "        return now - self.heard_at > SILENT_S\n", "        return False\n"),
    Mutant("go on after being refused", "engine.core.membership",
           "            self.fenced |= answered.name == self.name\n", "            pass\n"),
)  # fmt: skip


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Finds one module and loads it with one place changed; nothing of it is cached."""

    def __init__(self, mutant: Mutant):
        self._mutant, self._path = mutant, path_of(mutant)

    def find_spec(self, name, path=None, target=None):
        """Ours is the one module only."""
        return importlib.util.spec_from_loader(name, self) if name == self._mutant.module else None

    def get_filename(self, fullname):
        """Where tracebacks look for its lines."""
        return str(self._path)

    def get_data(self, path):
        """The source to compile."""
        return changed(self._mutant).encode()


def path_of(mutant: Mutant) -> Path:
    """The file that the module is in."""
    return ROOT / (mutant.module.replace(".", "/") + ".py")


def changed(mutant: Mutant) -> str:
    """The source with the bug in it. Raises AssertionError where the source has moved on."""
    source = path_of(mutant).read_text()
    assert source.count(mutant.before) == 1, f"{mutant.name}: found {source.count(mutant.before)} times"
    return source.replace(mutant.before, mutant.after)


def install(mutant: Mutant) -> None:
    """Import the module with the bug, before anything else imports it."""
    assert mutant.module not in sys.modules
    sys.meta_path.insert(0, Changed(mutant))


def load(mutant: Mutant) -> ModuleType:
    """A copy of the module with the bug, which nobody else sees."""
    spec = importlib.util.spec_from_loader(f"{mutant.module}_with_a_bug", Changed(mutant))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
