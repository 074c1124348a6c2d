"""Offline extraction: histories in, interests out, one pure function on Arrow record batches.

U users   N behaviors of all users   P projected_dim   D embedding_dim
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from encode.config import ClusteringConfig, RefreshConfig
from encode.data.histories import rows_of
from encode.errors import ConfigError
from encode.interests import kmeans_torch
from encode.interests.kmeans import Starts, cluster
from encode.interests.lloyd import Labels
from encode.interests.pooling import Behaviors, pool
from encode.interests.remembered import most_frequent
from encode.interests.user_rows import UserRow
from encode.model.files import UserState
from encode.model.space import Space
from encode.schema import interests_schema

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


Kernel = Callable[[Floats, Ints, Ints, ClusteringConfig, Starts | None], Labels]
"""Spherical k-means of many users: `kmeans.cluster`, or what computes the same elsewhere."""


def kernel_of(config: RefreshConfig) -> Kernel:
    """Return what clusters on the calling thread: a refresh has one for each bucket.

    Raises:
        ConfigError: it needs a GPU and there is none.
    """
    if config.kmeans == "compiled":
        return partial(cluster, num_threads=1)
    if config.kmeans == "torch":
        return _torch_on_one_thread
    if not torch.cuda.is_available():
        raise ConfigError(
            f"refresh.kmeans: torch-cuda: PyTorch {torch.__version__} finds no CUDA device on {platform.node()}; "
            "run where there is one, with a wheel of torch built for it, or set refresh.kmeans to compiled"
        )
    return partial(kmeans_torch.cluster, device="cuda")


def _torch_on_one_thread(
    keys: Floats, offsets: Ints, seeds: Ints, config: ClusteringConfig, starts: Starts | None
) -> Labels:
    torch.set_num_threads(1)  # of this thread, and of those that begin later
    return kmeans_torch.cluster(keys, offsets, seeds, config, starts)


def extract(
    histories: pa.RecordBatch, space: Space, starts: Starts | None = None, kernel: Kernel = cluster
) -> pa.RecordBatch:
    """Cluster each history in the space and pool each cluster: the offline stage of ENCODE, target-free.

    With the compiled kernel the result depends on each user's row and starts alone, to the bit: neither the other users
    of the batch nor their order nor the number of threads matter. PyTorch's sums may round otherwise in another batch,
    with other threads or on another GPU; the same call on the same machine repeats itself. Nothing here holds the GIL
    for long, so several threads may extract at once.

    Args:
        histories: rows of `schema.HISTORIES`, behaviors oldest first; a user without behaviors gets no interests.
        space: embeddings, reducer, relevance and clustering settings.
        starts: centers that each user's clustering starts from, in the order of `histories`.
        kernel: what clusters; by default the compiled one, on all cores. The rest runs on the caller's thread.

    Returns:
        Rows of `schema.interests_schema`, in the order of the input, largest interest first (lower label first
        among equals).

    Raises:
        DataError: a key of the space is not finite.
    """
    user_ids = histories.column("user_id").to_numpy()
    offsets = _offsets(histories.column("item_id"))
    item_ids, category_ids, timestamps = (
        _values(histories.column(name)) for name in ("item_id", "category_id", "timestamp")
    )
    clustering = space.config.clustering
    index = space.vocabulary.index(item_ids, category_ids)
    key = space.key.take(index, axis=0)
    labels = kernel(key, offsets, user_ids, clustering, starts)
    behaviors = Behaviors(offsets, index, key, item_ids, timestamps)
    by_relevance = space.config.pooling == "relevance"
    pooled = pool(labels, behaviors, space.embedding, space.scale, by_relevance, clustering.num_clusters)
    kept = most_frequent(index, offsets, space.config.num_remembered)
    recent, recent_offsets = _recent(offsets, space.config.recent_length)
    columns = [
        pa.array(user_ids),
        pa.array(np.diff(offsets)),
        _ragged(_vectors(pooled.center), pooled.offsets),
        _ragged(_vectors(pooled.variance), pooled.offsets),
        _ragged(_vectors(pooled.value), pooled.offsets),
        _ragged(pa.array(pooled.size), pooled.offsets),
        _ragged(pa.array(pooled.newest), pooled.offsets),
        _ragged(_ragged(pa.array(pooled.top_items), pooled.top_offsets), pooled.offsets),
        *(_ragged(pa.array(column), kept.offsets) for column in (kept.item, kept.times)),
        *(_ragged(pa.array(column[recent]), recent_offsets) for column in (item_ids, category_ids, timestamps)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema_of(space))


def schema_of(space: Space) -> pa.Schema:
    """Return the columns of interests in a space."""
    return interests_schema(space.key.shape[1], space.embedding.shape[1])


def state_of(row: UserRow | None, space: Space) -> UserState:
    """Turn a user's row into what the model reads; None gives a user without interests."""
    num_clusters, length = space.config.clustering.num_clusters, space.config.recent_length
    center, variance = np.zeros((2, num_clusters, space.key.shape[1]), np.float32)
    value = np.zeros((num_clusters, space.embedding.shape[1]), np.float32)
    size = np.zeros(num_clusters, np.float32)
    recent = np.zeros(length, np.int64)
    index, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if row is not None:
        for name, part in (("center", center), ("variance", variance), ("value", value), ("size", size)):
            found = row[name]
            part[: len(found)] = found
        index, times = (row[name].astype(np.int64) for name in ("item_index", "item_times"))
        items = row["recent_item_id"]
        recent[: len(items)] = space.vocabulary.index(items, row["recent_category_id"])
    category = space.vocabulary.category_index[index]
    return UserState(center, value, size, variance, space.scale, index, times, category, recent)


def _recent(offsets: Ints, length: int) -> tuple[Ints, Ints]:
    """Return the positions of each user's last `length` behaviors, oldest first, and where each user's start."""
    return rows_of(np.maximum(offsets[:-1], offsets[1:] - length), offsets[1:])


def _offsets(column: pa.ListArray) -> Ints:
    offsets: Ints = column.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _values(column: pa.ListArray) -> Ints:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)


def _vectors(rows: Floats) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _ragged(values: pa.Array, offsets: npt.NDArray[Any]) -> pa.ListArray:
    # int32 is enough: no list here has more entries than there are behaviors, which int32 offsets counted already.
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
