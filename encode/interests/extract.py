"""Offline extraction: histories in, interests out, one pure function on Arrow record batches.

U users   N behaviors of all users   K num_clusters   S non-empty clusters of all users
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encode.data.histories import rows_of
from encode.interests.kmeans import cluster
from encode.model.files import UserState, user_state
from encode.model.relevance import pool_interests
from encode.model.reproducible import reproducible
from encode.model.space import Space
from encode.schema import interests_schema

Ints = npt.NDArray[np.int64]
_NUM_TOP_ITEMS = 5


def extract(histories: pa.RecordBatch, space: Space) -> pa.RecordBatch:
    """Cluster each history in the space and pool each cluster: the offline stage of ENCODE, target-free.

    The result depends on each user's row alone: neither the other users of the batch nor their order matter.

    Args:
        histories: rows of `schema.HISTORIES`, behaviors oldest first; a user without behaviors gets no interests.
        space: embeddings, reducer, relevance and clustering settings.

    Returns:
        Rows of `schema.interests_schema`, in the order of the input, largest interest first (older cluster first
        among equals).
    """
    user_ids = histories.column("user_id").to_numpy()
    offsets = _offsets(histories.column("item_id"))
    item_ids, category_ids, timestamps = (
        _values(histories.column(name)) for name in ("item_id", "category_id", "timestamp")
    )
    num_clusters = space.config.clustering.num_clusters
    index = space.vocabulary.index(item_ids, category_ids)
    key = space.key[index]
    labels = cluster(key, offsets, user_ids, space.config.clustering)
    segment = np.repeat(np.arange(len(user_ids)), np.diff(offsets)) * num_clusters + labels
    with torch.no_grad(), reproducible(1):
        interests = pool_interests(
            torch.from_numpy(space.embedding[index]),
            torch.from_numpy(key),
            torch.from_numpy(segment),
            len(user_ids),
            num_clusters,
            torch.tensor(space.scale),
            space.config.pooling == "relevance",
        )
    size = np.bincount(segment, minlength=len(user_ids) * num_clusters)
    newest = np.zeros(len(size), np.int64)
    np.maximum.at(newest, segment, timestamps)
    slots = _slots_by_size(size, num_clusters)
    interest_offsets = np.searchsorted(slots // num_clusters, np.arange(len(user_ids) + 1))
    recent, recent_offsets = _recent(offsets, space.config.recent_length)
    schema = interests_schema(key.shape[1], space.embedding.shape[1])
    columns = [
        user_ids,
        np.diff(offsets),
        _ragged(_vectors(interests.center, slots, schema, "center"), interest_offsets),
        _ragged(_vectors(interests.value, slots, schema, "value"), interest_offsets),
        _ragged(pa.array(size[slots]), interest_offsets),
        _ragged(pa.array(newest[slots]), interest_offsets),
        _ragged(_top_items(segment, item_ids, slots), interest_offsets),
        *(_ragged(pa.array(column[recent]), recent_offsets) for column in (item_ids, category_ids, timestamps)),
    ]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def state_of(row: dict[str, Any] | None, space: Space) -> UserState:
    """Turn a user's row, Arrow scalars by column, into what the model reads; None gives a user without interests."""
    num_clusters, length = space.config.clustering.num_clusters, space.config.recent_length
    center = np.zeros((num_clusters, space.key.shape[1]), np.float32)
    value = np.zeros((num_clusters, space.embedding.shape[1]), np.float32)
    size = np.zeros(num_clusters, np.float32)
    recent = np.zeros(length, np.int64)
    if row is not None:
        sizes = row["size"].values.to_numpy()
        count = len(sizes)
        center[:count] = row["center"].values.flatten().to_numpy().reshape(count, center.shape[1])
        value[:count] = row["value"].values.flatten().to_numpy().reshape(count, value.shape[1])
        size[:count] = sizes
        items, categories = (row[f"recent_{name}"].values.to_numpy() for name in ("item_id", "category_id"))
        recent[: len(items)] = space.vocabulary.index(items, categories)
    return user_state(torch.from_numpy(center), torch.from_numpy(value), torch.from_numpy(size), recent)


def _slots_by_size(size: Ints, num_clusters: int) -> Ints:
    """Return the non-empty slots user by user, largest first."""
    slots = np.flatnonzero(size)
    return slots[np.lexsort((slots, -size[slots], slots // num_clusters))]


def _recent(offsets: Ints, length: int) -> tuple[Ints, Ints]:
    """Return the positions of each user's last `length` behaviors, oldest first, and where each user's start."""
    return rows_of(np.maximum(offsets[:-1], offsets[1:] - length), offsets[1:])


def _top_items(segment: Ints, item_ids: Ints, slots: Ints) -> pa.ListArray:
    """Return for each slot its most frequent items, at most 5, the smaller id first among equals."""
    order = np.lexsort((item_ids, segment))
    segment, item_ids = segment[order], item_ids[order]
    first = np.flatnonzero(np.append(True, (segment[1:] != segment[:-1]) | (item_ids[1:] != item_ids[:-1])))
    if len(segment) == 0:
        first = first[:0]
    counts = np.diff(first, append=len(segment))
    segment, item_ids = segment[first], item_ids[first]
    order = np.lexsort((item_ids, -counts, segment))
    segment, item_ids = segment[order], item_ids[order]
    rank = np.arange(len(segment)) - np.searchsorted(segment, segment)
    segment, item_ids = segment[rank < _NUM_TOP_ITEMS], item_ids[rank < _NUM_TOP_ITEMS]
    place, offsets = rows_of(np.searchsorted(segment, slots), np.searchsorted(segment, slots, "right"))
    return _ragged(pa.array(item_ids[place]), offsets)


def _offsets(column: pa.ListArray) -> Ints:
    return np.append(0, np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))).astype(np.int64)


def _values(column: pa.ListArray) -> Ints:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)


def _vectors(tensor: torch.Tensor, slots: Ints, schema: pa.Schema, name: str) -> pa.FixedSizeListArray:
    flat = tensor.flatten(0, 1).numpy()[slots]
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), type=schema.field(name).type.value_type)


def _ragged(values: pa.Array, offsets: Ints) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
