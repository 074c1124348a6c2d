"""Refresh day by day: the same as from scratch, for the price of what changed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from plain_rows import plain

from encode.config import ClusteringConfig, Places, RefreshConfig
from encode.data.by_user import group
from encode.data.erasures import erase_users
from encode.data.grouping import group_histories
from encode.data.vocabulary import Vocabulary
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError, ConfigError
from encode.interests import bucket as one_bucket
from encode.interests import kmeans_torch
from encode.interests import refresh as refreshing
from encode.interests.extract import extract
from encode.interests.kmeans import Starts
from encode.interests.refresh import refresh_interests
from encode.interests.snapshots import folder_of, merged, read_rows, write_space
from encode.model.space import Space, SpaceConfig
from encode.pointers import read_current, read_pointer
from encode.schema import bucket_of, day_start
from encode.serving.local_snapshot import fetch_snapshot
from encode.storage import FolderStorage

START = date(2024, 3, 1)
NUM_USERS, NUM_BUCKETS, NUM_ITEMS = 24, 4, 200
CONFIG = RefreshConfig(min_buckets=NUM_BUCKETS, max_deltas=2, max_delta_share=1.0, max_drift=9.0)


def make_space(seed=0, num_clusters=4, widths=(12, 6)):
    """A space in which items lie around eight directions."""
    rng, (D, P) = np.random.default_rng(seed), widths
    vocabulary = Vocabulary(np.arange(1, 9), np.arange(1, NUM_ITEMS + 1), 1 + np.arange(NUM_ITEMS) % 8)
    embedding = rng.normal(size=(10, D))[vocabulary.category_index] + 0.4 * rng.normal(size=(len(vocabulary), D))
    key = embedding @ np.linalg.qr(rng.normal(size=(D, P)))[0]
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    embedding[0] = key[0] = 0
    projection = np.zeros((D, P), np.float32)
    config = SpaceConfig(ClusteringConfig(num_clusters=num_clusters), "relevance", 5, 50)
    return Space(config, vocabulary, embedding.astype(np.float32), key.astype(np.float32), projection, 8.0)


SPACE = make_space()
NOBODY = np.zeros(0, np.int64)


def day(number):
    return START + timedelta(days=number)


def draw(number, users=range(1, NUM_USERS + 1), num_rows=600):
    """Behaviors of some users on a day."""
    rng = np.random.default_rng([number, len(users)])
    items = rng.integers(1, NUM_ITEMS + 1, num_rows)
    times = day_start(day(number)) + rng.integers(0, 86_400, num_rows)
    return np.column_stack([rng.choice(list(users), num_rows), items, 1 + (items - 1) % 8, times])


@pytest.fixture
def run(tmp_path):
    """Refresh as of a day, and return what was said."""
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))

    def refresh(storage, number, spaces=(SPACE,), config=CONFIG):
        said = []
        ids = [space.id for space in spaces]
        refresh_interests(storage, ids, day(number), config, engine, said.append)
        return said

    return refresh


@pytest.fixture
def store(folder, write_day, run):
    """A store as of day 2, everybody clustered."""
    write_space(folder, SPACE, {})
    for number in range(2):
        write_day(folder, day(number), draw(number))
    run(folder, 2)
    return folder


def manifest_of(storage, space=SPACE):
    return read_current(storage, folder_of(space.id))[1]


def rows_of(storage, space=SPACE):
    """The row of each user in the current snapshot."""
    pointer, manifest = read_current(storage, folder_of(space.id))
    prefix = f"{folder_of(space.id)}/{pointer.snapshot}"
    table = []
    for bucket in range(manifest.config["num_buckets"]):
        files = [part.referenced(prefix) for part in manifest.parts if part.name == f"part-{bucket:03d}.arrow"]
        table += [row for batch in merged(read_rows(storage, files, NOBODY)) for row in batch.to_pylist()]
    return {row["user_id"]: row for row in table}


def made(behaviors, before=None, users=None, space=SPACE):
    """What one extraction of whole histories gives: of long ones of users who had rows `before` from those centers."""
    grouped = group(behaviors if users is None else behaviors[np.isin(behaviors[:, 0], users)])
    starts = None
    if before is not None:
        is_long = np.diff(grouped.offsets) >= one_bucket.LONG_HISTORY * space.config.clustering.num_clusters
        known = set(grouped.user_ids[is_long].tolist()) & before.keys()
        centers = [before[user]["center"] if user in known else [] for user in grouped.user_ids.tolist()]
        flat = np.array([center for user in centers for center in user], np.float32)
        starts = Starts(flat, np.append(0, np.cumsum([len(user) for user in centers])))
    rows = extract(grouped.batch(0, len(grouped.user_ids)), space, starts).to_pylist()
    return {row["user_id"]: row for row in rows}


def directions(centers):
    return np.array(centers) / np.linalg.norm(centers, axis=1, keepdims=True)


# --- a day on top of another -------------------------------------------------------------------------------


def test_the_first_snapshot_is_one_extraction_of_everything(store):
    everything = np.concatenate([draw(0), draw(1)])
    assert rows_of(store) == made(everything)
    assert manifest_of(store).counts["clustered"] == NUM_USERS
    assert manifest_of(store).details["drift"] is None


def test_a_day_equals_a_full_rebuild_with_the_same_warm_starts(store, write_day, run):
    """Users with new behaviors from their last centers, the others as they were."""
    before, old = rows_of(store), manifest_of(store)
    new = draw(2, users=(2, 5, 99), num_rows=40)
    write_day(store, day(2), new)
    run(store, 3)
    everything = np.concatenate([draw(0), draw(1), new])
    assert rows_of(store) == before | made(everything, before, [2, 5, 99])
    manifest = manifest_of(store)
    assert manifest.counts == {
        "users": NUM_USERS + 1,
        "behaviors": len(everything),
        "clustered": 3,
        "interests": sum(len(row["size"]) for row in rows_of(store).values()),
    }
    kept = [part for part in manifest.parts if part.at]
    assert [(part.name, part.sha256) for part in kept] == [(part.name, part.sha256) for part in old.parts]
    assert sum(part.rows for part in manifest.parts if part.at is None) == 3


def test_day_after_day_it_stays_close_to_a_cold_rebuild(store, write_day, run, tmp_path):
    """The bound on drift is a promise: the mean inertia within it, everybody warm several times."""
    days = [draw(0), draw(1)]
    config = CONFIG.model_copy(update={"max_drift": 0.01})
    for number in range(2, 7):
        days.append(draw(number, users=range(1 + number % 3, NUM_USERS, 3), num_rows=200))
        write_day(store, day(number), days[-1])
        run(store, number + 1, config=config)
    cold = made(np.concatenate(days))

    def fit(rows):
        """Mean cosine of behaviors to their centers, from what rows tell: the norm of a cluster's sum is not kept."""
        total = 0.0
        for user, row in rows.items():
            own = np.concatenate(days)
            own = own[own[:, 0] == user]
            keys = SPACE.key[SPACE.vocabulary.index(own[:, 1], own[:, 2])]
            total += (2 - 2 * (keys @ directions(row["center"]).T).max(1)).sum()
        return total

    assert fit(rows_of(store)) <= 1.01 * fit(cold) + 1e-9
    assert {user: row["num_behaviors"] for user, row in rows_of(store).items()} == {
        user: row["num_behaviors"] for user, row in cold.items()
    }


