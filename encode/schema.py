"""What passes between the steps: columns, reserved ids, days and fingerprints.

Column meanings and units are those of the data contracts: ids are positive int64, 0 pads, timestamps are
UTC seconds. Nothing here reads or writes; `encode.storage` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.errors import ConfigError

PADDING = 0
"""Index and id that stand for "nothing here"; never a real user, item or category."""
UNKNOWN = 1
"""Index of an item or category outside the trained vocabulary."""

SECONDS_PER_DAY = 86_400

BEHAVIORS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("behavior", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
    ]
)
"""One row a behavior: who, what, of which category (0 = none), how (pv, cart, buy, ...), when (UTC seconds)."""

QUARANTINE = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("category_id", pa.string()),
        pa.field("behavior", pa.string()),
        pa.field("timestamp", pa.string()),
    ]
)
"""A rejected row, its values as text exactly as they were read, and why it was rejected."""

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("category", pa.string()),
    ]
)
"""Names of items for people to read; optional, never used by the model."""

HISTORIES = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.list_(pa.int64()), nullable=False),
        pa.field("category_id", pa.list_(pa.int64()), nullable=False),
        pa.field("timestamp", pa.list_(pa.int64()), nullable=False),
    ]
)
"""One row a user: all behaviors before some day, oldest first."""


MOST_TIMES = 2**16 - 1
"""What is counted of a remembered item at most."""


def interests_schema(projected_dim: int, embedding_dim: int) -> pa.Schema:
    """One row a user: the interests of that user and the most recent behaviors.

    The lists `center` (mean key, P), `variance` (of the keys, P), `value` (D), `size` (behaviors in the cluster),
    `newest` (UTC seconds) and `top_items` (most frequent item ids, best first) run in parallel, largest interest first.
    So do `item_index` (the user's most frequent items by their index in the space's vocabulary, ascending) and
    `item_times`.
    """
    vector = pa.list_(pa.float32(), projected_dim), pa.list_(pa.float32(), embedding_dim)
    return pa.schema(
        [
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("num_behaviors", pa.int64(), nullable=False),
            pa.field("center", pa.list_(vector[0]), nullable=False),
            pa.field("variance", pa.list_(vector[0]), nullable=False),
            pa.field("value", pa.list_(vector[1]), nullable=False),
            pa.field("size", pa.list_(pa.int64()), nullable=False),
            pa.field("newest", pa.list_(pa.int64()), nullable=False),
            pa.field("top_items", pa.list_(pa.list_(pa.int64())), nullable=False),
            pa.field("item_index", pa.list_(pa.int32()), nullable=False),
            pa.field("item_times", pa.list_(pa.uint16()), nullable=False),
            pa.field("recent_item_id", pa.list_(pa.int64()), nullable=False),
            pa.field("recent_category_id", pa.list_(pa.int64()), nullable=False),
            pa.field("recent_timestamp", pa.list_(pa.int64()), nullable=False),
        ]
    )


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun, as `1 day` and `2,000 days`; of a noun of several words the last one counts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def probability_in_digits(value: float) -> str:
    """Return a probability with four digits; `> 0.9999` and `< 0.0001` where these would make it certain."""
    if value > 0.9999:
        return "> 0.9999"
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


# --- days ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """The days [start, end) that a run covers, in UTC. `end` is also the `as_of` of what it makes."""

    start: date
    end: date

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ConfigError(
                f"window: start {self.start} is not before end {self.end}; expected at least one day, "
                "the end being the first day that is not part of it"
            )

    def __str__(self) -> str:
        return f"{self.start}..{self.end}"

    def in_words(self) -> str:
        """Return the first day and the last, both of them in it, and how many they are."""
        days = (self.end - self.start).days
        return f"{self.start} to {self.end - timedelta(days=1)} ({days:,} days)" if days > 1 else str(self.start)

    def days(self) -> Iterator[date]:
        """Yield each day, oldest first."""
        for offset in range((self.end - self.start).days):
            yield self.start + timedelta(days=offset)


def resolve_window(
    start: str | None = None,
    end: str | None = None,
    partition_key: str | None = None,
    events: Sequence[Mapping[str, str]] = (),
    interval: tuple[datetime | None, datetime | None] | None = None,
) -> Window:
    """Find the days of a run: explicit days, else the partition, else what triggered it, else the scheduled interval.

    The wall clock is never asked. An explicit `start` alone means that one day, an explicit `end` alone the day
    before it. A partition key is `YYYY-MM-DD` or `YYYY-MM-DD..YYYY-MM-DD` (end exclusive). Events that triggered the
    run carry `start` and `end` of what was made, and the run covers them all. A scheduled interval must have a
    length: Airflow gives runs of a plain cron string an interval of zero length.

    Raises:
        ConfigError: nothing says which days are meant, or what says so is not a day.
    """
    if start or end:
        first = parse_day(start, "start") if start else parse_day(str(end), "end") - timedelta(days=1)
        return Window(first, parse_day(end, "end") if end else first + timedelta(days=1))
    if partition_key:
        left, _, right = partition_key.partition("..")
        first = parse_day(left, "partition key")
        return Window(first, parse_day(right, "partition key") if right else first + timedelta(days=1))
    made = [resolve_window(event.get("start"), event.get("end")) for event in events]
    if made:
        return Window(min(window.start for window in made), max(window.end for window in made))
    if interval and interval[0] and interval[1] and interval[0] < interval[1]:
        return Window(interval[0].astimezone(UTC).date(), interval[1].astimezone(UTC).date())
    raise ConfigError(
        "window: no days given: found no start or end, partition key, asset event or scheduled interval with a length; "
        "set start and end, or as_of (YYYY-MM-DD, ends exclusive), when you trigger the run"
    )


def parse_day(text: str, field: str) -> date:
    """Read `YYYY-MM-DD`.

    Raises:
        ConfigError: names `field` and the text. The first and the last day that there are need a day beside them.
    """
    try:
        day = date.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(f"{field}: found {text!r}, expected a day as YYYY-MM-DD") from None
    if not date.min < day < date.max:
        raise ConfigError(f"{field}: found {text!r}, expected a day after {date.min} and before {date.max}")
    return day


def day_start(day: date) -> int:
    """Return the first second of `day`, UTC."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def day_of(timestamp: int) -> date:
    """Return the UTC day of a timestamp in seconds."""
    return datetime.fromtimestamp(timestamp, UTC).date()


def days_in_words(days: Iterable[date], most: int = 5) -> str:
    """Return ascending days as text, those in a row as `first to last`; of many such rows the first few."""
    rows: list[list[date]] = []
    for day in days:
        if rows and (day - rows[-1][-1]).days == 1:
            rows[-1].append(day)
        else:
            rows.append([day])
    told = ", ".join(" to ".join(dict.fromkeys(map(str, (row[0], row[-1])))) for row in rows[:most]) or "none"
    more = sum(map(len, rows[most:]))
    return f"{told} and {number_of(more, 'day')} more" if more else told


# --- identity ----------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of `value`: sorted keys, no spaces, UTF-8, NaN refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Mapping[str, Any]) -> str:
    """Return the digest of the canonical JSON of `value`: equal for equal content, whatever the key order."""
    return digest(canonical_json(value))


def bucket_of(user_id: npt.NDArray[np.int64], num_buckets: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each user: splitmix64 of the id modulo `num_buckets`, so that ranges spread evenly."""
    x = user_id.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(num_buckets)).astype(np.int64)
