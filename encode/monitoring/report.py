"""The page of a snapshot for people: `interests/<space>/<snapshot>/report.html`.

It lies beside the manifest and is no part of it: nothing that serves reads it, and a snapshot is complete without.
Equal stores get equal pages. It costs a sample of the snapshot and one of the snapshot before, see `sample`, whatever
the number of users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from encode.data.parquet import read_parquet
from encode.errors import ArtifactError, EncodeError
from encode.interests.bucket import read_space_once
from encode.interests.snapshots import folder_of
from encode.model.space import Space
from encode.monitoring.charts import bars
from encode.monitoring.drift import Shift, kept_share, shifts
from encode.monitoring.sample import Sample, read_sample
from encode.monitoring.stability import MUCH, SOME, counts_of, verdict
from encode.monitoring.style import STYLE
from encode.outputs import Manifest, read_manifest
from encode.pages import POLICY
from encode.pointers import Pointer
from encode.schema import SECONDS_PER_DAY, day_start, number_of
from encode.storage import LostRace, Storage

REPORT = "report.html"
_EXAMPLES, _INTERESTS_SHOWN, _ITEMS_SHOWN = 6, 5, 3
_GAPS_SHOWN = 5
_LENGTHS = (3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
_AGES = (1, 7, 30, 90)
_SHARES = tuple(tenth / 10 for tenth in range(1, 10))
_TENTHS = [f"{10 * tenth}%" for tenth in range(10)]


@dataclass(frozen=True)
class Drawn:
    """A snapshot and a sample of its users."""

    name: str
    manifest: Manifest
    sample: Sample


def report_key(space_id: str, snapshot: str) -> str:
    """Return where the page of a snapshot lies."""
    return f"{folder_of(space_id)}/{snapshot}/{REPORT}"


def write_report(
    storage: Storage, space_id: str, current: Pointer, before: Pointer | None, say: Callable[[str], None]
) -> str | None:
    """Write the page of a snapshot unless it is there, and return its key; None where it cannot be made.

    The snapshot is published already, so that nothing here is a reason to fail: what is wrong is told to `say`.

    Args:
        storage: the object store.
        space_id: of the snapshot.
        current: what the space points at.
        before: what it pointed at before the refresh; taken for the earlier snapshot where the manifest names none.
        say: told where the page is.
    """
    key = report_key(space_id, current.snapshot)
    try:
        if storage.get_versioned(key) is None:
            storage.create(key, _page(storage, space_id, current, before, say).encode())
    except LostRace:
        pass
    except EncodeError as error:
        say(f"space {space_id}: no report of snapshot {current.snapshot}: {error}")
        return None
    say(f"space {space_id}: report {storage.uri}/{key}")
    return key


def _page(storage: Storage, space_id: str, current: Pointer, before: Pointer | None, say: Callable[[str], None]) -> str:
    prefix = f"{folder_of(space_id)}/{current.snapshot}"
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise ArtifactError(f"{storage.uri}/{prefix}: absent or unfinished")
    now = Drawn(current.snapshot, manifest, read_sample(storage, prefix, manifest))
    made_from = manifest.details.get("histories")
    histories = read_manifest(storage, made_from) if made_from else None
    examples = _examples(storage, now.sample, read_space_once(storage, space_id))
    return render(space_id, now, _earlier(storage, space_id, now, before, say), histories, examples)


def _earlier(
    storage: Storage, space_id: str, now: Drawn, before: Pointer | None, say: Callable[[str], None]
) -> Drawn | None:
    """Return the snapshot that this one was built on, else the one that served before it."""
    folder = folder_of(space_id)
    names = [name.rpartition("/")[2] for name in now.manifest.inputs if name.startswith(f"{folder}/")]
    names += [before.snapshot] if before else []
    for name in names:
        if name == now.name:
            continue
        try:
            manifest = read_manifest(storage, f"{folder}/{name}")
            return Drawn(name, manifest, read_sample(storage, f"{folder}/{name}", manifest)) if manifest else None
        except ArtifactError as error:
            say(f"space {space_id}: not compared with snapshot {name}: {error}")
    return None


# --- the page ----------------------------------------------------------------------------------------------


def render(
    space_id: str, now: Drawn, before: Drawn | None, histories: Manifest | None, examples: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page.

    Args:
        space_id: of the snapshots.
        now: the snapshot.
        before: the earlier one, if any.
        histories: what it was made from, if that is still there.
        examples: of `_examples`.
    """
    as_of = date.fromisoformat(now.manifest.details["as_of"])
    sections = [
        _tiles(now),
        _charts(now, before),
        f'<div class="columns">{_drift(now, before)}{_freshness(now, histories, as_of)}</div>',
        _made_from(now.manifest),
        *_example_section(examples),
    ]
    title = f"Snapshot {now.name}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{POLICY}<style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>Interests of all users in space <code>{escape(space_id)}</code>, "
        f"nothing of {as_of} or later used.</p>{''.join(sections)}</main></body></html>\n"
    )