def test_drift_above_the_threshold_clusters_everybody_anew(store, write_day, run, monkeypatch):
    monkeypatch.setattr(one_bucket, "_drift", lambda *_: (1.02, 1.0))
    new = draw(2, users=(2, 5), num_rows=40)
    write_day(store, day(2), new)
    said = run(store, 3, config=CONFIG.model_copy(update={"max_drift": 0.01}))
    assert f"space {SPACE.id}: drift 2.00% is above 1.00%: clustering everybody anew" in said
    assert rows_of(store) == made(np.concatenate([draw(0), draw(1), new]))
    assert manifest_of(store).counts["clustered"] == NUM_USERS
    write_day(store, day(3), draw(3, users=(2, 5), num_rows=40))
    assert "clustering everybody anew" not in " ".join(
        run(store, 4, config=CONFIG.model_copy(update={"max_drift": 0.03}))
    )
    assert manifest_of(store).details["drift"] == pytest.approx(0.02)


def test_drift_compares_with_clustering_anew(store, write_day, run):
    """Measured, not assumed: a user whose interests moved altogether is better off anew."""
    before = rows_of(store)
    new = draw(2, num_rows=3000)
    write_day(store, day(2), new)
    run(store, 3)
    drift = manifest_of(store).details["drift"]
    histories = group(np.concatenate([draw(0), draw(1), new]))
    keys = SPACE.key[SPACE.vocabulary.index(histories.rows[:, 0], histories.rows[:, 1])]
    total = []
    for start in (before, None):
        rows = made(histories.behaviors(), start)
        inertias = []
        for place, user in enumerate(histories.user_ids.tolist()):
            own = keys[histories.offsets[place] : histories.offsets[place + 1]]
            inertias.append((2 - 2 * (own @ directions(rows[user]["center"]).T).max(1)).sum())
        total.append(sum(inertias))
    assert drift == pytest.approx(total[0] / total[1] - 1, abs=1e-3)  # here each goes to its nearest center


