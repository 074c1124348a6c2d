"""The histories of a bucket: grouped by user, oldest first, and as two files from which one user can be read alone.

part-NNN.users.arrow   who is in it: user_id ascending, num_behaviors, mark; read as a whole
part-NNN.rows.npy      item_id, category_id, timestamp of each behavior, user after user; a user is one range of bytes

A bucket is a base and the files of later days on top of it. A user may be in several of them, and the history is all
of those rows in order of time. The mark of a user is a sum over rows, so the marks of the files add up: two states of a
history differ exactly if count or mark do (up to one chance in 2^64).

    U users   N behaviors of all users
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from encode.data.by_user import Bucket, Ints, Marks, group, marks_of
from encode.data.histories import rows_of
from encode.engines import Result, counted
from encode.outputs import Part, damaged, read_range, read_referenced
from encode.schema import canonical_json
from encode.storage import Storage

USERS, ROWS = ".users.arrow", ".rows.npy"
_NAME = "part-"
_NUM_THREADS = 8
_BYTES_PER_BEHAVIOR = 24
_WHOLE_FILE_SHARE = 0.2
"""Share of a file's behaviors from which reading it whole is cheaper than range by range."""
_RESULT = ".result.json"
_INDEX = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("num_behaviors", pa.int64(), nullable=False),
        pa.field("mark", pa.uint64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Index:
    """Who is in a bucket, in all its files together."""

    user_ids: Ints
    """Ascending, [U]."""
    num_behaviors: Ints
    """[U]"""
    marks: Marks
    """[U]"""

    def changed_since(self, before: Index) -> Ints:
        """Return the users whose history is another one than `before`, or who were not there, ascending."""
        if len(before.user_ids) == 0:
            return self.user_ids
        place = np.searchsorted(before.user_ids, self.user_ids).clip(max=len(before.user_ids) - 1)
        same = (
            (before.user_ids[place] == self.user_ids)
            & (before.num_behaviors[place] == self.num_behaviors)
            & (before.marks[place] == self.marks)
        )
        changed: Ints = self.user_ids[~same]
        return changed


def bucket_name(bucket: int) -> str:
    """Return what the files of a bucket begin with."""
    return f"{_NAME}{bucket:03d}"


def files_of(parts: Sequence[Part], bucket: int, prefix: str) -> list[Part]:
    """Return the files of a bucket, oldest first, as another output names those of the output at `prefix`."""
    return [part.referenced(prefix) for part in parts if part.name.startswith(bucket_name(bucket) + ".")]


def sizes(parts: Sequence[Part], num_buckets: int, ending: str = "") -> tuple[Ints, Ints]:
    """Return the rows and the bytes of each bucket, in its files that end in `ending`, [num_buckets] each."""
    own = [part for part in parts if part.name.endswith(ending)]
    bucket = [int(part.name.partition(".")[0].removeprefix(_NAME)) for part in own]
    rows, total = np.zeros(num_buckets, np.int64), np.zeros(num_buckets, np.int64)
    np.add.at(rows, bucket, [part.rows or 0 for part in own])
    np.add.at(total, bucket, [part.bytes for part in own])
    return rows, total


def dumped(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return descriptions of files as JSON can hold them."""
    return [part.model_dump(mode="json") for part in parts]


def finish(storage: Storage, prefix: str, result: Result) -> Result:
    """Note what was made of a bucket, beside its files: an interrupted run goes on after it. Returns `result`."""
    storage.put(f"{prefix}/{bucket_name(result['bucket'])}{_RESULT}", canonical_json(result))
    return result


def by_bucket(
    storage: Storage,
    prefix: str,
    num_buckets: int,
    start: Callable[[Sequence[int]], Iterator[Result]],
    what: str,
    say: Callable[[str], None],
) -> list[Result]:
    """Return what was made of each bucket, in order; what an interrupted run has finished is not made again.

    Args:
        storage: the object store.
        prefix: of the output that is made.
        num_buckets: how many there are.
        start: begins with the buckets that are left, and yields what it made of each.
        what: is counted, for people.
        say: told about progress.
    """
    keys = [key for key in storage.list(f"{prefix}/") if key.endswith(_RESULT)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results: list[Result] = [json.loads(data) for data in pool.map(storage.get, keys)]
    left = sorted(set(range(num_buckets)) - {result["bucket"] for result in results})
    if results:
        say(f"{len(results)} of {num_buckets} buckets were finished by an earlier run")
    results += counted(start(left), len(left), what, say)
    return sorted(results, key=lambda result: int(result["bucket"]))


# --- files -------------------------------------------------------------------------------------------------


def bucket_files(bucket: Bucket) -> tuple[bytes, bytes]:
    """Return the content of the two files: users, rows."""
    index = [bucket.user_ids, np.diff(bucket.offsets), marks_of(bucket.offsets, bucket.rows)]
    users, rows = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_file(users, _INDEX) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in index], schema=_INDEX))
    np.lib.format.write_array_header_1_0(rows, np.lib.format.header_data_from_array_1_0(bucket.rows))
    rows.write(bucket.rows.data)
    return users.getvalue(), rows.getvalue()


def read_index(storage: Storage, prefix: str, parts: Sequence[Part], bucket: int) -> Index:
    """Return who is in a bucket; `parts` are the files of the output at `prefix`."""
    files = files_of(parts, bucket, prefix)
    return _total([_read_index(storage, part) for part in files if part.name.endswith(USERS)])


def read_bucket(storage: Storage, prefix: str, parts: Sequence[Part], bucket: int, users: Ints | None = None) -> Bucket:
    """Return the histories of some users of a bucket, ascending, or of all.

    The files of a bucket come in pairs, users and rows. Few users are read by ranges of bytes, each checked by its
    mark; otherwise whole files, checked by their digest.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    pieces = []
    files = files_of(parts, bucket, prefix)
    for part, rows in zip(files[::2], files[1::2], strict=True):
        index = _read_index(storage, part)
        chosen = np.arange(len(index.user_ids)) if users is None else _places(index.user_ids, users)
        if len(chosen):
            pieces.append(_read_rows(storage, rows, index, chosen))
    if len(pieces) == 1:
        return pieces[0]
    return group(np.concatenate([piece.behaviors() for piece in pieces]) if pieces else np.empty((0, 4), np.int64))


def _read_rows(storage: Storage, part: Part, index: Index, chosen: Ints) -> Bucket:
    ends = np.cumsum(index.num_behaviors)
    begins = ends - index.num_behaviors
    place, offsets = rows_of(begins[chosen], ends[chosen])
    # The rows are the end of the file, whatever the length of the header.
    header = part.bytes - int(ends[-1]) * _BYTES_PER_BEHAVIOR
    if len(place) > _WHOLE_FILE_SHARE * ends[-1]:
        rows = np.frombuffer(read_referenced(storage, part), np.int64, offset=header).reshape(-1, 3)
        return Bucket(index.user_ids[chosen], offsets, rows if len(place) == len(rows) else rows[place])
    first, last = (header + edge[chosen] * _BYTES_PER_BEHAVIOR for edge in (begins, ends))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        data = pool.map(partial(read_range, storage, part), first.tolist(), last.tolist())
        rows = np.frombuffer(b"".join(data), np.int64).reshape(-1, 3)
    if (wrong := np.flatnonzero(marks_of(offsets, rows) != index.marks[chosen])).size:
        user = index.user_ids[chosen[wrong[0]]]
        raise damaged(storage, str(part.at), part, f"rows of user {user} are not those that the index names")
    return Bucket(index.user_ids[chosen], offsets, rows)


def _read_index(storage: Storage, part: Part) -> Index:
    batch = pa.ipc.open_file(pa.BufferReader(read_referenced(storage, part))).get_batch(0)
    return Index(*(batch.column(name).to_numpy() for name in _INDEX.names))


def _total(indexes: Sequence[Index]) -> Index:
    """Add up counts and marks of the files of a bucket."""
    if len(indexes) == 1:
        return indexes[0]
    users = np.concatenate([np.zeros(0, np.int64), *(index.user_ids for index in indexes)])
    ids, place = np.unique(users, return_inverse=True)
    counts, marks = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.uint64)
    if indexes:
        np.add.at(counts, place, np.concatenate([index.num_behaviors for index in indexes]))
        np.add.at(marks, place, np.concatenate([index.marks for index in indexes]))
    return Index(ids, counts, marks)


def _places(sorted_ids: Ints, wanted: Ints) -> Ints:
    """Return where the wanted users that are there lie, ascending."""
    return np.flatnonzero(np.isin(sorted_ids, wanted, assume_unique=True))
