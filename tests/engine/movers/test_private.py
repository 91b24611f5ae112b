import os

import pytest

from engine.movers.private import private

ME, MINE = os.geteuid(), os.getegid()


@pytest.mark.parametrize(
    ("mode", "owner", "group", "fits"),
    [
        (0o600, ME, MINE, True),
        (0o400, ME, MINE, True),
        (0o640, ME, MINE, False),  # our group may hold others
        (0o604, ME, MINE, False),
        (0o440, ME + 1, MINE, True),  # a mounted Secret
        (0o440, ME + 1, MINE + 77777, False),
        (0o460, ME + 1, MINE, False),
        (0o444, ME + 1, MINE, False),
    ],
)
def test_a_key_is_for_its_owner_or_for_the_group_of_a_mounted_secret(mode, owner, group, fits):
    assert private(os.stat_result((0o100000 | mode, 0, 0, 1, owner, group, 0, 0, 0, 0))) is fits
