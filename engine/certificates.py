"""The certificates of a worker: files of this host, or sent by who started it, over the channel they share.

--certs DIR                                 read again on SIGHUP
{"start": {"tls": {"ca.pem": ...}}}         in files of this process alone, for as long as it takes to read them
{"tls": {...}}                              the same, when the starter sends new ones
"""

import contextlib
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.movers.tls import Tls
from engine.starter import Starter

FILES = ("ca.pem", "cert.pem", "key.pem")


def read(folder: Path) -> dict[str, str]:
    """The files of a folder of `serac certs init`, to be sent. Raises ConfigError for what cannot be used."""
    Tls(folder)
    return {name: (folder / name).read_text() for name in FILES}


def given(starter: Starter, files: Mapping[str, str] | None, own: Tls | None) -> Tls | None:
    """What this process shows others: its host's, or those that were sent; None where there are none."""
    if own is not None:
        signal.signal(signal.SIGHUP, lambda *_: own.reload())
        return own
    if files is None:
        return None
    tls = _loaded(files)

    def renew(files: Mapping[str, str]) -> None:
        with _written(files) as folder:
            tls.reload(folder)

    starter.on_tls = renew
    return tls


def _loaded(files: Mapping[str, str]) -> Tls:
    with _written(files) as folder:
        return Tls(folder)


@contextlib.contextmanager
def _written(files: Mapping[str, str]) -> Iterator[Path]:
    """In a folder of this process alone, for as long as it takes to read them."""
    with tempfile.TemporaryDirectory(prefix="serac-certs-") as made:
        folder = Path(made)  # 0700
        for name in FILES:
            (folder / name).touch(0o600)
            (folder / name).write_text(files[name])
        yield folder
