"""All rows of a day with their verdicts: what decides which become behaviors and which go to quarantine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.config import Config
from encode.data.raw_days import RawDay, read_raw_day
from encode.data.readers import RAW_COLUMNS, RawBatch
from encode.data.verdicts import REASONS, Verdict, count_reasons, duplicates, judge, to_quarantine
from encode.schema import QUARANTINE, number_of
from encode.storage import Storage

COLUMNS = ("user_id", "item_id", "category_id", "timestamp")
_DUPLICATE = REASONS.index("duplicate")
Bools = npt.NDArray[np.bool_]
Select = Callable[[list[RawBatch], list[Verdict]], list[Bools]]


@dataclass(frozen=True)
class Judged:
    """The rows of a day: those that are judged now, and those that were published before."""

    verdicts: list[Verdict]
    quarantined: pa.Table
    """Rows of `schema.QUARANTINE`: those of `verdicts` that have a reason."""
    hints: tuple[str, ...]
    """A line for each file that mixes time units."""
    published: Verdict | None = None

    def every(self) -> list[Verdict]:
        """Return the verdicts of all rows of the day."""
        return [*([self.published] if self.published else []), *self.verdicts]

    def reasons(self) -> dict[str, int]:
        """Return how often each reason occurs."""
        return count_reasons(np.concatenate([v.reason for v in self.verdicts]))


def judge_rows(
    storage: Storage, raw: RawDay, config: Config, published: Verdict | None = None, select: Select | None = None
) -> Judged:
    """Read and judge the rows of a day.

    Args:
        storage: of the log.
        raw: the day.
        config: all settings.
        published: rows that are behaviors already; a row that equals one of them is a duplicate.
        select: which rows are judged, of each batch; the others are those in `published`.

    Raises:
        DataError: a file is not readable.
    """
    empty = pa.RecordBatch.from_arrays([pa.nulls(0)] * len(RAW_COLUMNS), names=list(RAW_COLUMNS))
    batches = list(read_raw_day(storage, raw, config.source)) or [RawBatch("", 1, empty)]
    verdicts = [judge(batch, raw.day, config.source, config.validation.behaviors) for batch in batches]
    chosen = select(batches, verdicts) if select else [np.ones(len(v.reason), bool) for v in verdicts]
    verdicts = [keep(verdict, kept) for verdict, kept in zip(verdicts, chosen, strict=True)]
    if config.validation.reject_duplicates:
        mark_duplicates([*([published] if published else []), *verdicts])
        if published:
            published.reason[:] = 0
    tables = [QUARANTINE.empty_table()]
    for batch, verdict, kept in zip(batches, verdicts, chosen, strict=True):
        if verdict.reason.any():
            reason = np.zeros(len(kept), np.int8)
            reason[kept] = verdict.reason
            tables.append(to_quarantine(batch, reason))
    return Judged(verdicts, pa.concat_tables(tables), tuple(_mixed_units(batches, verdicts)), published)


def keep(verdict: Verdict, kept: Bools) -> Verdict:
    """Return the verdicts of some rows."""
    return Verdict(
        *(
            values.filter(pa.array(kept)) if isinstance(values, pa.Array) else values[kept]
            for values in vars(verdict).values()
        )
    )


def columns_of(verdicts: Sequence[Verdict]) -> list[npt.NDArray[np.int64]]:
    """Return the five columns of the accepted rows as numbers; equal behaviors get equal ones."""
    accepted = [v.reason == 0 for v in verdicts]
    columns = [
        np.concatenate([getattr(v, name)[rows] for v, rows in zip(verdicts, accepted, strict=True)]) for name in COLUMNS
    ]
    names = pa.chunked_array([v.behavior for v in verdicts], pa.string()).combine_chunks().dictionary_encode()
    codes = names.indices.fill_null(-1).to_numpy().astype(np.int64)
    return [*columns, codes[np.concatenate(accepted)]]


def mark_duplicates(verdicts: Sequence[Verdict]) -> None:
    """Give a reason to each accepted row that equals an earlier accepted one."""
    rows = [np.flatnonzero(v.reason == 0) for v in verdicts]
    found = duplicates(columns_of(verdicts))
    ends = np.cumsum([len(r) for r in rows])[:-1]
    for verdict, places, repeated in zip(verdicts, rows, np.split(found, ends), strict=True):
        verdict.reason[places[repeated]] = _DUPLICATE


def _mixed_units(batches: Sequence[RawBatch], verdicts: Sequence[Verdict]) -> list[str]:
    """Return a line for each file in which some times are right and others look like another unit."""
    by_file: dict[str, npt.NDArray[np.int64]] = {}
    for raw, verdict in zip(batches, verdicts, strict=True):
        counts = np.bincount(verdict.reason, minlength=len(REASONS))
        by_file[raw.file] = by_file.get(raw.file, 0) + counts
    lines, looks = [], "timestamp_looks_like_"
    for file, counts in by_file.items():
        named = zip(REASONS, counts, strict=True)
        odd = [f"{n:,} look like {reason.removeprefix(looks)}" for reason, n in named if n and reason.startswith(looks)]
        if odd and counts[0]:
            lines.append(f"{file}: mixed time units: {number_of(int(counts[0]), 'row')} fit, {', '.join(odd)}")
    return lines
