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
import numpy.typing as npt
import pyarrow as pa

from encode.compiled import compiled, hash_slot, mix
from encode.data.histories import rows_of, to_batch
from encode.engines import Result, counted
from encode.errors import ArtifactError
from encode.outputs import Part, read_part
from encode.schema import canonical_json
from encode.storage import Storage

USERS, ROWS = ".users.arrow", ".rows.npy"
Ints = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint64]
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
class Bucket:
    """The histories of U users of one bucket."""

    user_ids: Ints
    """Ascending, [U]."""
    offsets: Ints
    """Start of each user's rows, then the end of the last, [U + 1]."""
    rows: Ints
    """item_id, category_id and timestamp; by timestamp, then item, then category within a user, [N, 3]."""

    def batch(self, first: int, last: int) -> pa.RecordBatch:
        """Return the histories of users `first` to `last` as rows of `schema.HISTORIES`."""
        begin, end = self.offsets[first], self.offsets[last]
        columns = [np.ascontiguousarray(self.rows[begin:end, column]) for column in range(3)]
        return to_batch(self.user_ids[first:last], self.offsets[first : last + 1] - begin, columns)

    def behaviors(self) -> Ints:
        """Return the rows with their user in front, as `group` takes them, [N, 4]."""
        return np.column_stack([np.repeat(self.user_ids, np.diff(self.offsets)), self.rows])


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
    return f"part-{bucket:03d}"


def files_of(parts: Sequence[Part], bucket: int, prefix: str) -> list[Part]:
    """Return the files of a bucket, oldest first, as another output names those of the output at `prefix`."""
    return [part.referenced(prefix) for part in parts if part.name.startswith(bucket_name(bucket) + ".")]


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


# --- grouping ----------------------------------------------------------------------------------------------


def group(behaviors: Ints) -> Bucket:
    """Group rows of user_id, item_id, category_id and timestamp, [N, 4], in any order: equal rows give equal bytes."""
    user_ids, offsets, rows = _group(np.ascontiguousarray(behaviors))
    return Bucket(user_ids, offsets, rows)


@compiled
def _number(behaviors: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """Number the users in the order of their first row: each row's number, [N], and each number's user id, [U]."""
    bits = 4
    while (1 << bits) < 2 * len(behaviors):
        bits += 1
    slots = np.full(1 << bits, -1, np.int32)
    numbers = np.empty(len(behaviors), np.int32)
    users = np.empty(len(behaviors), np.int64)
    count = 0
    for i in range(len(behaviors)):
        user = behaviors[i, 0]
        slot = hash_slot(user, bits)
        while slots[slot] >= 0 and users[slots[slot]] != user:
            slot = (slot + 1) & (len(slots) - 1)
        if slots[slot] < 0:
            slots[slot] = count
            users[count] = user
            count += 1
        numbers[i] = slots[slot]
    return numbers, users[:count].copy()


@compiled
def _group(behaviors: Ints) -> tuple[Ints, Ints, Ints]:
    numbers, users = _number(behaviors)
    order = np.argsort(users)
    counts = np.zeros(len(users), np.int64)
    for i in range(len(numbers)):
        counts[numbers[i]] += 1
    offsets = np.zeros(len(users) + 1, np.int64)
    place = np.empty(len(users), np.int64)
    for rank in range(len(users)):
        place[order[rank]] = offsets[rank]
        offsets[rank + 1] = offsets[rank] + counts[order[rank]]
    rows = np.empty((len(behaviors), 3), np.int64)
    for i in range(len(behaviors)):
        to = place[numbers[i]]
        place[numbers[i]] += 1
        for column in range(3):
            rows[to, column] = behaviors[i, column + 1]
    for rank in range(len(users)):
        _sort(rows[offsets[rank] : offsets[rank + 1]])
    return users[order], offsets, rows


@compiled
def _sort(rows: Ints) -> None:
    """Sort by timestamp, item, category, in place; by timestamp alone where that settles it."""
    disorder, ties = False, False
    for i in range(1, len(rows)):
        disorder |= rows[i, 2] < rows[i - 1, 2]
    if disorder:
        rows[:] = rows[np.argsort(rows[:, 2], kind="mergesort")]
    for i in range(1, len(rows)):
        if rows[i, 2] == rows[i - 1, 2]:
            ties |= rows[i, 0] < rows[i - 1, 0] or (rows[i, 0] == rows[i - 1, 0] and rows[i, 1] < rows[i - 1, 1])
    if ties:
        for column in (1, 0, 2):
            rows[:] = rows[np.argsort(rows[:, column], kind="mergesort")]


@compiled
def _marks(offsets: Ints, rows: Ints) -> Marks:
    marks = np.zeros(len(offsets) - 1, np.uint64)
    for user in range(len(marks)):
        for i in range(offsets[user], offsets[user + 1]):
            x = np.uint64(0x9E3779B97F4A7C15)
            for column in range(3):
                x = mix(x + np.uint64(rows[i, column]))
            marks[user] += x
    return marks


# --- files -------------------------------------------------------------------------------------------------


def bucket_files(bucket: Bucket) -> tuple[bytes, bytes]:
    """Return the content of the two files: users, rows."""
    index = [bucket.user_ids, np.diff(bucket.offsets), _marks(bucket.offsets, bucket.rows)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _INDEX) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in index], schema=_INDEX))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(bucket.rows))
    return bytes(sink.getvalue()), b"".join([header.getvalue(), bucket.rows.data])


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
        rows = np.frombuffer(read_part(storage, "", part), np.int64, offset=header).reshape(-1, 3)
        return Bucket(index.user_ids[chosen], offsets, rows if len(place) == len(rows) else rows[place])
    first, last = (header + edge[chosen] * _BYTES_PER_BEHAVIOR for edge in (begins, ends))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        data = pool.map(partial(storage.get_range, part.key("")), first.tolist(), last.tolist())
        rows = np.frombuffer(b"".join(data), np.int64).reshape(-1, 3)
    if (damaged := np.flatnonzero(_marks(offsets, rows) != index.marks[chosen])).size:
        raise ArtifactError(
            f"{storage.uri}/{part.key('')}: damaged: rows of user {index.user_ids[chosen[damaged[0]]]} are not those "
            "that the index names; remove this output and run the step again"
        )
    return Bucket(index.user_ids[chosen], offsets, rows)


def _read_index(storage: Storage, part: Part) -> Index:
    batch = pa.ipc.open_file(pa.BufferReader(read_part(storage, "", part))).get_batch(0)
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
