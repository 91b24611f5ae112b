"""What `bench kernels` times, and what each figure is held against: data, without a device.

    decode     batch x context, blocks scattered      bytes of keys and values a second, beside reading
    prefill    tokens after a prefix, one sequence    products a second, beside a large matrix product

    goal       share of the ceiling that was measured in the same run
    ship       required     best   what the best known kernels reach     moonshot   wished for

A family of decode cases shares one pool and one program, whose table is as wide as the longest context asks for, as
in serving. Costs nothing; nothing here is measured.
Source of the goals: FlashMLA's and ragged paged attention's published shares of bandwidth, FlashAttention-3's and
cuDNN's published products a second (over 788 TFLOP/s, what a large product reaches on an H200).
"""

from typing import NamedTuple

from pallas_kernels.pools import SCALE_BYTES

KIB = 1024
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
PEAK_FLOPS = 788e12  # of the device that the goals of prefill were written for
COPY_BYTES = 4.3e12
CHOSEN = "chosen"  # the implementation that the dispatcher takes for a case


class Goal(NamedTuple):
    """Shares of a ceiling."""

    ship: float
    best: float
    moonshot: float

    def met(self, share: float) -> str:
        """The highest goal that `share` reaches."""
        reached = [name for name, value in zip(self._fields, self, strict=True) if share >= value]
        return reached[-1] if reached else "none"


class Ratio(NamedTuple):
    """Two cases of the same run, named by a pattern and what it makes of the match."""

    words: str
    case: str
    beside: str
    from_bytes: int
    ship: float


class Heads(NamedTuple):
    """Of one layer on one device."""

    N: int
    K: int
    H: int


class Decode(NamedTuple):
    """Decode steps of one batch over several contexts; `ragged` takes lengths from 1,024 to twice the context."""

    name: str
    heads: Heads
    batch: int
    contexts: tuple[int, ...]
    block: int = 64
    pool: str = "bfloat16"
    ragged: bool = False
    dtype: str = "bfloat16"  # of the queries
    part: str = "decode"

    @property
    def longest(self) -> int:
        """Positions that a table has room for."""
        return max(self.contexts) * (2 if self.ragged else 1)

    @property
    def position_bytes(self) -> int:
        """Of keys and values."""
        scale = SCALE_BYTES if NUMBER_BYTES[self.pool] == 1 else 0
        return 2 * self.heads.K * (self.heads.H * NUMBER_BYTES[self.pool] + scale)

    def lengths(self, context: int) -> list[int]:
        """Positions of each row; the ragged ones sum to what uniform ones do."""
        if not self.ragged:
            return [context] * self.batch
        least = context // 16
        step = 2 * (context - least) / max(self.batch - 1, 1)
        lengths = [round(least + step * row) for row in range(self.batch)]
        lengths[-1] += context * self.batch - sum(lengths)
        return lengths


class Prefill(NamedTuple):
    """The last `tokens` of one sequence that has `prefix` positions before them."""

    name: str
    heads: Heads
    tokens: int
    prefix: int = 0
    block: int = 64
    pool: str = "bfloat16"
    dtype: str = "bfloat16"
    part: str = "chunks"

    @property
    def longest(self) -> int:
        """Positions of the sequence."""
        return self.tokens + self.prefix

    @property
    def position_bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.heads.K * self.heads.H * NUMBER_BYTES[self.pool]

    @property
    def flops(self) -> int:
        """Of both products, over what is seen."""
        pairs = self.tokens * self.prefix + self.tokens * (self.tokens + 1) // 2
        return 4 * self.heads.H * self.heads.N * pairs


Case = Decode | Prefill
LLAMA_8B, QWEN3_06B = Heads(32, 8, 128), Heads(16, 8, 128)
CONTEXTS = (1 * KIB, 8 * KIB, 32 * KIB)
BATCHES = (1, 8, 64, 256)
PREFILLS = (512, 2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB)
SMALL_CONTEXTS = (24, 40)


