"""Certificates that a starter sends: used, renewed, and left on no disk."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.certificates import FILES, given, read

pytest.importorskip("cryptography", reason="the extra certs is not installed")

from engine.cluster import certs  # noqa: E402


class Heard:
    """Of a Starter, what certificates need."""

    on_tls = None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    certs.init(tmp_path / "certs", "lab", [], datetime.now(UTC))
    return tmp_path


def test_what_was_sent_is_used_and_stays_on_no_disk(folder):
    starter = Heard()
    tls = given(starter, read(folder / "certs" / "lane"), None)
    assert tls.role == "lane" and list((folder / "tmp").iterdir()) == []
    before = tls.ends_s
    certs.renew(folder / "certs", datetime.now(UTC))
    starter.on_tls(read(folder / "certs" / "lane"))
    assert tls.ends_s >= before and list((folder / "tmp").iterdir()) == []
    starter.on_tls(dict.fromkeys(FILES, "nonsense"))
    assert tls.role == "lane", "the old ones go on"


def test_without_any_there_is_no_tls(folder):
    assert given(Heard(), None, None) is None


def test_those_of_a_host_go_before_what_is_sent(folder):
    own = given(Heard(), read(folder / "certs" / "lane"), None)
    assert given(Heard(), None, own) is own
    assert Path(folder / "certs" / "lane" / "key.pem").stat().st_mode & 0o777 == 0o600
