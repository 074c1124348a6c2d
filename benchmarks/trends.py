"""How often days warn beside those before them, and which changes of a day are caught.

    python -m benchmarks.trends behaviors.parquet

The file has the columns of a behavior. Every day is compared with the days before it as it is, then changed: cut, its
hours shifted, a category taken out, its users numbered anew. Printed are the days that warn, and of each change how
many of the days that can be compared warn for what the change touches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from encode.config import TrendsConfig
from encode.data.profiles import Profile, profile_of
from encode.data.trends import Measure, compare
from encode.data.verdicts import Verdict
from encode.schema import SECONDS_PER_DAY, day_of

Day = dict[str, npt.NDArray[np.int64]]
COLUMNS = ("user_id", "item_id", "category_id", "timestamp")
CONFIG = TrendsConfig()


def keep(day: Day, kept: npt.NDArray[np.bool_]) -> Day:
    """Return some rows of a day."""
    return {name: values[kept] for name, values in day.items()}


def shifted(day: Day, hours: int) -> Day:
    """Return a day whose clock is wrong by some hours."""
    start = day["timestamp"] // SECONDS_PER_DAY * SECONDS_PER_DAY
    return day | {"timestamp": start + (day["timestamp"] + hours * 3600) % SECONDS_PER_DAY}


def changes(ranked: npt.NDArray[np.int64]) -> dict[str, tuple[Callable[[Day], Day], set[str]]]:
    """Return each change, and the measures that are to say so; `ranked` are the categories, most frequent first."""
    hours = {"PSI of hours"}
    return {
        "the second half of its rows missing": (
            lambda d: keep(d, d["timestamp"] <= np.median(d["timestamp"])),
            {"rows", "users", *hours},
        ),
        "every other row missing": (lambda d: keep(d, np.arange(len(d["user_id"])) % 2 == 0), {"rows", "users"}),
        "half of its users missing": (lambda d: keep(d, d["user_id"] % 2 == 0), {"rows", "users"}),
        **{f"hours shifted by {h}": ((lambda d, h=h: shifted(d, h)), hours) for h in (1, 2, 3, 8)},
        **{
            f"category {rank} by rows missing": (
                (lambda d, gone=ranked[rank - 1]: keep(d, d["category_id"] != gone)),
                {"vanished categories", "PSI of categories"},
            )
            for rank in (1, 10, 30)
        },
        "other user ids": (lambda d: d | {"user_id": d["user_id"] + 10**12}, {"share of users not seen before"}),
        "a tenth without category": (
            lambda d: d | {"category_id": np.where(np.arange(len(d["user_id"])) % 10, d["category_id"], 0)},
            {"share of rows without a category"},
        ),
    }


def profile(day: Day) -> Profile:
    """Sum up a day of one behavior."""
    count = len(day["user_id"])
    user, item, category, timestamp = (day[name] for name in COLUMNS)
    return profile_of(
        [Verdict(user, item, category, pa.array(["pv"] * count, pa.string()), timestamp, np.zeros(count, np.int8))]
    )


def warnings(day: date, today: Profile, known: dict[date, Profile]) -> list[Measure]:
    """Return what is unusual about a day."""
    past = {one: known[one] for one in sorted(one for one in known if one < day)[-CONFIG.days :]}
    return [
        one
        for one in compare(day, today, past, CONFIG)
        if one.severity == "warning" and not (one.low or 0) <= one.value <= (np.inf if one.high is None else one.high)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="Parquet file of behaviors")
    table = pq.read_table(parser.parse_args().log, columns=list(COLUMNS)).sort_by("timestamp")
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    number = columns["timestamp"] // SECONDS_PER_DAY
    found, starts = np.unique(number, return_index=True)
    ends = np.append(starts[1:], len(number))
    days = {
        day_of(int(one) * SECONDS_PER_DAY): {name: values[start:end] for name, values in columns.items()}
        for one, start, end in zip(found, starts, ends, strict=True)
    }
    known = {day: profile(rows) for day, rows in days.items()}
    said = {day: warnings(day, today, known) for day, today in known.items()}
    for day, measures in said.items():
        if measures:
            print(f"{day:%Y-%m-%d %a}  {', '.join(f'{one.name} {one.value:g}' for one in measures)}")
    print(f"{sum(bool(one) for one in said.values())} of {len(days)} days warn")
    ids, counts = np.unique(columns["category_id"], return_counts=True)
    compared = list(days)[CONFIG.min_days :]
    for name, (change, expected) in changes(ids[np.argsort(-counts)]).items():
        caught = sum(
            any(one.name in expected for one in warnings(day, profile(change(days[day])), known)) for day in compared
        )
        print(f"{name:<38} caught on {caught} of {len(compared)} days", flush=True)


if __name__ == "__main__":
    main()