def cases() -> list[Case]:
    """Everything, what matters most first: time may run out."""
    first = [Decode(f"llama-8b {batch}", LLAMA_8B, batch, CONTEXTS) for batch in (64, 1, 8, 256)]
    first += [Prefill("llama-8b", LLAMA_8B, tokens) for tokens in PREFILLS]
    first.append(Prefill("llama-8b", LLAMA_8B, 2 * KIB, 30 * KIB))
    uniform = 16 * KIB + 512
    first += [
        Decode("llama-8b 64 uniform", LLAMA_8B, 64, (uniform,)),
        Decode("llama-8b 64 ragged", LLAMA_8B, 64, (uniform,), ragged=True),
    ]
    for pool, word in (("int8", "int8"), ("float8_e4m3fn", "fp8")):
        first += [Decode(f"llama-8b {word} {batch}", LLAMA_8B, batch, CONTEXTS, pool=pool) for batch in BATCHES]
    first += [Decode(f"llama-8b C{C} 64", LLAMA_8B, 64, (8 * KIB,), block=C) for C in (64, 16, 128)]
    first += [Decode(f"group {G} 64", Heads(8 * G, 8, 128), 64, (8 * KIB,)) for G in (1, 2, 4, 8, 16)]
    first += [Decode(f"qwen3-0.6b {batch}", QWEN3_06B, batch, CONTEXTS) for batch in BATCHES]
    for pool, word in (("int8", "int8"), ("float8_e4m3fn", "fp8")):
        first += [Decode(f"qwen3-0.6b {word} {batch}", QWEN3_06B, batch, CONTEXTS, pool=pool) for batch in BATCHES]
    return first


def small_cases() -> list[Case]:
    """A few for a machine that is only to show that everything runs."""
    heads = Heads(4, 2, 16)
    return [
        Decode("small 2", heads, 2, SMALL_CONTEXTS, block=16),
        Decode("small 2 ragged", heads, 2, (32,), block=16, ragged=True),
        Decode("small 2 uniform", heads, 2, (32,), block=16),
        Decode("small int8 2", heads, 2, (40,), block=16, pool="int8"),
        Prefill("small", heads, 24, block=16),
        Prefill("small", heads, 8, 24, block=16),
    ]


DECODE_GOALS = {  # batch, context; the row of a batch and context between is that of fewer bytes
    (1, 8 * KIB): Goal(0.45, 0.60, 0.75),
    (8, 1 * KIB): Goal(0.45, 0.60, 0.75),
    (1, 32 * KIB): Goal(0.60, 0.75, 0.88),
    (8, 8 * KIB): Goal(0.70, 0.82, 0.93),
    (64, 1 * KIB): Goal(0.70, 0.82, 0.93),
    (8, 32 * KIB): Goal(0.78, 0.88, 0.96),
    (256, 1 * KIB): Goal(0.78, 0.88, 0.96),
}
LONG_DECODE = Goal(0.82, 0.90, 0.98)  # from 2 GB on
LAUNCH_BOUND = {(1, 1 * KIB): (15e-6, 9e-6, 5e-6)}  # seconds, where a share of bandwidth says nothing
PREFILL_GOALS = {  # tokens, prefix
    (4 * KIB, 0): Goal(400e12 / PEAK_FLOPS, 570e12 / PEAK_FLOPS, 610e12 / PEAK_FLOPS),
    (8 * KIB, 0): Goal(450e12 / PEAK_FLOPS, 600e12 / PEAK_FLOPS, 640e12 / PEAK_FLOPS),
    (16 * KIB, 0): Goal(500e12 / PEAK_FLOPS, 617e12 / PEAK_FLOPS, 660e12 / PEAK_FLOPS),
    (32 * KIB, 0): Goal(520e12 / PEAK_FLOPS, 630e12 / PEAK_FLOPS, 680e12 / PEAK_FLOPS),
    (2 * KIB, 30 * KIB): Goal(480e12 / PEAK_FLOPS, 600e12 / PEAK_FLOPS, 660e12 / PEAK_FLOPS),
}
RATIOS = (  # what, the case, the one beside it, bytes of a call of that one from which on: least speed over its
    Ratio("8-bit keys", r"decode (\S+) (int8|fp8) (\d+)", r"decode \1 \3", 1 << 30, 1.75),
    Ratio("ragged lengths", r"decode (\S+) (\d+) ragged", r"decode \1 \2 uniform", 0, 0.90),
    Ratio("blocks of 16", r"decode (\S+) C16 (\d+)", r"decode \1 C64 \2", 0, 0.92),
    Ratio("blocks of 128", r"decode (\S+) C128 (\d+)", r"decode \1 C64 \2", 0, 0.97),
    Ratio("heads of a group", r"decode group (\d+) (\d+)", r"decode group 4 \2", 0, 0.97),
)


def goal(case: Case, context: int, bytes_read: int) -> Goal | None:
    """What a case is held to as a share of its ceiling; None where nobody said."""
    if isinstance(case, Prefill):
        return PREFILL_GOALS.get((case.tokens, case.prefix))
    if (case.batch, context) in LAUNCH_BOUND:
        return Goal(*(bytes_read / seconds / COPY_BYTES for seconds in LAUNCH_BOUND[case.batch, context]))
    if bytes_read >= 2e9 and NUMBER_BYTES[case.pool] == 2:
        return LONG_DECODE
    return DECODE_GOALS.get((case.batch, context))
