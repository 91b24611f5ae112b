"""Who may connect: addresses that are safe to listen on, TLS, bearer tokens.

Loopback needs nothing. Any other address needs TLS, a token or the flag that says otherwise. Tokens are kept as
sha256 digests and compared in constant time, all of them, whatever the first ones say.
"""

import hashlib
import hmac
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import ConfigError, wrong

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
REFUSAL = "authorization: got no valid bearer token"


@dataclass(frozen=True, slots=True)
class Access:
    """What a listener demands of a client."""

    token_file: Path | None = None  # one token a line
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # who signs the certificates that clients of the public listener must show
    insecure_allow_remote: bool = False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(names: tuple[str, str], host: str, port: int, access: Access) -> None:
    """Raises ConfigError, before anything is loaded, for an address that is unsafe, unknown or taken.

    names  of the settings that hold the host and the port
    """
    guarded = access.token_file or access.tls_cert or access.insecure_allow_remote
    if not is_loopback(host) and not guarded:
        expected = "a loopback address, or --tls-cert with --tls-key, or --token-file, or --insecure-allow-remote"
        raise ConfigError(wrong(names[0], host, expected), field=names[0])
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            raise ConfigError(wrong(names[0], host, "a known host or address"), field=names[0]) from None
        except OSError as error:
            expected = f"a free port on {host} ({error.strerror}); see who holds it: ss -ltnp 'sport = :{port}'"
            raise ConfigError(wrong(names[1], port, expected), field=names[1]) from None


def credentials(access: Access, client_ca: Path | None = None) -> grpc.ServerCredentials | None:
    """TLS credentials, None for plain text; with `client_ca`, only for clients that it has signed.

    Raises ConfigError for files that cannot be used.
    """
    if access.tls_cert is None and access.tls_key is None:
        if client_ca is not None:
            expected = "--tls-cert and --tls-key beside it"
            raise ConfigError(f"tls_client_ca: got one without TLS; expected {expected}", field="tls_client_ca")
        return None
    if access.tls_cert is None or access.tls_key is None:
        raise ConfigError("tls_cert: got one of --tls-cert and --tls-key; expected both", field="tls_cert")
    if access.tls_key.exists() and access.tls_key.stat().st_mode & 0o007:
        expected = "a file that others cannot read: chmod o-rwx"
        raise ConfigError(f"tls_key: got {access.tls_key}; expected {expected}", field="tls_key")
    _check_certificate(access.tls_cert, access.tls_key)
    pair = (_read("tls_key", access.tls_key), _read("tls_cert", access.tls_cert))
    if client_ca is None:
        return grpc.ssl_server_credentials([pair])
    roots = _read("tls_client_ca", client_ca)
    try:
        ssl.create_default_context(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"tls_client_ca: got {client_ca}; expected PEM certificates", field="tls_client_ca"
        ) from None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=True)


def _check_certificate(cert: Path, key: Path) -> None:
    """Raises ConfigError unless the key is that of the certificate, and the certificate of this day."""
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for field, path in (("tls_cert", cert), ("tls_key", key)):
        _read(field, path)
    try:
        ours.load_cert_chain(cert, key)
        theirs.load_verify_locations(cert)
    except ssl.SSLError as error:
        words = f"a PEM certificate and its own private key ({error.reason or error})"
        raise ConfigError(f"tls_cert: got {cert} with {key}; expected {words}", field="tls_cert") from None
    theirs.check_hostname = False
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (ours.wrap_bio(up, down, server_side=True), theirs.wrap_bio(down, up))
    try:
        for _ in range(4):  # each turn brings the other end's message
            for end in ends:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        if "expired" in error.verify_message or "not yet valid" in error.verify_message:
            raise ConfigError(f"tls_cert: got {cert}: {error.verify_message}", field="tls_cert") from None


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: got {path}; expected a readable file ({error.strerror})", field=field
        ) from None


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """The digests of the tokens in a file, one a line. Raises ConfigError when there is none."""
    lines = [line.strip() for line in _read("token_file", path).splitlines()]
    digests = tuple(hashlib.sha256(line).digest() for line in lines if line)
    if not digests:
        raise ConfigError(f"token_file: got {path}; expected one token a line, at least one", field="token_file")
    return digests


class TokenGuard(grpc.aio.ServerInterceptor):
    """Refuses every RPC without a valid bearer token, health checks excepted."""

    def __init__(self, digests: tuple[bytes, ...]):
        self._digests = digests
        self._refuse = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler itself, or one that refuses."""
        if handler_call_details.method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        digest = hashlib.sha256(str(given).removeprefix("Bearer ").encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return await continuation(handler_call_details) if any(matches) else self._refuse


async def refuse(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """UNAUTHENTICATED, without a hint which part was wrong."""
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
    raise AssertionError("abort always raises")
