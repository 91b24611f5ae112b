"""Runs a command whose life is tied to ours: it ends when our input ends, or when we are killed.

    python -m engine.cluster.tied COMMAND ...      exit code: that of the command, 128 + N when signal N ended it

Where an engine kills who started a process, and not the process, this keeps none behind. At the end of the input
all that the command started ends with it; when we are killed, the kernel (Linux) kills the command alone.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

STOP_S = 10.0
PR_SET_PDEATHSIG = 1


def run(arguments: Sequence[str], source: int) -> int:
    """Run it until it ends or the file of number `source` does; returns the exit code."""
    library = ctypes.CDLL(None)

    def die_with_us() -> None:  # Ray kills this process outright, before it can pass that on
        library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_us)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=_watch, args=(process, source), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _watch(process: subprocess.Popen[bytes], source: int) -> None:
    while os.read(source, 1024):  # whatever is said is not for us
        pass
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], sys.stdin.fileno()))
