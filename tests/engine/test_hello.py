"""What a worker process is by its flags, and what it says first: every mistake is named, before JAX is loaded."""

import socket
import subprocess
import sys

import pytest

from engine.config import Settings
from engine.errors import ConfigError
from engine.hello import Place, alike, hello, open_doors, place_of

FLAGS = {"lane": "p0", "rank": None, "processes": None, "devices": None, "lane_interface": "127.0.0.1"}


def place(tp=4, trusted=False, **flags):
    return place_of(FLAGS | flags, "prefill", tp, trusted)


def test_a_lane_of_one_process_needs_no_more_words():
    assert place() == Place("p0", "prefill", 0, 1, "127.0.0.1", None) and place().local_ids is None


def test_a_rank_of_several_has_its_share_of_the_devices():
    found = place(rank="1", processes="2", devices="4,6")
    assert (found.rank, found.processes, found.devices) == (1, 2, (4, 6))
    assert found.local_ids == (0, 1), "JAX sees its own devices alone, and numbers them from 0"


REFUSED = ["8.8.8.8", "0.0.0.0", "::", "2a00::1", "224.0.0.1", "::ffff:8.8.8.8", "::ffff:0.0.0.0"]
PRIVATE = ["10.1.2.3", "192.168.0.9", "172.16.0.1", "fd00::1", "169.254.1.1", "::ffff:10.0.0.1"]
MISTAKES = [
    ({"processes": "0"}, "processes", "1..4096"),
    ({"processes": "two"}, "processes", "1..4096"),
    ({"processes": "3"}, "processes", "a number that divides tp=4"),
    ({"rank": "-1"}, "rank", "0..4095"),
    ({"rank": "1"}, "rank", "0..0, as there are 1"),
    ({"rank": "2", "processes": "2"}, "rank", "0..1, as there are 2"),
    ({"devices": "0,1"}, "devices", "4 numbers, tp=4 over 1 processes"),
    ({"processes": "2", "devices": "0,1,2"}, "devices", "2 numbers, tp=4 over 2 processes"),
    ({"processes": "2", "devices": "1,1"}, "devices", "each number once"),
    ({"processes": "2", "devices": "0,"}, "devices", "numbers such as 0,1,2,3"),
    ({"processes": "2", "devices": "a,b"}, "devices", "numbers such as 0,1,2,3"),
    ({"processes": "2", "devices": "\u0661,2"}, "devices", "numbers such as 0,1,2,3"),
    ({"lane_interface": None}, "lane_interface", "an IP address of this host"),
    ({"lane_interface": "eth0"}, "lane_interface", "an IP address of this host"),
    ({"lane_interface": "10.0.0.1:80"}, "lane_interface", "an IP address of this host"),
]


@pytest.mark.parametrize("flags, field, words", MISTAKES, ids=str)
def test_every_mistake_is_named(flags, field, words):
    with pytest.raises(ConfigError) as caught:
        place(**flags)
    assert words in str(caught.value) and caught.value.field == field
    assert field in str(caught.value).replace("-", "_").split(":")[0]


@pytest.mark.parametrize("address", REFUSED)
@pytest.mark.parametrize("trusted", [False, True])
def test_public_and_wildcard_interfaces_are_refused_whatever_is_said_of_them(address, trusted):
    with pytest.raises(ConfigError, match="talks without authentication and needs a private one") as caught:
        place(processes="2", lane_interface=address, trusted=trusted)
    assert address not in str(caught.value)


@pytest.mark.parametrize("address", PRIVATE)
def test_off_loopback_a_person_says_that_nobody_else_is_there(address):
    with pytest.raises(ConfigError, match="--trusted-network says that nobody else reaches it"):
        place(processes="2", lane_interface=address)
    assert place(processes="2", lane_interface=address, trusted=True).interface == address
    assert place(processes="1", lane_interface=address).interface == address, "one process opens no door"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_no_word(address):
    assert place(processes="2", lane_interface=address).interface == address


def test_the_first_of_several_opens_a_door_and_finds_a_port_for_the_coordinator():
    doors = open_doors(place(processes="2"))
    with doors.orders:
        assert doors.orders.getsockname()[0] == "127.0.0.1"
        host, port = doors.coordinator.split(":")
        socket.create_server((host, int(port))).close()
    assert open_doors(place(processes="2", rank="1")) is None and open_doors(place()) is None


def test_an_address_of_another_host_is_no_place_to_listen():
    with pytest.raises(ConfigError, match="this host cannot listen there"):
        open_doors(place(processes="2", lane_interface="10.255.255.254", trusted=True))


def test_a_hello_says_who_this_is_and_what_all_must_have_alike():
    leader, settings = place(processes="2"), Settings(max_num_seqs=7)
    doors = open_doors(leader)
    with doors.orders:
        said = hello(leader, settings, doors)
        assert said["orders"] == "{}:{}".format(*doors.orders.getsockname())
    assert (said["event"], said["lane"], said["rank"], said["processes"]) == ("hello", "p0", 0, 2)
    assert said["coordinator"] == doors.coordinator and said["alike"]["max_num_seqs"] == "7"
    follower = hello(place(processes="2", rank="1"), settings, None)
    assert follower["alike"] == said["alike"] and "orders" not in follower and "coordinator" not in follower


def test_versions_and_settings_are_alike_but_for_what_is_of_a_rank():
    assert {"jax", "jaxlib", "numpy", "serac", "python"} == set(alike(Settings()))
    assert alike(Settings(plan_log="/there")) == alike(Settings())
    assert alike(Settings(numerics="invariant")) != alike(Settings())


def test_a_hello_is_said_before_jax_is_loaded():
    code = "import sys; from engine import hello, starter; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
