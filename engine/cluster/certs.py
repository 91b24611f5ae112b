"""The certificates of a cluster: one authority, and a key and certificate for each role that processes have.

    DIR/ca/        ca.pem  key.pem                this key makes new certificates: keep it off the hosts
    DIR/front/     ca.pem  cert.pem  key.pem      serac://CLUSTER/front      each folder goes only to hosts
    DIR/lane/      ca.pem  cert.pem  key.pem      serac://CLUSTER/lane       that have that role
    DIR/operator/  ca.pem  cert.pem  key.pem      serac://CLUSTER/operator

Keys are ECDSA P-256, of mode 600 in folders of mode 700. Who may connect to whom is decided by the role in the URI
(engine/movers/tls.py); names and addresses of hosts stand there too, for tools that look for them. Nothing is ever
overwritten: `renew` puts a new key and certificate in each role's folder and the old folder beside it.

Source: RFC 5280; the role as a URI is the manner of SPIFFE.
"""

import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    x509 = None  # type: ignore[assignment]

from engine.errors import ConfigError, wrong

ROLES = ("front", "lane", "operator")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
CA_DAYS, LEAF_DAYS, WARN_DAYS = 3650, 365, 30
SKEW = timedelta(hours=1)  # clocks of hosts differ: valid from a little before now
USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def init(folder: Path, cluster: str, hosts: Sequence[str], now: datetime) -> list[str]:
    """Make everything in `folder`, which is new or empty; `hosts` are NAME=ADDRESS. Raises ConfigError."""
    _require()
    if not NAME.fullmatch(cluster):
        raise ConfigError(wrong("--cluster", cluster, "a-z, 0-9, dot, dash or underscore, at most 63"))
    names = _names(hosts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"certs: {folder} is not empty, and nothing is overwritten; choose another folder")
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"certs: {folder} cannot be made ({error.strerror})") from None
    key = ec.generate_private_key(ec.SECP256R1())
    ca = _authority(cluster, key, now)
    (folder / "ca").mkdir(mode=0o700)
    _write(folder / "ca" / "ca.pem", _pem(ca), 0o644)
    _write(folder / "ca" / "key.pem", _key_pem(key), 0o600)
    for role in ROLES:
        _issue(folder / role, f"serac://{cluster}/{role}", names, (ca, key), now)
    return show(folder, now)


def renew(folder: Path, now: datetime) -> list[str]:
    """A new key and certificate for each role, with the names of the old one, which stays beside it."""
    _require()
    ca = _read(folder / "ca" / "ca.pem")
    try:
        key = serialization.load_pem_private_key((folder / "ca" / "key.pem").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"certs: {folder / 'ca' / 'key.pem'} cannot be read ({type(error).__name__})") from None
    for role in ROLES:
        old, new = folder / role, folder / f"{role}.new"
        names = _alternatives(_read(old / "cert.pem"))
        uri = next(name.value for name in names if isinstance(name, x509.UniformResourceIdentifier))
        rest = [name for name in names if not isinstance(name, x509.UniformResourceIdentifier)]
        _issue(new, uri, rest, (ca, key), now)
        old.rename(folder / f"{role}.until-{now:%Y%m%d-%H%M%S}")
        new.rename(old)
    return show(folder, now)


def show(folder: Path, now: datetime) -> list[str]:
    """Lines that say what is there and when it ends, and a warning for what ends soon. Raises ConfigError."""
    _require()
    lines, warnings = [], []
    for name in ("ca", *ROLES):
        path = folder / name / ("ca.pem" if name == "ca" else "cert.pem")
        found = _read(path)
        days = (found.not_valid_after_utc - now).days
        spoken = found.subject.rfc4514_string() if name == "ca" else ", ".join(map(_spoken, _alternatives(found)))
        lines.append(f"{name:<9} until {found.not_valid_after_utc:%Y-%m-%d} ({days} days)  {spoken}")
        if days < WARN_DAYS:
            last = "has ended" if days < 0 else f"ends in {days} days"
            change = "make a new authority: serac certs init" if name == "ca" else "serac certs renew"
            warnings.append(f"warning: the certificate of {name} {last}; {change}")
    return lines + warnings


def _names(hosts: Iterable[str]) -> list:
    """The alternative names of hosts, each once."""
    found = {}
    for each in hosts:
        name, _, address = each.partition("=")
        if not NAME.fullmatch(name.lower()) or not address:
            raise ConfigError(wrong("--host", each, "NAME=ADDRESS, such as node1=10.0.0.1"))
        found[name] = x509.DNSName(name)
        try:
            found[address] = x509.IPAddress(ipaddress.ip_address(address))
        except ValueError:
            if not NAME.fullmatch(address.lower()):
                raise ConfigError(wrong("--host", each, "NAME=ADDRESS, such as node1=10.0.0.1")) from None
            found[address] = x509.DNSName(address)
    return list(found.values())


def _authority(cluster: str, key, now: datetime):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"serac {cluster}")])
    made = _builder(name, name, key, now, CA_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(_uses("key_cert_sign", "crl_sign"), critical=True)
    return made.sign(key, hashes.SHA256())


def _issue(folder: Path, uri: str, names: list, authority: tuple, now: datetime) -> None:
    """A key and certificate in a new folder. Raises ConfigError."""
    ca, ca_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"serac {uri.rpartition('/')[2]}")])
    made = _builder(subject, ca.subject, key, now, LEAF_DAYS)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_uses("digital_signature"), True),
        (x509.ExtendedKeyUsage(both), False),
        (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *names]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    ):
        made = made.add_extension(extension, critical=critical)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"certs: {folder} cannot be made ({error.strerror}); take it away first") from None
    _write(folder / "ca.pem", _pem(ca), 0o644)
    _write(folder / "cert.pem", _pem(made.sign(ca_key, hashes.SHA256())), 0o644)
    _write(folder / "key.pem", _key_pem(key), 0o600)


def _builder(subject, issuer, key, now: datetime, days: int):
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - SKEW).not_valid_after(now + timedelta(days=days))
    return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _uses(*wanted: str):
    return x509.KeyUsage(**{name: name in wanted for name in USES})


def _alternatives(certificate) -> list:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise ConfigError("certs: got a certificate without a role; expected one of serac certs init") from None
    return list(found.value)


def _spoken(name) -> str:
    return name.value if isinstance(name, x509.UniformResourceIdentifier) else str(name.value)


def _read(path: Path):
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        words = f"certs: {path} cannot be read ({type(error).__name__}); expected a folder of serac certs init"
        raise ConfigError(words) from None


def _pem(certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key) -> bytes:
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file; whatever the umask, of this mode from its first moment on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)


def _require() -> None:
    if x509 is None:
        expected = "the extra 'certs': pip install 'serac[certs]'"
        raise ConfigError(f"certs: cryptography is not installed; expected {expected}")
