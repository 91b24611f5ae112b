"""Mutual TLS between the processes of a cluster: from a folder of `serac certs init` to connections, by role.

    DIR/{ca.pem, cert.pem, key.pem} --Tls--> contexts of both sides --handshake--> the peer's role: may it?
              SIGHUP: reload()   new connections take the new files, or the old where the new are broken

    listens \\ dials   front   lane   operator
    front               -      yes      yes
    lane               yes     yes       -

TLS 1.3 alone, and both sides show a certificate of the cluster's own authority, which signs nothing else. Names of
hosts are not compared: a lane moves from host to host and is met at whatever address its launcher gave it, and all
hosts of a role hold the same key, so that a name would prove nothing more. What a peer may do hangs on its role;
which process it is, the greeting proves afterwards (engine/movers/greeting.py). Both sides compare the roles, so
that both can say what was wrong. A certificate that ends while its connection lives does not end the connection.

Source: RFC 8446; roles as URIs in the manner of SPIFFE.
"""

import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from engine.errors import ConfigError, wrong
from engine.movers.cards import Stranger
from engine.movers.private import private

ACCEPTS = {"front": ("lane", "operator"), "lane": ("front", "lane"), "operator": ()}
WARN_S = 30 * 86400.0
SAID = {  # OpenSSL's reasons
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate and got none",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not know the authority of our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the other side says that our certificate has ended",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side refused our certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side wants another version of TLS; expected TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "the other side offers older versions of TLS; expected TLS 1.3",
    "WRONG_VERSION_NUMBER": "got bytes that are not TLS; give certificates to both sides",
    "HTTP_REQUEST": "got HTTP; expected TLS",
}
logger = logging.getLogger("serac.tls")


class Identity(NamedTuple):
    """What a certificate says about its holder."""

    cluster: str
    role: str


class Loaded(NamedTuple):
    """Contexts from one state of the files."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    mine: Identity
    ends_s: float  # since 1970


class Tls:
    """What this process shows to others, and whom it lets in. `now_s` tells seconds since 1970."""

    def __init__(self, folder: Path, now_s: Callable[[], float] = time.time):
        """Raises ConfigError for files that cannot be used."""
        self._folder, self._now_s = folder, now_s
        self._loaded = _load(folder)
        self._warn()

    @property
    def role(self) -> str:
        """Ours."""
        return self._loaded.mine.role

    @property
    def ends_s(self) -> float:
        """When our certificate ends, in seconds since 1970."""
        return self._loaded.ends_s

    def reload(self, folder: Path | None = None) -> bool:
        """Read the files again, or those of another folder, for connections that come.

        False, logged, where they cannot be used.
        """
        try:
            loaded = _load(folder or self._folder)
            if loaded.mine != self._loaded.mine:
                raise ConfigError(wrong("certificates", loaded.mine.role, f"the role as before, {self.role}"))
        except ConfigError as error:
            logger.error("the certificates stay as they were: %s", error)
            return False
        self._loaded = loaded
        self._warn()
        return True

    def _warn(self) -> None:
        left_s = self.ends_s - self._now_s()
        if left_s < WARN_S:
            logger.warning("the certificate of %s ends in %d days; serac certs renew", self.role, left_s // 86400)

    def over_memory(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, dialing: bool) -> ssl.SSLObject:
        """TLS whose handshake is still to come; then it is up to `check`."""
        context = self._loaded.client if dialing else self._loaded.server
        return context.wrap_bio(incoming, outgoing, server_side=not dialing)

    def wrap(self, connected: socket.socket, dialing: bool, timeout_s: float) -> ssl.SSLSocket:
        """`connected`, which blocks, as a TLS socket to a peer of a role that may be at its other end.

        Raises Stranger, EOFError or OSError (TimeoutError), and has closed it then.
        """
        context, before = self._loaded.client if dialing else self._loaded.server, connected.gettimeout()
        wrapped = context.wrap_socket(connected, server_side=not dialing, do_handshake_on_connect=False)
        try:
            wrapped.settimeout(timeout_s)
            wrapped.do_handshake()
            self.check(wrapped, dialing)
            wrapped.settimeout(before)
        except ssl.SSLError as error:
            wrapped.close()
            raise stranger(error) from None
        except BaseException:
            wrapped.close()
            raise
        return wrapped

    def check(self, connection: ssl.SSLSocket | ssl.SSLObject, dialing: bool) -> None:
        """Raise Stranger unless peers of our two roles may connect this way round."""
        mine, peer = self._loaded.mine, role_of(connection)
        if peer is None or peer.cluster != mine.cluster:
            raise Stranger("tls: the other side's certificate says no role in this cluster")
        dialer, listener = (mine.role, peer.role) if dialing else (peer.role, mine.role)
        if dialer not in ACCEPTS.get(listener, ()):
            raise Stranger(f"tls: got {_one(dialer)} that connects to {_one(listener)}; {_accepted(listener)}")


def role_of(connection: ssl.SSLSocket | ssl.SSLObject) -> Identity | None:
    """What the peer's certificate says, which was verified; None where it says no role."""
    return _identity(connection.getpeercert() or {})


def stranger(error: ssl.SSLError) -> Exception:
    """A Stranger whose sentence says what was wrong; EOFError where the connection just ended."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return EOFError("the other side has ended")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Stranger(f"tls: the other side's certificate is refused: {error.verify_message}")
    reason = error.reason or type(error).__name__
    return Stranger(f"tls: {SAID.get(reason) or reason.lower().replace('_', ' ')}")


def _one(role: str) -> str:
    return f"an {role}" if role[:1] in "aeio" else f"a {role}"


def _accepted(listener: str) -> str:
    roles = ACCEPTS.get(listener, ())
    return f"it takes {' and '.join(f'{role}s' for role in roles)}" if roles else "nobody connects to one"


def _load(folder: Path) -> Loaded:
    """Contexts of both sides, which have shaken hands with each other. Raises ConfigError."""
    ca, cert, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    for path in (ca, cert, key):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"certificates: {path} cannot be read; expected a folder of serac certs init")
    if not private(key.stat()):
        raise ConfigError(f"certificates: others may read {key}; take their rights away (chmod 600)")
    contexts = []
    for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            context.load_cert_chain(cert, key)
            context.load_verify_locations(ca)
        except (ssl.SSLError, OSError) as error:
            words = getattr(error, "reason", None) or type(error).__name__
            raise ConfigError(f"certificates: {folder} holds no certificate with its own key ({words})") from None
        contexts.append(context)
    server, client = contexts
    server.num_tickets = 0  # nobody resumes, and a dialer that never reads leaves none unread
    return _tried(folder, server, client)


def _tried(folder: Path, server: ssl.SSLContext, client: ssl.SSLContext) -> Loaded:
    """What others will see: we connect to ourselves, in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    try:
        for _ in range(3):  # each turn brings the other end's message
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"certificates: {folder / 'cert.pem'} is refused: {error.verify_message}") from None
    found = ends[0].getpeercert() or {}
    identity = _identity(found)
    if identity is None or identity.role not in ACCEPTS:
        raise ConfigError(f"certificates: {folder / 'cert.pem'} has no role; expected one of serac certs init")
    return Loaded(server, client, identity, float(ssl.cert_time_to_seconds(str(found["notAfter"]))))


def _identity(certificate: dict) -> Identity | None:
    for kind, name in certificate.get("subjectAltName", ()):
        parts = urlsplit(name) if kind == "URI" else None
        if parts is not None and parts.scheme == "serac" and parts.netloc and parts.path.count("/") == 1:
            return Identity(parts.netloc, parts.path[1:])
    return None
