"""Which users a serving process holds. Apart from what holds them, so that a wrong one is refused at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from encode.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The part of the users that one replica holds: every `count`-th bucket of a snapshot, from `place` on."""

    place: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `PLACE/COUNT`, as in 0/4.

        Raises:
            ConfigError: it is not of this form, or the place is not below the count.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or int(found[1]) >= int(found[2]):
            raise ConfigError(f"shard: found {text!r}, expected PLACE/COUNT with places from 0 on, as 0/4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.place}/{self.count}"


ALL_USERS = Shard()
