"""Samples of snapshots, and one snapshot against the other."""

import numpy as np
import pytest

from encode.data.buckets import files_of
from encode.errors import ArtifactError
from encode.interests.snapshots import folder_of, read_rows
from encode.monitoring.drift import coverage, kept_share, shift, shifts
from encode.monitoring.sample import read_sample
from encode.schema import bucket_of


def sample_of(store, space, one, **options):
    return read_sample(store, f"{folder_of(space.id)}/{one[0]}", one[1], **options)


def every_row(store, space, one):
    name, manifest = one
    prefix = f"{folder_of(space.id)}/{name}"
    rows = {}
    for bucket in range(manifest.config["num_buckets"]):
        for source in read_rows(store, files_of(manifest.parts, bucket, prefix), np.zeros(0, np.int64)):
            rows |= {row["user_id"]: row for batch in source for row in batch.to_pylist()}
    return dict(sorted(rows.items()))


def test_a_sample_of_all_buckets_is_every_user_as_it_is_now(store, space, both):
    """Also of users whose row lies in a later file on top of the base."""
    rows = every_row(store, space, both[1])
    sample = sample_of(store, space, both[1])
    assert sample.user_ids.tolist() == list(rows)
    assert sample.num_behaviors.tolist() == [row["num_behaviors"] for row in rows.values()]
    assert sample.num_interests.tolist() == [len(row["size"]) for row in rows.values()]
    assert sample.sizes.tolist() == [size for row in rows.values() for size in row["size"]]
    assert sample.newest.tolist() == [max(row["newest"]) for row in rows.values()]
    assert sample.rows.to_pylist() == list(rows.values())
    assert sample.largest_share.tolist() == [row["size"][0] / row["num_behaviors"] for row in rows.values()]
    assert sample.mass_by_rank().sum() == pytest.approx(1)
    assert 7 not in rows
    assert {101, 102} <= rows.keys()


def test_a_sample_stops_when_it_has_enough_and_is_the_same_next_time(store, space, both):
    before, now = (sample_of(store, space, one, enough=1) for one in both)
    assert before.num_buckets == now.num_buckets == 1
    assert set(bucket_of(now.user_ids, 4).tolist()) == {0}
    assert set(before.user_ids.tolist()) - {7} <= set(now.user_ids.tolist())


def test_a_damaged_file_is_found(store, space, both):
    prefix = f"{folder_of(space.id)}/{both[1][0]}"
    store.put(both[1][1].parts[0].key(prefix), b"damaged")
    with pytest.raises(ArtifactError, match="damaged"):
        sample_of(store, space, both[1])


def test_users_that_are_kept_and_covered_are_counted(store, space, both):
    before, now = (sample_of(store, space, one) for one in both)
    assert kept_share(before, now) == pytest.approx(59 / 60)  # one was erased
    assert coverage(np.array([1, 1, 2, 7, 500]), now, 4) == 0.5
    one_bucket = sample_of(store, space, both[1], enough=1)
    asked = np.array([*one_bucket.user_ids, 10**6 + np.flatnonzero(bucket_of(10**6 + np.arange(50), 4) > 0)[0]])
    assert coverage(asked, one_bucket, 4) == 1, "of users in buckets that were not read nothing is known"
    assert np.isnan(coverage(np.zeros(0, np.int64), now, 4))


def test_a_shift_is_measured_in_bins_of_before(store, space, both):
    lengths, interests, largest = shifts(*(sample_of(store, space, one) for one in both))
    assert lengths.before.sum() == 60
    assert lengths.after.sum() == 61
    assert lengths.mean_now == pytest.approx(sample_of(store, space, both[1]).num_behaviors.mean())
    assert 0 <= interests.psi < 0.1
    assert set(largest.summary()) == {"psi", "chance", "before", "now"}
    moved = shift("x", np.arange(100), np.arange(100) + 50)
    assert moved.psi > 10 * moved.chance
    assert shift("x", np.zeros(0), np.arange(3)).summary() == {"now": 1.0}
