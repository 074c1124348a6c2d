"""Rows of a snapshot as views of its memory, so that a user costs no more than the slices that are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

_View = Callable[[int], Any]


class UserRow:
    """A user's row by column of `interests_schema`: numbers, arrays, and of `top_items` a list of arrays."""

    __slots__ = ("_place", "_views")

    def __init__(self, views: dict[str, _View], place: int) -> None:
        self._views, self._place = views, place

    def __getitem__(self, name: str) -> Any:
        return self._views[name](self._place)


class UserRows:
    """The rows of a batch or table of `interests_schema`."""

    def __init__(self, rows: pa.RecordBatch | pa.Table) -> None:
        columns = {name: rows.column(name) for name in rows.schema.names}
        self._views = {
            name: _view(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
            for name, column in columns.items()
        }
        self._count = int(rows.num_rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> UserRow:
        if not 0 <= place < self._count:
            raise IndexError(f"row {place} of {self._count}")
        return UserRow(self._views, place)

    def __iter__(self) -> Iterator[UserRow]:
        return map(self.__getitem__, range(self._count))


def _view(column: pa.Array) -> _View:
    """Return what reads one value of a column."""
    if not pa.types.is_list(column.type):
        values = column.to_numpy()
        return lambda place: values[place].item()
    bounds, inner = column.offsets.to_numpy(), column.values
    if pa.types.is_list(inner.type):
        within = _view(inner)
        return lambda place: [within(one) for one in range(bounds[place], bounds[place + 1])]
    if pa.types.is_fixed_size_list(inner.type):
        flat = inner.flatten().to_numpy().reshape(-1, inner.type.list_size)
    else:
        flat = inner.to_numpy()
    return lambda place: flat[bounds[place] : bounds[place + 1]]
