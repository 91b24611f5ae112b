"""The certificates of a cluster: what is made, who may read it, what is never overwritten, what ends soon."""

import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from engine import cli
from engine.cluster import certs
from engine.errors import ConfigError

NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "certs"
    certs.init(made, "prod", ["node1=10.0.0.1", "Node2=node2.example"], NOW)
    return made


def read(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("role", certs.ROLES)
def test_each_role_has_a_certificate_for_both_sides_that_the_authority_signed(folder, role):
    ca, found = read(folder / "ca" / "ca.pem"), read(folder / role / "cert.pem")
    found.verify_directly_issued_by(ca)
    assert (folder / role / "ca.pem").read_bytes() == (folder / "ca" / "ca.pem").read_bytes()
    get = found.extensions.get_extension_for_class
    names = get(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"serac://prod/{role}"]
    assert names.get_values_for_type(x509.DNSName) == ["node1", "Node2", "node2.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    assert len(list(get(x509.ExtendedKeyUsage).value)) == 2 and not get(x509.BasicConstraints).value.ca
    key = serialization.load_pem_private_key((folder / role / "key.pem").read_bytes(), None)
    assert key.public_key() == found.public_key() and key.curve.name == "secp256r1"
    assert 364 <= (found.not_valid_after_utc - NOW).days <= 365 and found.not_valid_before_utc < NOW
    assert 3649 <= (ca.not_valid_after_utc - NOW).days <= 3650


def test_keys_are_their_owners_alone_and_that_of_the_authority_stands_apart(folder):
    modes = {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert {mode for name, mode in modes.items() if name.endswith("key.pem")} == {0o600}
    assert (
        {mode for name, mode in modes.items() if "." not in name}
        == {0o700}
        == {stat.S_IMODE(folder.stat().st_mode)}
    )
    assert sorted(name for name in modes if name.startswith("lane/")) == [
        "lane/ca.pem",
        "lane/cert.pem",
        "lane/key.pem",
    ]
    keys = {path.read_bytes() for path in folder.rglob("key.pem")}
    assert len(keys) == 4, "a key stands twice"


def test_nothing_is_overwritten(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*.pem")}
    with pytest.raises(ConfigError, match="is not empty, and nothing is overwritten"):
        certs.init(folder, "prod", [], NOW)
    (folder / "lane.new").mkdir()
    with pytest.raises(ConfigError, match="take it away first"):
        certs.renew(folder, NOW)
    (folder / "lane.new").rmdir()
    later = NOW + timedelta(days=340)
    lines = certs.renew(folder, later)
    assert not [line for line in lines if "warning" in line]
    now = {path.read_bytes() for path in folder.rglob("*.pem")}
    assert set(before.values()) <= now, "what stood there is gone"
    assert read(folder / "lane" / "cert.pem").not_valid_after_utc > later + timedelta(days=364)
    assert certs.show(folder, later)[2].endswith("serac://prod/lane, node1, 10.0.0.1, Node2, node2.example")


def test_what_ends_within_a_month_is_named(folder):
    assert not [line for line in certs.show(folder, NOW + timedelta(days=334)) if "warning" in line]
    lines = certs.show(folder, NOW + timedelta(days=337))
    assert "warning: the certificate of lane ends in 27 days; serac certs renew" in lines
    assert any("of front has ended" in line for line in certs.show(folder, NOW + timedelta(days=370)))


@pytest.mark.parametrize("host", ["node1", "=10.0.0.1", "node 1=10.0.0.1", "node1=", "node1=10.0.0.1; x"])
def test_a_host_has_a_name_and_an_address(host, tmp_path):
    with pytest.raises(ConfigError, match="--host"):
        certs.init(tmp_path / "certs", "prod", [host], NOW)
    with pytest.raises(ConfigError, match="--cluster"):
        certs.init(tmp_path / "certs", "prod/lane", [], NOW)
    assert not (tmp_path / "certs").exists()


def test_the_command_makes_shows_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    folder = str(tmp_path / "certs")
    assert cli.main(["certs", "init", folder, "--cluster=c", "--host=a=10.0.0.1", "--host=b=10.0.0.2"]) == 0
    made = capsys.readouterr().out
    assert "serac://c/lane, a, 10.0.0.1, b, 10.0.0.2" in made and "PRIVATE" not in made
    assert cli.main(["certs", "show", folder]) == 0 and capsys.readouterr().out == made
    assert cli.main(["certs", "init", folder]) == 2
    assert cli.main(["certs", "show", str(tmp_path)]) == 2
    assert "expected a folder of serac certs init" in capsys.readouterr().err
    monkeypatch.setattr(certs, "x509", None)
    assert cli.main(["certs", "show", folder]) == 2
    assert "pip install 'serac[certs]'" in capsys.readouterr().err