def test_many_files_are_folded_into_one(store, write_day, run):
    numbers = []
    for number in range(2, 6):
        write_day(store, day(number), draw(number, users=range(1, NUM_USERS, 4), num_rows=100))
        run(store, number + 1)
        names = [part.name for part in manifest_of(store).parts]
        numbers.append(max(names.count(name) for name in names))
    assert numbers == [2, 3, 1, 2]
    rows = rows_of(store)
    assert list(rows) == sorted(rows, key=lambda user: (bucket_of(np.array([user]), NUM_BUCKETS)[0], user))
    assert len(rows) == NUM_USERS
    assert manifest_of(store).counts["interests"] == sum(len(row["size"]) for row in rows.values())


# --- what else can change ----------------------------------------------------------------------------------


def test_a_late_day_changes_only_its_users(store, write_day, run):
    write_day(store, day(4), draw(4, users=(1, 2), num_rows=20))
    run(store, 5)
    before = rows_of(store)
    late = draw(3, users=(7,), num_rows=20)
    write_day(store, day(3), late)
    said = run(store, 4)
    assert f"histories are as of {day(5)} already: refreshing as of that day, not {day(4)}" in said
    everything = np.concatenate([draw(0), draw(1), late, draw(4, users=(1, 2), num_rows=20)])
    assert rows_of(store) == before | made(everything, before, [7])


def test_a_restated_day_changes_only_its_users(store, write_day, run, tmp_path):
    write_day(store, day(2), draw(2, users=(3,), num_rows=20))
    run(store, 3)
    before = rows_of(store)
    shutil.rmtree(tmp_path / "store" / f"behaviors/dt={day(2)}")
    write_day(store, day(2), draw(2, users=(3, 8), num_rows=20))
    run(store, 3)
    everything = np.concatenate([draw(0), draw(1), draw(2, users=(3, 8), num_rows=20)])
    assert manifest_of(store).counts["clustered"] == 2
    assert rows_of(store) == before | made(everything, before, [3, 8])


