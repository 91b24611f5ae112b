"""`python -m bench NAME [options]`: runs one measurement; without a name, lists them.

A bench is a row of BENCHES and a module with `main(arguments) -> exit code`, imported when it is asked for.
"""

import importlib
import sys

BENCHES = {
    "mesh": "one row a mesh size: speed, collectives, memory beside the plan, equal tokens",
    "host": "what a step costs the host while the device does nothing",
    "serve": "the whole engine on this device: the tokens of a CPU, tokens a second, a step over its floor",
    "decode": "the CPU decode step beside the time of reading the weights once",
    "kv": "a move of KV blocks between two lanes beside a memcpy, and what its checksums cost",
    "wire": "KV blocks from process to process over loopback beside a memcpy",
    "overload": "goodput, waits and refusals when more is asked than can be done, simulated and real",
    "attention": "the work list of attention on a CPU beside gathering everything",
    "matmul": "products with quantised weights on a CPU beside plain float32 ones",
    "lockstep": "what a lane over several processes pays for a step's orders, and for telling its tokens",
    "load": "an artifact's load against that of a safetensors folder",
    "kernels": "every kernel on this GPU: right, then how near to what the device can do, in one call",
    "tune": "the fastest configs of the kernels on this GPU, written for the dispatcher",
    "ahead": "every kernel compiled for a GPU that is not there: registers, shared memory, launches",
}


def main(arguments: list[str]) -> int:
    """Run the bench named first in `arguments`."""
    if arguments and arguments[0] in BENCHES:
        return importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
    wanted = arguments and arguments[0] not in ("-h", "--help")
    out = sys.stderr if wanted else sys.stdout
    if wanted:
        print(f"bench: got {arguments[0]!r:.64}; expected one of {', '.join(BENCHES)}", file=out)
    lines = [f"  {name:<10}{words}" for name, words in BENCHES.items()]
    print("\n".join(["usage: python -m bench NAME [options]; NAME --help says which", *lines]), file=out)
    return 2 if wanted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
