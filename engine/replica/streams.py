"""Streams of a replica for asyncio: whatever waits is taken at each wake, one list for all of it.

    open -> [delta, delta] -> [delta] -> ... -> [delta with finish] -> end;  close() aborts what still runs

Lanes run on threads of their own; their events cross to the event loop once a turn.
"""

import asyncio
from collections.abc import AsyncIterator

from engine.core.request import Request
from engine.replica.delta import Delta
from engine.replica.output import Output
from engine.replica.replica import Replica


class Stream:
    """The output of one request; one task iterates it."""

    def __init__(self, replica: Replica, request: Request, paired: str = ""):
        self._replica = replica
        self._wake = asyncio.Event()
        self.output: Output = replica.submit(request, lambda _: self._wake.set(), paired)

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[list[Delta]]:
        try:
            while not self.output.done:
                await self._wake.wait()
                self._wake.clear()
                if deltas := self.output.take():
                    self._replica.taken(self.output)
                    yield deltas
        finally:
            self.close()

    def close(self) -> None:
        """Nobody reads any more: abort what still runs. Twice is once."""
        if not self.output.closed:
            self.output.closed = True
            if not self.output.ended:
                self._replica.abort(self.output.request.request_id)


class Streams:
    """Opens streams on the running event loop; made on it."""

    def __init__(self, replica: Replica):
        self._replica = replica
        loop = asyncio.get_running_loop()
        replica.dispatch = loop.call_soon_threadsafe

    async def open(self, request: Request, paired: str = "") -> Stream:
        """Admit `request`; `paired` is what the replica said that holds its prompt.

        Raises InvalidArgument, AlreadyExists, ResourceExhausted or Unavailable.
        """
        return Stream(self._replica, request, paired)