def test_erased_users_are_in_no_file_and_not_found(store, run, tmp_path):
    before = rows_of(store)
    erase_users(store, [4, 11])
    run(store, 2)
    assert rows_of(store) == {user: row for user, row in before.items() if user not in (4, 11)}
    pointer, manifest = read_current(store, folder_of(SPACE.id))
    prefix = f"{folder_of(SPACE.id)}/{pointer.snapshot}"
    for part in manifest.parts:
        for batch in merged(read_rows(store, [part.referenced(prefix)], NOBODY)):
            assert not {4, 11} & set(batch.column("user_id").to_pylist())
    snapshot = fetch_snapshot(store, prefix, manifest, tmp_path / "cache")
    assert snapshot.find(4) is None
    assert snapshot.find(5) is not None
    assert (manifest.counts["users"], manifest.counts["clustered"]) == (NUM_USERS - 2, 0)
    assert manifest.counts["interests"] == sum(len(row["size"]) for row in rows_of(store).values())


def test_a_new_space_starts_cold_and_the_old_one_goes_on(store, write_day, run):
    other = make_space(seed=1)
    write_space(store, other, {})
    before = rows_of(store)
    new = draw(2, users=(2,), num_rows=10)
    write_day(store, day(2), new)
    run(store, 3, spaces=(SPACE, other))
    everything = np.concatenate([draw(0), draw(1), new])
    assert rows_of(store, other) == made(everything, space=other)
    assert rows_of(store) == before | made(everything, before, [2])


def test_a_log_that_outgrew_its_buckets_starts_cold(store, write_day, run):
    config = CONFIG.model_copy(update={"rows_per_bucket": 1000})
    new = draw(2, num_rows=4000)
    write_day(store, day(2), new)
    run(store, 3, config=config)
    assert manifest_of(store).config["num_buckets"] == 8
    assert rows_of(store) == made(np.concatenate([draw(0), draw(1), new]))


# --- what clusters -----------------------------------------------------------------------------------------


def test_pytorch_clusters_as_well_as_the_kernel(folder, write_day, run):
    """Cold and warm. Which of the two it was is in the snapshot's name, so neither passes for the other."""
    write_space(folder, SPACE, {})
    config = CONFIG.model_copy(update={"kmeans": "torch"})
    behaviors = np.concatenate([draw(0), draw(1, users=(2, 5))])
    write_day(folder, day(0), draw(0))
    run(folder, 1, config=config)
    write_day(folder, day(1), draw(1, users=(2, 5)))
    run(folder, 2, config=config)
    found, manifest = rows_of(folder), manifest_of(folder)
    assert manifest.config["kmeans"] == "torch"
    assert manifest.counts["clustered"] == 2
    cold = made(behaviors)
    assert {user: sum(row["size"]) for user, row in found.items()} == {u: sum(row["size"]) for u, row in cold.items()}
    same = [user for user in cold if found[user]["size"] == cold[user]["size"]]
    assert len(same) >= NUM_USERS - 3  # near ties, and two warm starts
    for user in set(same) - {2, 5}:
        np.testing.assert_allclose(found[user]["center"], cold[user]["center"], atol=1e-5)


@pytest.mark.parametrize("new_day", [False, True])
def test_another_kind_of_k_means_clusters_everybody(store, write_day, run, new_day):
    """So that what the manifest says of a snapshot is so of each of its users."""
    before = manifest_of(store)
    if new_day:
        write_day(store, day(2), draw(2, users=(2, 5)))
    run(store, 2 + new_day, config=CONFIG.model_copy(update={"kmeans": "torch"}))
    manifest = manifest_of(store)
    assert (before.config["kmeans"], manifest.config["kmeans"]) == ("compiled", "torch")
    assert manifest.counts["clustered"] == NUM_USERS
    assert not any(part.at for part in manifest.parts)


