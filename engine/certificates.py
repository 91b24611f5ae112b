"""The certificates of a worker: files of this host, or sent by who started it, over the channel they share.

--certs DIR                                 read again on SIGHUP
{"start": {"tls": {"ca.pem": ...}}}         in a folder of this process alone, taken away at its end;
{"tls": {...}}                              replaced there when the starter sends new ones
"""

import atexit
import shutil
import signal
import tempfile
from collections.abc import Mapping
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
    folder = Path(tempfile.mkdtemp(prefix="serac-certs-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _write(folder, files)
    tls = Tls(folder)

    def renew(files: Mapping[str, str]) -> None:
        _write(folder, files)
        tls.reload()

    starter.on_tls = renew
    return tls


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name in FILES:
        (folder / name).touch(0o600)
        (folder / name).write_text(files[name])
