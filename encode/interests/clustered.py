"""ENCODE in training: its interests are those that the refresh would make of the embeddings of the moment."""

from __future__ import annotations

import numpy as np

from encode.config import ClusteringConfig, ModelConfig
from encode.interests.kmeans import cluster
from encode.model.ctr import Encode
from encode.model.long_term import Behaviors, Catalog, Ints


def cluster_histories(catalog: Catalog, behaviors: Behaviors, clustering: ClusteringConfig) -> Ints:
    """Return the cluster of each behavior within its history, [N], by spherical k-means over the keys."""
    keys = catalog.key.numpy()[behaviors.item]
    return cluster(keys, behaviors.offsets, behaviors.user_ids, clustering).astype(np.int64)


class Clustered(Encode):
    """ENCODE with its offline stage."""

    def __init__(self, config: ModelConfig, clustering: ClusteringConfig) -> None:
        super().__init__(config)
        self.clustering = clustering

    def assign(self, catalog: Catalog, behaviors: Behaviors) -> Ints:
        """Return the cluster of each behavior within its history, [N]."""
        return cluster_histories(catalog, behaviors, self.clustering)
