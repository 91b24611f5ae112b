"""What a lane is for: the words that say where a sequence is placed."""

from typing import Literal

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
