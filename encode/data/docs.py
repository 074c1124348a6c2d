"""What validation said about the days of a log, in a local folder: an index over all days, and the pages of some."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from encode.data.docs_index import DayLine, index_page
from encode.data.parquet import read_parquet
from encode.data.partitions import days_of, published_days, quiet
from encode.errors import ArtifactError
from encode.outputs import MANIFEST, Manifest, read_manifest, read_part
from encode.schema import Window, number_of
from encode.storage import Storage

_NUM_THREADS = 8
_NUM_EXAMPLES = 3
_MAX_PAGES = 100
"""Pages that are fetched for the links of the index, the newest; that of the day that is asked for comes on top."""


@dataclass(frozen=True)
class _Seen:
    """One verdict on a day."""

    day: date
    prefix: str
    manifest: Manifest

    @property
    def refusal(self) -> str | None:
        return self.manifest.details.get("refusal")

    @property
    def warnings(self) -> list[str]:
        return [str(line) for line in self.manifest.details.get("warnings", ())]


def write_docs(
    storage: Storage, folder: Path, day: date | None, window: Window | None, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """Write the index over the days, the pages of those that were refused or have warnings, and all about `day`.

    Args:
        storage: of the log.
        folder: where to; files of an earlier time are overwritten.
        day: its page, result and rejected rows are fetched, and the latter are summed up.
        window: days of the index; None for all.
        say: gets what there is to read.

    Returns:
        `index`: its path, `days`: in it, `warned`, `refused`; of a day `page`, `rejected`: paths, and `address`.

    Raises:
        ArtifactError: nothing was validated, or not that day.
    """
    seen = _verdicts(storage, window)
    if not seen:
        raise ArtifactError(
            f"{storage.uri}/quarantine: no day was validated {f'in {window.in_words()}' if window else 'yet'}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    pages = [one for one in seen if one.refusal or one.warnings][-_MAX_PAGES:]
    pages += [one for one in seen if one.day == day and one not in pages]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda one: _fetch(storage, one, "index.html", folder / _page(one)), pages))
    lines = [_line(storage, one, linked=one in pages) for one in seen]
    index = folder / "index.html"
    index.write_text(index_page(lines, storage.uri), encoding="utf-8")
    refused = sum(one.refusal is not None for one in seen)
    warned = sum(one.refusal is None and bool(one.warnings) for one in seen)
    say(f"{number_of(len(seen), 'day')}, {warned} with warnings, {refused} refused: {index}")
    summary: dict[str, Any] = {"index": str(index), "days": len(seen), "warned": warned, "refused": refused}
    return summary | (_about(storage, seen, day, folder, say) if day else {})


def _verdicts(storage: Storage, window: Window | None) -> list[_Seen]:
    """Return the last verdict on each published day, and each refusal of the others, by day."""
    published = published_days(storage)
    prefixes = [(day, p[-1].replace("behaviors/", "quarantine/", 1)) for day, p in published.items()]
    for day, keys in days_of(storage.list("quarantine/dt=")).items():
        if day not in published:
            refused = [key for key in keys if "/refused-" in key and key.endswith(f"/{MANIFEST}")]
            prefixes += [(day, key.removesuffix(f"/{MANIFEST}")) for key in refused]
    inside = [one for one in sorted(prefixes) if window is None or window.start <= one[0] < window.end]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        manifests = pool.map(lambda one: read_manifest(storage, one[1]), inside)
        return [_Seen(*one, manifest) for one, manifest in zip(inside, manifests, strict=True) if manifest]


def _page(seen: _Seen) -> str:
    return "-".join(seen.prefix.removeprefix("quarantine/dt=").split("/")) + ".html"


def _fetch(storage: Storage, seen: _Seen, name: str, path: Path) -> None:
    (part,) = (part for part in seen.manifest.parts if part.name == name)
    path.write_bytes(read_part(storage, seen.prefix, part))


def _line(storage: Storage, seen: _Seen, *, linked: bool) -> DayLine:
    details = seen.manifest.details
    profile = details.get("profile", {})
    raw_rows = int(seen.manifest.counts["raw_rows"])
    return DayLine(
        seen.day,
        {
            "rows": profile.get("rows"),
            "users": profile.get("users"),
            "share of rejected rows": int(seen.manifest.counts["rows"]) / max(raw_rows, 1),
        }
        | {one["name"]: one["value"] for one in details.get("measures", ())},
        {one["name"]: (one["low"], one["high"]) for one in details.get("measures", ())},
        seen.warnings,
        seen.refusal,
        _page(seen) if linked else None,
        f"{storage.uri}/{seen.prefix}/index.html",
    )


def _about(storage: Storage, seen: list[_Seen], day: date, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fetch all about one day, and sum up what was rejected."""
    found = [one for one in seen if one.day == day]
    if not found:
        raise ArtifactError(
            f"{storage.uri}/quarantine/dt={day}: not validated, or there are no raw data of it; have "
            f"{number_of(len({one.day for one in seen}), 'day')} from {seen[0].day} to {seen[-1].day}"
        )
    one = found[-1]
    page, rejected = folder / _page(one), folder / f"{day}-rejected.parquet"
    _fetch(storage, one, "result.json", folder / f"{day}-result.json")
    _fetch(storage, one, "part-00000.parquet", rejected)
    say(f"{day}: {f'refused: {one.refusal}' if one.refusal else 'published'}")
    for line in one.warnings:
        say(f"  warning: {line}")
    table = read_parquet(rejected.read_bytes())
    for reason, count in sorted(one.manifest.details["reasons"].items(), key=lambda r: -r[1]):
        say(f"  {number_of(count, 'row')} rejected: {reason}")
        for row in table.filter(pc.equal(table["reason"], pa.scalar(reason))).slice(0, _NUM_EXAMPLES).to_pylist():
            values = ", ".join(f"{k} {v!r}" for k, v in row.items() if k not in ("file", "row", "reason"))
            say(f"    {row['file']} row {row['row']}: {values}")
    say(f"  page {page}, rejected rows {rejected}, in the store {storage.uri}/{one.prefix}/")
    return {"page": str(page), "rejected": str(rejected), "address": f"{storage.uri}/{one.prefix}/index.html"}
