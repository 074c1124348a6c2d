"""What a published day has in quarantine, judged anew: what is good by now is added to the day.

`behaviors/dt=D/replay-NNN/` holds the rows that are added and `quarantine/dt=D/replay-NNN/` those that are still
rejected, with result and page for the day as a whole. Nothing that was written before changes. Who reads a day reads
its partition and what replays added to it; each raw row is in one of these or in the last quarantine.

Where the raw data are the same, rows are known by file and row, and those in the last quarantine are judged. Where they
were landed again, those are judged that were not published, and each that was published must be there still.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import Config
from encode.data.daily import Addition, DayReport, identity_of, publish
from encode.data.judging import COLUMNS, Bools, Select, columns_of, judge_rows
from encode.data.parquet import read_parquet
from encode.data.partitions import REPLAY
from encode.data.profiles import Past
from encode.data.raw_days import RawDay
from encode.data.readers import RawBatch
from encode.data.verdicts import Verdict
from encode.errors import DataError
from encode.outputs import Manifest, read_manifest, read_part
from encode.schema import BEHAVIORS
from encode.storage import Storage


def replay_raw_day(
    storage: Storage, raw: RawDay, config: Config, past: Past, prefixes: Sequence[str], last: Manifest
) -> DayReport:
    """Add to a published day what its quarantine holds and today's data and settings accept.

    Args:
        storage: of the log.
        raw: the day.
        config: all settings.
        past: the days before it.
        prefixes: what is published of the day, in order.
        last: manifest of the last of them.

    Raises:
        ArtifactError: a file of the day is missing or damaged.
        DataError: rows that were published or rejected are no longer in the raw data.
        QualityError: the day is refused; what was published before stays.
    """
    published = _published(storage, prefixes)
    same = last.inputs.items() >= identity_of(raw, config)["inputs"].items()
    if same:
        select = _rejected_before(storage, raw, last.details["quarantine"])
    else:
        select = _not_published(storage, raw, published)
    judged = judge_rows(storage, raw, config, published, select)
    addition = Addition(f"/{REPLAY}{len(prefixes):03d}", prefixes[-1], last.digest())
    return publish(storage, raw, judged, config, past, addition)


def _published(storage: Storage, prefixes: Sequence[str]) -> Verdict:
    """Return the rows of a day that are behaviors."""
    tables = [BEHAVIORS.empty_table()]
    for prefix in prefixes:
        manifest = read_manifest(storage, prefix)
        parts = manifest.parts if manifest else ()
        tables += [read_parquet(read_part(storage, prefix, part)).cast(BEHAVIORS) for part in parts]
    table = pa.concat_tables(tables)
    names = table["behavior"].cast(pa.string()).combine_chunks()
    user, item, category, timestamp = (table[name].to_numpy() for name in COLUMNS)
    return Verdict(user, item, category, names, timestamp, np.zeros(table.num_rows, np.int8))


def _rejected_before(storage: Storage, raw: RawDay, quarantine: str) -> Select:
    """Choose the rows that a quarantine holds."""
    manifest = read_manifest(storage, quarantine)
    if manifest is None:
        raise DataError(
            f"{storage.uri}/{quarantine}: the quarantine of {raw.day} is gone, so what was rejected is not known; "
            f"remove behaviors/dt={raw.day} and quarantine/dt={raw.day} and validate the day anew"
        )
    (part,) = (part for part in manifest.parts if part.name.endswith(".parquet"))
    held = read_parquet(read_part(storage, quarantine, part))

    def select(batches: list[RawBatch], verdicts: list[Verdict]) -> list[Bools]:
        chosen = []
        for batch, verdict in zip(batches, verdicts, strict=True):
            rows = held.filter(pc.equal(held["file"], batch.file))["row"].to_numpy()
            chosen.append(np.isin(np.arange(len(verdict.reason)) + batch.first_row, rows))
        if (found := sum(int(one.sum()) for one in chosen)) != held.num_rows:
            raise DataError(
                f"{storage.uri}/{quarantine}: found {found} of its {held.num_rows} rows in the raw data, read as "
                f"source says now; remove behaviors/dt={raw.day} and quarantine/dt={raw.day} and validate the day anew"
            )
        return chosen

    return select


def _not_published(storage: Storage, raw: RawDay, published: Verdict) -> Select:
    """Choose all rows but one equal row for each that was published."""

    def select(_batches: list[RawBatch], verdicts: list[Verdict]) -> list[Bools]:
        columns = columns_of([published, *verdicts])
        count = len(published.reason)
        order = np.lexsort(columns)  # stable: of equal rows those that were published come first
        new = np.ones(len(order), bool)
        new[1:] = np.logical_or.reduce([column[order[1:]] != column[order[:-1]] for column in columns])
        group = np.cumsum(new) - 1
        wanted = np.bincount(group[order < count], minlength=group.max(initial=-1) + 1)
        place = np.arange(len(order)) - np.flatnonzero(new)[group] - wanted[group]
        matched = np.zeros(len(order), bool)
        matched[order] = (place >= 0) & (place < wanted[group])
        if (found := int(matched.sum())) != count:
            raise DataError(
                f"{storage.uri}/raw/dt={raw.day}: landed again, and {count - found} of the {count} rows that were "
                "published are not in it, read as source and validation say now; a replay only adds: remove "
                f"behaviors/dt={raw.day} and quarantine/dt={raw.day} and validate the day anew"
            )
        chosen, done = [], count
        for verdict in verdicts:
            accepted = verdict.reason == 0
            one = np.ones(len(accepted), bool)
            one[accepted] = ~matched[done : done + accepted.sum()]
            chosen.append(one)
            done += int(accepted.sum())
        return chosen

    return select
