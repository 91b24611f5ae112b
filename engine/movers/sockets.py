"""Sockets that listen at an address, and those that go to one."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from engine.errors import ConfigError
from engine.movers.addresses import Address, prepare
from engine.movers.pipe import Pipe, PlainWire
from engine.movers.tls import Tls
from engine.movers.tls_wire import secure

BACKLOG = 128


def listening(address: Address) -> socket.socket:
    """A socket that listens there; port 0 is a free one. Raises ConfigError."""
    if address.path:
        prepare(address.path)
        _remove_left(address.path)
    made = socket.socket(_family(address))
    try:
        if not address.path:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(_target(address))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(f"address: cannot listen there: {error.strerror or type(error).__name__}") from None
    made.setblocking(False)
    return made


def address_of(listener: socket.socket) -> Address:
    """Where it listens."""
    if listener.family == socket.AF_UNIX:
        return Address(listener.getsockname(), "", 0)
    host, port, *_ = listener.getsockname()
    return Address("", host, port)


def end(listener: socket.socket) -> None:
    """Close it, and take its path away."""
    if listener.fileno() >= 0:
        if path := address_of(listener).path:
            with contextlib.suppress(OSError):
                os.unlink(path)
        listener.close()


async def dial(address: Address, tls: Tls | None) -> Pipe:
    """A connection to who listens there; a unix socket is plain. Raises OSError, EOFError or Stranger."""
    made = socket.socket(_family(address))
    made.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(made, _target(address))
    except BaseException:
        made.close()
        raise
    return await opened(made, tls, dialing=True)


async def opened(connected: socket.socket, tls: Tls | None, dialing: bool) -> Pipe:
    """A pipe over what was just connected, once it is secure. Raises OSError, EOFError or Stranger; closed then."""
    if tls is not None and connected.family != socket.AF_UNIX:
        return await secure(connected, tls, dialing)
    try:
        return Pipe(PlainWire(connected))
    except BaseException:
        connected.close()
        raise


def _remove_left(path: str) -> None:
    """Take away the socket of a process that is no more: nobody answers there."""
    with contextlib.suppress(OSError):
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX) as asking:
                try:
                    asking.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _target(address: Address) -> str | tuple[str, int]:
    return address.path or (address.host, address.port)
