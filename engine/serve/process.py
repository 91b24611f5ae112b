"""The life of a serving process on its event loop: listen, announce, wait for a signal, drain, end. SIGHUP: reload.

listening --SIGTERM or SIGINT or the Drain RPC--> draining --nothing open--> 0
                                                       `-- a second signal --> 1, at once
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable

from engine.serve.server import Server

SIGNALS = (signal.SIGTERM, signal.SIGINT)
log = logging.getLogger("serac.serve")


class Signals:
    """Turns the first signal into a drain and the second into an exit; `reload` is called for a SIGHUP."""

    def __init__(
        self,
        server: Server,
        leave: Callable[[int], object] = os._exit,
        reload: Callable[[], None] = lambda: None,
    ):
        self._server, self._leave, self._reload = server, leave, reload
        self._drain: asyncio.Task[int] | None = None

    def install(self) -> None:
        """Listen for signals on the running loop."""
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.receive, number)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def receive(self, number: int) -> None:
        """A signal came."""
        name = signal.Signals(number).name
        if self._drain is not None:
            log.warning("second signal, leaving at once: signal=%s", name)
            self._leave(1)
            return
        log.info("draining: signal=%s", name)
        self._drain = asyncio.get_running_loop().create_task(self._server.drain())


async def run(
    server: Server, announce: Callable[[str, str], None], reload: Callable[[], None] = lambda: None
) -> int:
    """Serve until drained; `announce` is told the public and the admin address. Returns the exit code."""
    addresses = await server.start()
    Signals(server, reload=reload).install()
    announce(*addresses)
    await server.drained.wait()
    await server.stop()
    return 0
