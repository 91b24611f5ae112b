"""From a file to processes with hosts, ranks and devices, and every mistake with its place in the file."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster.reading import of_lanes, parse, read
from engine.cluster.rules import mistakes
from engine.cluster.topology import FrontPlace, Host, Security, Topology, placed
from engine.core.roles import ROLES
from engine.errors import ConfigError
from engine.lanes import LaneSpec

PAIR = """\
[cluster]
name = "pair"
autotune = "/shared/tuned"

[[host]]
name = "h0"
address = "10.0.0.1"
devices = 4
user = "serac"
port = 2222

[[host]]
name = "h1"
address = "10.0.0.2"
devices = [0, 2, 4, 6]

[[lane]]
name = "p0"
role = "prefill"
mesh = "tp=4"
hosts = ["h1", "h0"]
devices_per_host = 2

[[lane]]
name = "d1"
role = "decode"
mesh = 2
hosts = ["h1"]

[front]
address = "10.0.0.1:50053"
port = 50061

[security]
certs = "/etc/serac/certs"
trusted_network = true

[serve]
model = "/models/a"
numerics = "invariant"
max_num_seqs = 16
"""


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "pair.toml")
    return str(caught.value)


def test_a_file_names_hosts_lanes_front_security_and_settings():
    made = parse(PAIR, "pair.toml")
    assert made.hosts == (
        Host("h0", "10.0.0.1", (0, 1, 2, 3), user="serac", port=2222),
        Host("h1", "10.0.0.2", (0, 2, 4, 6)),
    )
    assert made.lanes == (LaneSpec("p0", "prefill", 4, ("h1", "h0")), LaneSpec("d1", "decode", 2, ("h1",)))
    assert made.front == FrontPlace(address="10.0.0.1:50053", port=50061)
    assert made.security == Security(certs=Path("/etc/serac/certs"), trusted_network=True)
    assert made.autotune == Path("/shared/tuned")
    assert (made.settings.port, made.settings.numerics, made.settings.max_num_seqs) == (50061, "invariant", 16)


def test_ranks_follow_the_order_of_hosts_and_each_takes_the_next_devices_there():
    slots = [(*each.slot, each.host.name, each.devices) for each in placed(parse(PAIR, "pair.toml"))]
    assert slots == [("p0", 0, "h1", (0, 2)), ("p0", 1, "h0", (0, 1)), ("d1", 0, "h1", (4, 6))]


MISTAKES = [
    ('name = "pair"', 'nme = "pair"', "2:1: nme: unknown key of cluster; did you mean name?"),
    ('name = "pair"', 'name = "Pair"', "2:1: name: got 'Pair'; expected a small letter"),
    ("[front]", "[frnt]", "30:2: frnt: unknown table; did you mean front?"),
    ("devices = 4", "devices = 0", "8:1: devices: got 0; expected a count in 1..1024"),
    ("devices = 4", "devices = true", "8:1: devices: got True; expected a count"),
    ("[0, 2, 4, 6]", "[0, 2, 2]", "15:1: devices: got [0, 2, 2]; expected a count > 0 or numbers >= 0, each once"),
    ("[0, 2, 4, 6]", "[0, -2]", "15:1: devices: got [0, -2]; expected"),
    (
        "[0, 2, 4, 6]",
        "[0, 2]",
        "28:1: hosts: h1 is over-subscribed: rank 0 of d1 takes 2 devices, and 0 of its 2 are",
    ),
    ("port = 2222", "port = 70000", "10:1: port: got '70000'; expected a port"),
    ("10.0.0.2", "10.0.0.299", "14:1: address: got '10.0.0.299'; expected an IP address"),
    ("10.0.0.2", "-oProxyCommand=x", "14:1: address: got '-oProxyCommand=x'; expected an IP address"),
    ("10.0.0.2", "10.0.0.1", "15:1: devices: 0 of this address is h0's already"),
    (
        "10.0.0.2",
        "8.8.8.8",
        "21:1: hosts: p0 spans processes, whose talk knows no passwords; the address of h1 must",
    ),
    ("10.0.0.2", "127.0.0.1", "21:1: hosts: p0 spans h0 and a loopback address, which those cannot reach"),
    (
        "10.0.0.2",
        "0.0.0.0",
        "21:1: hosts: p0 spans processes, whose talk knows no passwords; the address of h1 must",
    ),
    ('name = "h1"', 'name = "h0"', "13:1: name: got 'h0'; expected one that no other host has"),
    ('name = "d1"', 'name = "p0"', "25:1: name: got 'p0'; expected one that no other lane has"),
    ('hosts = ["h1"]', 'hosts = ["h2"]', "28:1: hosts: got 'h2'; expected one of h0, h1"),
    ('hosts = ["h1"]', "hosts = []", "28:1: hosts: got []; expected names of hosts, one a process"),
    ('hosts = ["h1"]', "hosts = 3", "28:1: hosts: got 3; expected a list of names of hosts"),
    ('hosts = ["h1"]', "", "24:3: hosts: got none; expected it in each [[lane]]"),
    ("mesh = 2", 'mesh = "dp=2"', "27:1: mesh: got 'dp=2'; expected tp=N, or N, a number of devices"),
    ("tp=4", "tp=3", "22:1: devices_per_host: got 2 on 2 hosts; expected 3 together, as mesh says"),
    (
        "devices_per_host = 2",
        "devices_per_host = 4",
        "22:1: devices_per_host: got 4 on 2 hosts; expected 4 together",
    ),
    ('"prefill"', '"prefil"', "19:1: role: got 'prefil'; expected one of prefill, decode, both"),
    ('"prefill"', '"decode"', "19:1: role: got decode lanes only; expected at least one of prefill or both"),
    ('"decode"', '"prefill"', "19:1: role: got prefill lanes only; expected at least one of decode or both"),
    ("10.0.0.1:50053", "10.0.0.1", "31:1: address: got '10.0.0.1'; expected HOST:PORT"),
    ("10.0.0.1:50053", "127.0.0.1:50053", "31:1: address: got one of loopback, which h0 cannot reach"),
    ("10.0.0.1:50053", "0.0.0.0:50053", "31:1: address: got any; expected the one where every host reaches"),
    (
        'certs = "/etc/serac/certs"',
        "",
        "31:1: address: got one that is not loopback, without TLS between processes",
    ),
    (
        "trusted_network = true",
        "",
        "21:1: hosts: p0 would talk without TLS between h1, h0; trusted_network = true in",
    ),
    ("numerics", "nmerics", "40:1: nmerics: unknown key of serve; did you mean numerics?"),
    ("numerics", "mesh", "40:1: mesh: got it in [serve]; expected [[lane]]"),
    ('"invariant"', '"exact"', "40:1: numerics: got 'exact'; expected one of fast, invariant"),
    ('"invariant"', "[1]", "40:1: numerics: got a list; expected one of fast, invariant"),
    ("port = 50061", 'port = 50061\non = "h7"', "33:1: on: got 'h7'; expected one of h0, h1"),
    ("port = 50061", "port = ", "32:8: Invalid value"),
]


@pytest.mark.parametrize(("was", "now", "words"), MISTAKES, ids=[f"{was} -> {now}" for was, now, _ in MISTAKES])
def test_a_mistake_is_named_with_its_place(was, now, words):
    assert was in PAIR
    assert refused(PAIR.replace(was, now, 1)).startswith(f"pair.toml:{words}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "x.toml:1:1: host: got none; expected [[host]] with name, address and devices"),
        ("host = 3", "x.toml:1:1: host: got a single table or value; expected tables [[host]]"),
        ("[[front]]", "x.toml:1:3: front: got [{}]; expected one table [front]"),
        ("[[host]]\nname = 'a'", "x.toml:1:3: devices: got none; expected it in each [[host]]"),
        (
            "[[host]]\nname = 'a'\ndevices = 1",
            "x.toml:1:1: lane: got none; expected [[lane]] with name, role, mesh and",
        ),
    ],
)
def test_what_is_left_out_is_named(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.toml")
    assert str(caught.value).startswith(words)


def test_a_file_that_cannot_be_read_or_is_no_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "bytes.toml")


def test_the_lanes_of_serve_are_a_cluster_of_this_machine():
    made = of_lanes("prefill:tp=2, decode:tp=1", {"model": "embedded"})
    assert [(*each.slot, each.host.address, each.devices) for each in placed(made)] == [
        ("p0", 0, "127.0.0.1", (0, 1)),
        ("d1", 0, "127.0.0.1", (2,)),
    ]
    assert made.settings.model == "embedded" and not list(mistakes(made))
    with pytest.raises(ConfigError, match="lanes: got"):
        of_lanes("prefil:tp=2")


@st.composite
def clusters(draw: st.DrawFn) -> Topology:
    """A cluster that can be placed: hosts with as many devices as lanes take, and some more."""
    count = draw(st.integers(1, 5))
    names = [f"h{index}" for index in range(count)]
    lanes = [LaneSpec("b0", "both", 1, (names[0],))]
    taken = dict.fromkeys(names, 0)
    taken[names[0]] = 1
    for index in range(draw(st.integers(0, 6))):
        hosts = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
        share = draw(st.integers(1, 4))
        lanes.append(LaneSpec(f"l{index}", draw(st.sampled_from(ROLES)), share * len(hosts), tuple(hosts)))
        for host in hosts:
            taken[host] += share
    hosts = []
    for index, (name, least) in enumerate(taken.items()):
        spare = draw(st.integers(0 if least else 1, 3))
        numbers = draw(st.lists(st.integers(0, 99), min_size=least + spare, max_size=least + spare, unique=True))
        hosts.append(Host(name, f"10.0.0.{index + 1}", tuple(numbers)))
    security = Security(certs=Path("/c"), trusted_network=True)
    return Topology(tuple(hosts), tuple(lanes), front=FrontPlace(address="10.0.0.1:5"), security=security)


def written(made: Topology) -> str:
    """The file that says the same."""
    lines = [f'[cluster]\nname = "{made.name}"']
    for host in made.hosts:
        lines += [f'[[host]]\nname = "{host.name}"\naddress = "{host.address}"\ndevices = {list(host.devices)}']
    for lane in made.lanes:
        hosts = ", ".join(f'"{name}"' for name in lane.hosts)
        lines += [f'[[lane]]\nname = "{lane.name}"\nrole = "{lane.role}"\nmesh = {lane.tp}\nhosts = [{hosts}]']
    lines += [f'[front]\naddress = "{made.front.address}"', '[security]\ncerts = "/c"\ntrusted_network = true']
    return "\n".join(lines)


@settings(deadline=None, max_examples=60)
@given(clusters())
def test_every_device_is_given_once_and_every_rank_has_its_share(made):
    assert not list(mistakes(made))
    found = placed(made)
    assert [each.slot for each in found] == [(ln.name, k) for ln in made.lanes for k in range(len(ln.hosts))]
    given_out = [(each.host.name, device) for each in found for device in each.devices]
    assert len(set(given_out)) == len(given_out) == sum(lane.tp for lane in made.lanes)
    for each in found:
        assert each.host.name == each.lane.hosts[each.rank]
        assert len(each.devices) * len(each.lane.hosts) == each.lane.tp and set(each.devices) <= set(
            each.host.devices
        )
    assert parse(written(made), "x.toml") == made


@settings(deadline=None, max_examples=60)
@given(clusters(), st.data())
def test_a_host_with_a_device_too_few_is_over_subscribed(made, data):
    busy = [host for host in made.hosts if any(host.name in lane.hosts for lane in made.lanes)]
    short = data.draw(st.sampled_from(busy))
    taken = sum(lane.tp // len(lane.hosts) * lane.hosts.count(short.name) for lane in made.lanes)
    left = replace(short, devices=short.devices[: taken - 1])
    text = written(replace(made, hosts=tuple(left if host is short else host for host in made.hosts)))
    with pytest.raises(ConfigError, match="over-subscribed|got \\[\\]"):
        parse(text, "x.toml")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(PAIR)), st.integers(0, 40), st.text(max_size=8))
def test_a_file_with_a_hole_or_a_splash_is_read_or_refused_by_name(start, length, splash):
    """Whatever stands in it, the answer is a cluster or a ConfigError with a place: no other error."""
    text = PAIR[:start] + splash + PAIR[start + length :]
    try:
        placed(parse(text, "pair.toml"))
    except ConfigError as error:
        assert str(error).startswith("pair.toml:")