def test_pytorch_clusters_on_one_thread_of_its_own(store, run, monkeypatch):
    """A refresh has a thread a bucket already, and sums must not depend on the number of cores."""
    used, mine = set(), torch.get_num_threads()
    original = kmeans_torch.cluster

    def watched(*arguments):
        used.add(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(kmeans_torch, "cluster", watched)
    run(store, 2, config=CONFIG.model_copy(update={"kmeans": "torch"}))
    assert used == {1}
    assert torch.get_num_threads() == mine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(store, run):
    with pytest.raises(ConfigError, match=r"refresh\.kmeans: torch-cuda: .* no CUDA device .* set refresh\.kmeans to"):
        run(store, 3, config=CONFIG.model_copy(update={"kmeans": "torch-cuda"}))


# --- short histories ---------------------------------------------------------------------------------------


def test_short_histories_are_clustered_anew(folder, write_day, run):
    """From last centers, of which each is a behavior of its own, a new kind of behavior would get none."""
    space = make_space(num_clusters=32)
    write_space(folder, space, {})
    users, first, second = np.arange(1, 101), day_start(day(0)), day_start(day(1))
    old = np.array([(user, item, 1 + (item - 1) % 8, first) for user in users for item in range(user, user + 30)])
    new = np.array([(user, item, 1 + (item - 1) % 8, second) for user in users for item in (199, 200)])
    write_day(folder, day(0), old)
    run(folder, 1, spaces=(space,))
    write_day(folder, day(1), new)
    run(folder, 2, spaces=(space,))
    assert manifest_of(folder, space).counts["clustered"] == len(users)
    assert rows_of(folder, space) == made(np.concatenate([old, new]), space=space)
    assert manifest_of(folder, space).details["drift"] is None, "nobody began from last centers"


# --- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from datetime import date
from pathlib import Path
from encode.config import Places, RefreshConfig
from encode.engines.local import LocalEngine
from encode.interests import bucket, refresh
from encode.storage import FolderStorage

def memory(which):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) * 1024

allowed = []
def memory_of(job):
    allowed.append(bucket.memory_of(job)[0])
    return [allowed[-1]]

refresh.memory_of, bucket._BEHAVIORS_PER_BATCH = memory_of, 1 << 12
tiny, large, space, day = sys.argv[1:]
for root in (tiny, large):  # the first loads kernels and whatever else is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the highest until now is forgotten
    before = memory("VmRSS")
    config = RefreshConfig(min_buckets=1, max_deltas=0)
    engine = LocalEngine(config, Places(store=root, scratch=Path(root).parent / "scratch"))
    store, as_of = FolderStorage(Path(root)), date.fromisoformat(day)
    refresh.refresh_interests(store, [space], as_of, config, engine, lambda _: None)