def _tiles(now: Drawn) -> str:
    counts, parts = now.manifest.counts, now.manifest.parts
    own = sum(part.bytes for part in parts if part.at is None)
    told = {
        "users": f"{counts['users']:,}",
        "interests": f"{counts.get('interests', 0):,}",
        "behaviors": f"{counts.get('behaviors', 0):,}",
        "clustered in this refresh": f"{counts.get('clustered', 0):,}",
        "files": f"{len(parts):,} ({sum(part.at is None for part in parts):,} new)",
        "MB": f"{sum(part.bytes for part in parts) / 1e6:,.1f} ({own / 1e6:,.1f} new)",
    }
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in told.items())
    return f'<section class="tiles">{tiles}</section>'


def _charts(now: Drawn, before: Drawn | None) -> str:
    most = max([*now.sample.num_interests.tolist(), *(before.sample.num_interests.tolist() if before else ()), 1])
    step = -(-most // 16)
    interests = tuple(range(step + 1, most + 1, step))
    charts: list[tuple[str, list[str], Callable[[Drawn], tuple[Any, Sequence[float]]]]] = [
        ("Behaviors a user", _names(_LENGTHS), lambda one: (one.sample.num_behaviors, _LENGTHS)),
        ("Interests a user", _names(interests), lambda one: (one.sample.num_interests, interests)),
        ("Share of the largest interest", _TENTHS, lambda one: (one.sample.largest_share, _SHARES)),
        ("Days since the newest behavior", ["0", *map(str, _AGES)], lambda one: (_ages(one), _AGES)),
    ]
    drawn = [
        bars(name, labels, _shares(*pick(now)), _shares(*pick(before)) if before else None)
        for name, labels, pick in charts
    ]
    ranks = [one.sample.mass_by_rank() for one in (now, before) if one]
    longest = max(map(len, ranks), default=0)
    mass = [np.pad(rank, (0, longest - len(rank))).tolist() for rank in ranks]
    names = [str(rank + 1) for rank in range(longest)]
    drawn.append(bars("Behaviors by rank of interest", names, mass[0], mass[1] if before else None))
    sample = now.sample
    line = f'; <i class="key line"></i>the snapshot before, <code>{escape(before.name)}</code>' if before else ""
    return (
        f'<section><h2>Users</h2><p><i class="key"></i>Shares of {_drawn(sample, now.manifest)}{line}.</p>'
        "<p class=note>A bar counts the users from the value below it up to that of the next bar; in the last chart, "
        "all behaviors by the rank of their interest with the user, 1 the largest.</p>"
        f"<div class=charts>{''.join(drawn)}</div></section>"
    )


def _drawn(sample: Sample, manifest: Manifest) -> str:
    """Return what the sample is, or that it is no mere sample."""
    total, users = int(manifest.config["num_buckets"]), number_of(len(sample.user_ids), "user")
    if sample.num_buckets == total:
        return f"all {users}"
    return f"a sample of {users}: all that are in {sample.num_buckets} of {number_of(total, 'bucket')}"


def _names(edges: Sequence[int]) -> list[str]:
    """Return where each bin of positive counts begins."""
    return [f"{edge // 1000}k" if edge >= 1000 else str(edge) for edge in (1, *edges)]


def _shares(values: Any, edges: Sequence[float]) -> list[float]:
    counts = counts_of(values, np.array(edges, np.float64))
    return [float(count) / max(int(counts.sum()), 1) for count in counts]


def _ages(one: Drawn) -> Any:
    """Return the days from each user's newest behavior to the end of the snapshot."""
    newest = one.sample.newest[one.sample.newest > 0]
    return (day_start(date.fromisoformat(one.manifest.details["as_of"])) - newest) / SECONDS_PER_DAY


def _drift(now: Drawn, before: Drawn | None) -> str:
    if before is None:
        return "<section><h2>Drift</h2><p>There is no earlier snapshot of this space to compare with.</p></section>"
    heads = "".join(f"<th class=number>{name}" for name in ("mean before", "mean now", "PSI", "by chance"))
    rows = "".join(_drift_row(one) for one in shifts(before.sample, now.sample))
    kept = kept_share(before.sample, now.sample)
    warm = now.manifest.details.get("drift")
    whose = f"the {number_of(len(before.sample.user_ids), 'user')} in the sample of the snapshot before"
    told = f"{kept:.1%} of {whose} are in that of this one. " if kept == kept else ""
    if warm is not None:
        told += f"Users clustered from their last centers: inertia {warm:+.2%} against clustering anew."
    return (
        "<section><h2>Drift</h2><p class=note>Of the same users as the charts.</p>"
        f"<table><tr><th>measure{heads}<th>moved</tr>{rows}</table><p>{told}</p>"
        f"<p class=note>PSI below {SOME} is no change by custom, above {MUCH} a large one; "
        "by chance: what two samples of one distribution would have.</p></section>"
    )


def _drift_row(one: Shift) -> str:
    found = ((one.mean_before, ",.4g"), (one.mean_now, ",.4g"), (one.psi, ".4f"), (one.chance, ".4f"))
    cells = "".join(f"<td class=number>{'-' if np.isnan(number) else format(number, form)}" for number, form in found)
    word = "not measured" if np.isnan(one.psi) else verdict(one.psi, one.chance)
    return f'<tr><td>{one.name}{cells}<td class="{word}">{word}</tr>'


def _freshness(now: Drawn, histories: Manifest | None, as_of: date) -> str:
    newest = int(now.sample.newest.max(initial=0))
    told = [f"as of {as_of}"]
    if newest:
        hours = (day_start(as_of) - newest) // 3600
        when = f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC"
        told.append(f"newest behavior of the sample {when}, {f'{hours:,} h' if hours else 'under 1 h'} earlier")
    found = histories.details.get("days", ()) if histories else ()
    days = sorted(date.fromisoformat(name.rpartition("=")[2]) for name in found)
    if days:
        missing = sorted({days[0] + timedelta(n) for n in range((as_of - days[0]).days)} - set(days))
        told.append(f"{number_of(len(days), 'validated day')} from {days[0]} to {days[-1]}")
        if missing:
            named = ", ".join(map(str, missing[-_GAPS_SHOWN:]))
            told.append(f"<b>days between without any: {len(missing):,}</b>, the newest: {named}")
    return f"<section><h2>Freshness</h2><ul>{''.join(f'<li>{line}' for line in told)}</ul></section>"


def _made_from(manifest: Manifest) -> str:
    inputs = {**manifest.inputs, "settings": manifest.fingerprint, f"code {manifest.version}": manifest.git_commit}
    rows = (f"<tr><td>{escape(name)}<td><code>{escape(value[:16])}</code></tr>" for name, value in inputs.items())
    return (
        f"<section><h2>Made from</h2><table>{''.join(rows)}</table><p class=note>"
        "<code>encode lineage</code> follows these further, and says whether they still hold.</p></section>"
    )


# --- examples ----------------------------------------------------------------------------------------------


def _examples(storage: Storage, sample: Sample, space: Space) -> list[dict[str, Any]]:
    """Return the largest interests of a few users, from short histories to long ones.

    Not whose they are: a page outlives its day, and no list of erased users reaches into it.
    """
    if not len(sample.rows):
        return []
    by_length = sample.rows.take(pa.array(np.argsort(sample.rows["num_behaviors"].to_numpy(), kind="stable")))
    chosen = np.unique(np.linspace(0, len(by_length) - 1, _EXAMPLES).astype(np.int64))
    columns = ["num_behaviors", "size", "newest", "top_items"]
    users: list[dict[str, Any]] = by_length.select(columns).take(pa.array(chosen)).to_pylist()
    items = {item for user in users for top in user["top_items"][:_INTERESTS_SHOWN] for item in top}
    names, categories = _item_names(storage, items), _item_categories(space, sorted(items))
    for user in users:
        user["interests"] = [
            {
                "share": size / user["num_behaviors"],
                "size": size,
                "newest": str(datetime.fromtimestamp(newest, UTC).date()),
                "items": [(item, names.get(item)) for item in top[:_ITEMS_SHOWN]],
                "categories": list(dict.fromkeys(categories[item] for item in top if categories.get(item))),
            }
            for size, newest, top in list(zip(user["size"], user["newest"], user["top_items"], strict=True))[
                :_INTERESTS_SHOWN
            ]
        ]
    return users


def _item_names(storage: Storage, items: set[int]) -> dict[int, str]:
    found = storage.get_versioned("items/items.parquet")
    if found is None:
        return {}
    table = read_parquet(found[0], ["item_id", "name"])
    table = table.filter(pc.is_in(table["item_id"], pa.array(sorted(items), pa.int64())))
    return dict(zip(table["item_id"].to_pylist(), table["name"].to_pylist(), strict=True))


def _item_categories(space: Space, items: list[int]) -> dict[int, int]:
    vocabulary = space.vocabulary
    index = vocabulary.index(np.array(items, np.int64), None)
    known = vocabulary.is_item(index)
    found = vocabulary.item_category_ids[index[known] - vocabulary.num_categories]
    return dict(zip(np.array(items)[known].tolist(), found.tolist(), strict=True))


def _example_section(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not examples:
        return []
    users = []
    for user in examples:
        rows = "".join(
            f"<tr><td class=number>{one['share']:.0%}<td class=number>{one['size']:,}<td class=date>{one['newest']}"
            f"<td>{', '.join(map(str, one['categories']))}<td>{_item_list(one['items'])}</tr>"
            for one in user["interests"]
        )
        more = len(user["size"]) - len(user["interests"])
        note = f"<p class=note>and {number_of(more, 'smaller one')}</p>"
        users.append(
            f"<div><h3>{number_of(user['num_behaviors'], 'behavior')}, {number_of(len(user['size']), 'interest')}"
            "</h3><table><tr><th class=number>share<th class=number>behaviors<th>newest<th>categories<th>top items</tr>"
            f"{rows}</table>{note if more > 0 else ''}</div>"
        )
    return [f"<section><h2>A few users</h2><div class=columns>{''.join(users)}</div></section>"]


def _item_list(items: Sequence[tuple[int, str | None]]) -> str:
    return ", ".join(f"{item} {escape(name)}" if name else str(item) for item, name in items)
