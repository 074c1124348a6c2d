"""Interests: clustering histories, pooling clusters, publishing snapshots."""