print(memory("VmHWM") - before, allowed[-1])
"""


def test_a_bucket_stays_within_the_memory_that_it_is_allowed(write_day, tmp_path):
    """Of short histories: each behavior is an interest, which is many times as large. From scratch, and folded."""
    space = make_space(num_clusters=32, widths=(64, 16))
    config = RefreshConfig(min_buckets=1, max_deltas=0)
    roots = {name: tmp_path / name / "store" for name in ("tiny", "large")}
    engine = LocalEngine(config, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))
    peaks = []
    for number in range(2):
        for name, num_users in (("tiny", 2_000), ("large", 120_000)):
            storage, users = FolderStorage(roots[name]), np.arange(1, num_users + 1)
            write_space(storage, space, {})
            items = 1 + users % NUM_ITEMS
            times = np.full(num_users, day_start(day(number)))
            write_day(storage, day(number), np.column_stack([users, items, 1 + (items - 1) % 8, times])[:: number + 1])
            group_histories(storage, engine, day(number + 1), config, lambda _: None)
        command = [sys.executable, "-c", MEASURE, *map(str, roots.values()), space.id, str(day(number + 1))]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(tuple(map(int, told.split())))
    assert manifest_of(FolderStorage(roots["large"]), space).counts["users"] == 120_000
    assert all(peak <= allowed for peak, allowed in peaks), peaks
    assert peaks[0][1] < 120_000 * 800, "and it is not allowed just anything"


# --- damage, and what its messages tell to do ----------------------------------------------------------------


def harm_centers(path):
    """Change one float of a center; ids, sizes and everything else stay as they are."""
    data = path.read_bytes()
    centers = pa.ipc.open_file(path).get_batch(0).column("center").flatten().flatten().to_numpy()
    place = data.index(centers[:6].tobytes())
    path.write_bytes(data[:place] + b"\x00\x00\x00\x3f" + data[place + 4 :])


@pytest.mark.parametrize("harm", [harm_centers, lambda path: path.write_bytes(path.read_bytes()[:-90]), Path.unlink])
def test_nothing_is_built_on_a_damaged_snapshot(store, write_day, run, tmp_path, harm):
    pointer = read_pointer(store, folder_of(SPACE.id))[0]
    path = tmp_path / "store" / folder_of(SPACE.id) / pointer.snapshot / "part-000.arrow"
    harm(path)
    new = draw(2)
    write_day(store, day(2), new)
    said = run(store, 3)
    assert any(f"{path}: " in line and line.endswith(": clustering everybody anew") for line in said)
    assert rows_of(store) == made(np.concatenate([draw(0), draw(1), new]))
    assert not any(part.at for part in manifest_of(store).parts)


@pytest.mark.parametrize("new_day", [False, True])
def test_without_its_manifest_a_snapshot_is_made_anew(store, write_day, run, tmp_path, new_day):
    pointer = read_pointer(store, folder_of(SPACE.id))[0]
    prefix = f"{folder_of(SPACE.id)}/{pointer.snapshot}"
    (tmp_path / "store" / prefix / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"{store.uri}/{prefix}: absent or unfinished, .*; refresh again$"):
        manifest_of(store)
    days = [draw(0), draw(1)]
    if new_day:
        days.append(draw(2))
        write_day(store, day(2), days[-1])
    run(store, 2 + new_day)
    assert rows_of(store) == made(np.concatenate(days))
    assert read_pointer(store, folder_of(SPACE.id))[0].as_of == day(2 + new_day)


@pytest.mark.parametrize("ending", [".users.arrow", ".rows.npy"])
def test_a_refresh_on_damaged_histories_says_what_to_remove(store, write_day, run, tmp_path, ending):
    """Doing so, and no more, brings it to its end, though the snapshot at hand is of those histories too."""
    grouped = read_pointer(store, "histories")[0]
    path = tmp_path / "store" / "histories" / grouped.snapshot / f"part-000{ending}"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    other = make_space(seed=1)
    write_space(store, other, {})
    with pytest.raises(ArtifactError) as caught:
        run(store, 2, spaces=(SPACE, other))
    told = re.search(r"remove (\S+) and (\S+) and refresh again$", str(caught.value))
    assert str(caught.value).startswith(f"{path}: damaged: ")
    shutil.rmtree(tmp_path / "store" / told[1])
    (tmp_path / "store" / told[2]).unlink()
    new = draw(2)
    write_day(store, day(2), new)
    run(store, 3, spaces=(SPACE, other))
    everything = np.concatenate([draw(0), draw(1), new])
    assert rows_of(store, other) == made(everything, space=other)
    assert rows_of(store) == made(everything), "who changed is not known without the old index"


# --- interruptions and readers -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_the_old_snapshot_stays_and_the_next_run_goes_on(
    store, write_day, run, dying, tmp_path, monkeypatch, after
):
    kill_at, power_cut = dying
    old = read_pointer(store, folder_of(SPACE.id))[0]
    write_day(store, day(2), draw(2, num_rows=100))
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    run(store, 3)
    contents = {key: store.get(key) for key in store.list("")}
    worked_on = []
    original = refreshing.refresh_bucket
    monkeypatch.setattr(
        refreshing, "refresh_bucket", lambda job, bucket: worked_on.append(bucket) or original(job, bucket)
    )
    grouped, snapshot = 3 * NUM_BUCKETS + 2, 2 * NUM_BUCKETS + 2  # files and result of each, manifest, pointer
    for last in range(1, grouped + snapshot + 1):
        root = tmp_path / f"killed-{last}"
        shutil.copytree(tmp_path / "before", root)
        killed = FolderStorage(root)
        with pytest.raises(power_cut):
            run(kill_at(killed, last, after), 3)
        moved = after and last == grouped + snapshot
        assert (read_pointer(killed, folder_of(SPACE.id))[0] == old) is not moved
        finished = sum(key.startswith("interests/") and key.endswith("result.json") for key in killed.list(""))
        worked_on.clear()
        run(killed, 3)
        # Those of the first snapshot are among the finished.
        assert len(worked_on) == (0 if moved else 2 * NUM_BUCKETS - finished)
        assert {key: killed.get(key) for key in killed.list("")} == contents
    run(kill_at(FolderStorage(tmp_path / "before"), grouped + snapshot + 1), 3)  # there are no more


def test_a_process_killed_again_and_again_gets_there(folder, write_day, run, tmp_path):
    """SIGKILL as soon as another two buckets are finished; in the end every byte is that of one quiet run."""
    settings = {"min_buckets": 16, "engine": "local"}
    write_space(folder, SPACE, {})
    write_day(folder, day(0), draw(0, users=range(1, 2001), num_rows=200_000))
    shutil.copytree(tmp_path / "store", tmp_path / "quiet")
    code = f"""
