"""What the contract needs of a replica beyond `serac.v1`: its sizes, the model's folder, its published blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from engine.core.blocks import Content
from engine.core.request import Limits, Request
from engine.errors import SeracError
from engine.serve.contract import Replica, Text


class FolderText(Text, Protocol):
    """Text that knows where it was read from."""

    @property
    def folder(self) -> Path: ...


class Reader(Protocol):
    """Changes of published blocks: (key, content) where one is stored, (key, None) where one is gone."""

    @property
    def waiting(self) -> int: ...
    def take(self) -> list[tuple[bytes, Content | None]]: ...


class Worker(Replica, Protocol):
    """A replica as a gateway's worker. `read_blocks` returns a reader and what is published now.

    pairing  None where it shares no secret with other replicas
    offer    has a prompt computed and held, and tells what the replica must show that decodes it
    """

    @property
    def text(self) -> FolderText: ...
    @property
    def limits(self) -> Limits: ...
    def read_blocks(self, wake: Callable[[], None]) -> tuple[Reader, list[Content]]: ...
    def close_blocks(self, reader: Reader) -> None: ...
    def forget_blocks(self) -> None: ...
    @property
    def pairing(self) -> object | None: ...
    def offer(self, request: Request, told: Callable[[str | SeracError], None]) -> int: ...
    def close_offer(self, number: int) -> None: ...
