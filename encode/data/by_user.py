"""Behaviors in any order, by user: the histories of a bucket.

U users   N behaviors of all users
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encode.compiled import compiled, hash_slot, mix, table_bits
from encode.data.histories import to_batch

Ints = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint64]


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


def group(behaviors: Ints) -> Bucket:
    """Group rows of user_id, item_id, category_id and timestamp, [N, 4], in any order: equal rows give equal bytes."""
    user_ids, offsets, rows = _group(np.ascontiguousarray(behaviors))
    return Bucket(user_ids, offsets, rows)


@compiled
def _number(behaviors: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """Number the users in the order of their first row: each row's number, [N], and each number's user id, [U]."""
    bits = table_bits(len(behaviors))
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
    """Sort by timestamp, item, category, in place: days come in order of time, which leaves what is of one second."""
    disorder = False
    for i in range(1, len(rows)):
        disorder |= rows[i, 2] < rows[i - 1, 2]
    if disorder:
        rows[:] = rows[np.argsort(rows[:, 2], kind="mergesort")]
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i, 2] != rows[first, 2]:
            if i > first + 1:
                _sort_second(rows[first:i])
            first = i


@compiled
def _sort_second(rows: Ints) -> None:
    """Sort rows of one timestamp by item, then category."""
    disorder = False
    for i in range(1, len(rows)):
        disorder |= rows[i, 0] < rows[i - 1, 0] or (rows[i, 0] == rows[i - 1, 0] and rows[i, 1] < rows[i - 1, 1])
    if disorder:
        for column in (1, 0):
            rows[:] = rows[np.argsort(rows[:, column], kind="mergesort")]


@compiled
def marks_of(offsets: Ints, rows: Ints) -> Marks:
    """Return the mark of each user, [U]: a sum over rows, so that the marks of parts of a history add up."""
    marks = np.zeros(len(offsets) - 1, np.uint64)
    for user in range(len(marks)):
        for i in range(offsets[user], offsets[user + 1]):
            x = np.uint64(0x9E3779B97F4A7C15)
            for column in range(3):
                x = mix(x + np.uint64(rows[i, column]))
            marks[user] += x
    return marks