import sys
from datetime import date
from pathlib import Path
from encode.config import Places, RefreshConfig
from encode.engines.local import LocalEngine
from encode.interests.refresh import refresh_interests
from encode.storage import FolderStorage
root, space = sys.argv[1:]
config = RefreshConfig.model_validate({settings})
engine = LocalEngine(config, Places(store=root, scratch=Path(root).parent / "scratch"))
refresh_interests(FolderStorage(Path(root)), [space], date.fromisoformat("{day(1)}"), config, engine, print)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "store"), SPACE.id]
    finished, kills = 0, 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            now = sum(key.endswith("result.json") for key in folder.list(""))
            if now >= finished + 2 and kills < 3:
                process.kill()
                finished, kills = now, kills + 1
                break
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills == 3
    run(FolderStorage(tmp_path / "quiet"), 1, config=RefreshConfig.model_validate(settings))
    quiet = FolderStorage(tmp_path / "quiet")
    assert {key: folder.get(key) for key in folder.list("")} == {key: quiet.get(key) for key in quiet.list("")}


def test_a_reader_finds_what_the_newest_file_says(store, write_day, run, tmp_path):
    """And fetches only the files that it does not have yet."""
    cache = tmp_path / "cache"

    def fetch(storage):
        pointer, manifest = read_current(store, folder_of(SPACE.id))
        return fetch_snapshot(storage, f"{folder_of(SPACE.id)}/{pointer.snapshot}", manifest, cache)

    fetch(store)
    new = draw(2, users=(2, 5, 99), num_rows=40)
    write_day(store, day(2), new)
    run(store, 3)
    fetched = []

    class Watched:
        def __getattr__(self, name):
            return getattr(store, name)

        def get(self, key):
            fetched.append(key)
            return store.get(key)

    snapshot = fetch(Watched())
    assert len(fetched) == sum(part.at is None for part in manifest_of(store).parts)
    for user, row in rows_of(store).items():
        assert {name: plain(snapshot.find(user)[name]) for name in row} == row
    assert sorted(np.concatenate(list(snapshot.user_ids())).tolist()) == [*range(1, NUM_USERS + 1), 99]
    assert snapshot.num_users == NUM_USERS + 1


def test_on_an_object_store_it_is_the_same(s3, folder, write_day, run):
    """Ranges of objects are read there as they are from files."""
    for one in (s3, folder):
        write_space(one, SPACE, {})
        write_day(one, day(0), draw(0))
        run(one, 1)
        write_day(one, day(1), draw(1, users=(2, 5), num_rows=30))
        run(one, 2)
    keys = folder.list("")
    assert s3.list("") == keys
    assert [key for key in keys if s3.get(key) != folder.get(key)] == []
