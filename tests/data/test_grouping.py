"""Days grouped by bucket: whatever came in which order, the histories are those of all days together."""

from __future__ import annotations

import io
import re
import shutil
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from encode.config import Places, RefreshConfig
from encode.data import grouping
from encode.data.buckets import ROWS, USERS, read_bucket
from encode.data.by_user import group
from encode.data.erasures import ERASURES, erase_users, erased_users
from encode.data.grouping import group_histories
from encode.data.histories import history_batch, read_histories
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError, ConfigError
from encode.pointers import read_pointer
from encode.schema import bucket_of, day_start
from encode.storage import FolderStorage

START = date(2024, 3, 1)
CONFIG = RefreshConfig(min_buckets=4, max_deltas=3, max_delta_share=1.0)


def day(number):
    return START + timedelta(days=number)


def draw(number, num_rows=120, num_users=30):
    rng = np.random.default_rng(number)
    columns = (rng.integers(1, high, num_rows) for high in (num_users + 1, 40, 5))
    return np.column_stack([*columns, day_start(day(number)) + rng.integers(0, 500, num_rows)])


@pytest.fixture
def storage(tmp_path):
    return FolderStorage(tmp_path / "store")


@pytest.fixture
def bring_up(tmp_path, storage):
    """Group all days before a day, and say what was said."""
    engine = LocalEngine(CONFIG, Places(store=str(tmp_path), scratch=tmp_path / "scratch"))
    said = []

    def run(end, config=CONFIG, storage=storage):
        said.clear()
        return group_histories(storage, engine, day(end), config, said.append), said

    return run


def histories_of(storage, grouped):
    buckets = [read_bucket(storage, grouped.prefix, grouped.manifest.parts, b) for b in range(grouped.num_buckets)]
    return group(np.concatenate([bucket.behaviors() for bucket in buckets])).behaviors().tolist()


def expected(*numbers):
    return group(np.concatenate([draw(number) for number in numbers])).behaviors().tolist()


def test_all_days_before_the_end_are_in(storage, write_day, bring_up):
    for number in range(4):
        write_day(storage, day(number), draw(number))
    grouped, _ = bring_up(3)
    assert histories_of(storage, grouped) == expected(0, 1, 2)
    assert grouped.manifest.counts == {"users": 30, "behaviors": 360}
    assert (grouped.as_of, grouped.num_buckets) == (day(3), 4)
    in_memory, _ = read_histories(storage, day(3))
    both = [(b["user_id"], b["item_id"]) for b in history_batch(in_memory, np.arange(30)).to_pylist()]
    pieces = [read_bucket(storage, grouped.prefix, grouped.manifest.parts, b) for b in range(4)]
    rows = [row for piece in pieces for row in piece.batch(0, len(piece.user_ids)).to_pylist()]
    assert sorted((row["user_id"], row["item_id"]) for row in rows) == both


def test_a_rerun_writes_nothing(storage, write_day, bring_up, dying):
    write_day(storage, day(0), draw(0))
    first, _ = bring_up(1)
    again, said = bring_up(1, storage=dying[0](storage, 1))
    assert again == first
    assert said == [f"histories {first.snapshot} are there already"]


def test_a_new_day_adds_files_and_copies_none(storage, write_day, bring_up):
    write_day(storage, day(0), draw(0))
    first, _ = bring_up(1)
    write_day(storage, day(1), draw(1)[:3])
    second, _ = bring_up(2)
    parts = second.manifest.parts
    assert [part.referenced(second.prefix) for part in parts if part.at] == [
        part.referenced(first.prefix) for part in first.manifest.parts
    ]
    own = [part for part in parts if part.at is None]
    assert sum(part.rows for part in own if part.name.endswith(ROWS)) == 3
    assert {part.name[:8] for part in own} == {f"part-{b:03d}" for b in bucket_of(draw(1)[:3, 0], 4).tolist()}
    assert histories_of(storage, second) == group(np.concatenate([draw(0), draw(1)[:3]])).behaviors().tolist()
    assert second.manifest.counts == {"users": 30, "behaviors": 123}
    assert histories_of(storage, first) == expected(0), "the earlier state still stands"


def test_a_late_day_is_merged_by_time(storage, write_day, bring_up):
    for number in (0, 2):
        write_day(storage, day(number), draw(number))
    bring_up(3)
    write_day(storage, day(1), draw(1))
    grouped, said = bring_up(3)
    assert "grouping 120 behaviors of 1 partition on top of" in said[0]
    assert histories_of(storage, grouped) == expected(0, 1, 2)


@pytest.mark.parametrize("change", ["restated", "removed"])
def test_a_day_that_changed_groups_everything_anew(storage, write_day, bring_up, tmp_path, change):
    for number in range(3):
        write_day(storage, day(number), draw(number))
    bring_up(3)
    shutil.rmtree(tmp_path / "store" / f"behaviors/dt={day(1)}")
    if change == "restated":
        write_day(storage, day(1), draw(7))
    grouped, said = bring_up(3)
    what = "validated again" if change == "restated" else "removed"
    assert said[0] == f"histories: behaviors/dt={day(1)} was {what}; grouping all behaviors anew"
    assert histories_of(storage, grouped) == (expected(0, 7, 2) if change == "restated" else expected(0, 2))
    assert not any(part.at for part in grouped.manifest.parts)


def test_a_log_that_outgrew_its_buckets_is_grouped_anew(storage, write_day, bring_up, monkeypatch):
    config = RefreshConfig(min_buckets=4, rows_per_bucket=1000)
    for number in range(2):
        write_day(storage, day(number), draw(number, num_rows=2500))
        grouped, said = bring_up(number + 1, config)
    assert said[0] == "histories: 5,000 behaviors need more than 4 buckets; grouping all behaviors anew"
    assert grouped.num_buckets == 8
    both = np.concatenate([draw(0, 2500), draw(1, 2500)])
    assert histories_of(storage, grouped) == group(both).behaviors().tolist()


def test_many_files_are_folded_into_one(storage, write_day, bring_up):
    files = []
    for number in range(6):
        write_day(storage, day(number), draw(number, num_rows=120 if number else 600))
        grouped, _ = bring_up(number + 1)
        files.append(sum(part.name == "part-001.rows.npy" for part in grouped.manifest.parts))
    assert files == [1, 2, 3, 4, 1, 2]
    everything = np.concatenate([draw(0, 600), *(draw(number) for number in range(1, 6))])
    assert histories_of(storage, grouped) == group(everything).behaviors().tolist()


def test_large_files_are_folded_into_one(storage, write_day, bring_up):
    config = RefreshConfig(min_buckets=4, max_deltas=100, max_delta_share=0.3)
    files = []
    for number in range(5):
        write_day(storage, day(number), draw(number, num_rows=1000 if number == 0 else 200))
        grouped, _ = bring_up(number + 1, config)
        files.append(sum(part.name == "part-001.rows.npy" for part in grouped.manifest.parts))
    assert files == [1, 2, 3, 1, 2]


def test_erased_users_are_in_no_file(storage, write_day, bring_up):
    for number in range(3):
        write_day(storage, day(number), draw(number))
    bring_up(2)
    assert erase_users(storage, [3, 17]) == 2
    grouped, _ = bring_up(3)
    everything = np.concatenate([draw(number) for number in range(3)])
    kept = everything[~np.isin(everything[:, 0], [3, 17])]
    assert histories_of(storage, grouped) == group(kept).behaviors().tolist()
    assert grouped.manifest.counts == {"users": 28, "behaviors": len(kept)}
    for part in grouped.manifest.parts:
        if part.name.endswith(ROWS):
            rows = np.load(io.BytesIO(storage.get(part.key(grouped.prefix)))).tolist()
            assert {tuple(row) for row in rows} <= {tuple(row[1:]) for row in kept.tolist()}
    untouched = [part for part in grouped.manifest.parts if part.at]
    assert untouched, "buckets without them are left as they are"
    assert read_histories(storage, day(3))[0].user_ids.tolist() == sorted(set(range(1, 31)) - {3, 17})
    write_day(storage, day(3), [(3, 1, 1, day_start(day(3)) + 5)])
    assert bring_up(4)[0].manifest.counts == grouped.manifest.counts, "they stay out when they come again"


def test_erasures_add_up_and_refuse_what_is_no_user(storage):
    assert erased_users(storage).tolist() == []
    erase_users(storage, [5, 2])
    assert erase_users(storage, [2, 9]) == 3
    assert erased_users(storage).tolist() == [2, 5, 9]
    with pytest.raises(ConfigError, match="erase: -1 is not a user id"):
        erase_users(storage, [1, -1])


@pytest.mark.parametrize("user", ['"x"', "1.9", "2.0", "true", "0", "-3", str(2**63), "[1]"])
@pytest.mark.parametrize("data", ['{"users": [5, %s]}', "[%s]", "{}", "x"])
def test_a_list_of_erasures_that_names_no_users_is_refused(storage, data, user):
    """Rounded or misread, it would erase somebody else."""
    storage.put(ERASURES, data.replace("%s", user).encode())
    with pytest.raises(ArtifactError, match=r'erasures\.json: not \{"users": \[ids\]\} .*; mend it'):
        erased_users(storage)


# --- damage, and what its messages tell to do ----------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ending", [ROWS, USERS])
@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["damaged", "missing"])
def test_a_base_that_is_damaged_is_left_behind(storage, write_day, bring_up, tmp_path, ending, harm):
    """Noticed when a day is folded in: all is grouped anew in the same run."""
    write_day(storage, day(0), draw(0))
    first, _ = bring_up(1)
    harm(tmp_path / "store" / first.prefix / f"part-001{ending}")
    write_day(storage, day(1), draw(1))
    grouped, said = bring_up(2, RefreshConfig(min_buckets=4, max_deltas=0))
    (told,) = [line for line in said if "grouping all behaviors anew" in line]
    assert f"{storage.uri}/{first.prefix}/part-001{ending}: " in told
    assert histories_of(storage, grouped) == expected(0, 1)
    assert not any(part.at for part in grouped.manifest.parts)
    assert read_pointer(storage, "histories")[0].snapshot == grouped.snapshot


@pytest.mark.parametrize("new_day", [False, True])
def test_without_the_manifest_of_the_current_histories_refreshing_again_helps(
    storage, write_day, bring_up, tmp_path, new_day
):
    write_day(storage, day(0), draw(0))
    first, _ = bring_up(1)
    (tmp_path / "store" / first.prefix / "manifest.json").unlink()
    if new_day:
        write_day(storage, day(1), draw(1))
    grouped, said = bring_up(1 + new_day)
    assert said[0].startswith(f"{storage.uri}/{first.prefix}: absent or unfinished")
    assert histories_of(storage, grouped) == (expected(0, 1) if new_day else expected(0))
    assert read_pointer(storage, "histories")[0].snapshot == grouped.snapshot


def test_with_a_damaged_manifest_of_the_current_histories_what_the_message_says_helps(
    storage, write_day, bring_up, tmp_path
):
    write_day(storage, day(0), draw(0))
    first, _ = bring_up(1)
    storage.put(f"{first.prefix}/manifest.json", b"{")
    with pytest.raises(ArtifactError, match=r"not a manifest .*; remove the output and run its step again") as caught:
        bring_up(1)
    assert str(caught.value).startswith(f"{storage.uri}/{first.prefix}/manifest.json: ")
    shutil.rmtree(tmp_path / "store" / first.prefix)
    assert histories_of(storage, bring_up(1)[0]) == expected(0)


@pytest.mark.parametrize("ending", [ROWS, USERS])
@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["damaged", "missing"])
def test_a_reader_of_damaged_histories_is_told_what_to_remove(storage, write_day, bring_up, tmp_path, ending, harm):
    """Doing so, and no more, leaves whole histories."""
    for number in range(2):
        write_day(storage, day(number), draw(number))
        grouped, _ = bring_up(number + 1)
    part = next(part for part in grouped.manifest.parts if part.at and part.name.endswith(ending))
    harm(tmp_path / "store" / part.key(""))
    with pytest.raises(ArtifactError) as caught:
        histories_of(storage, grouped)
    told = re.search(r"remove (\S+) and (\S+) and refresh again$", str(caught.value))
    assert str(caught.value).startswith(f"{storage.uri}/{part.key('')}: ")
    shutil.rmtree(tmp_path / "store" / told[1])
    (tmp_path / "store" / told[2]).unlink()
    assert histories_of(storage, bring_up(2)[0]) == expected(0, 1)


# --- interruptions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_it_goes_on_after_the_buckets_that_are_finished(
    storage, write_day, bring_up, dying, tmp_path, monkeypatch, after
):
    store, power_cut = dying
    for number in range(2):
        write_day(storage, day(number), draw(number))
    bring_up(1)
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    clean, _ = bring_up(2)
    contents = {key: storage.get(key) for key in storage.list("")}
    worked_on, read = [], []
    original, original_read = grouping._bucket, grouping._read
    monkeypatch.setattr(grouping, "_read", lambda job, source: read.append(source) or original_read(job, source))
    monkeypatch.setattr(
        grouping, "_bucket", lambda job, bucket, rows: worked_on.append(bucket) or original(job, bucket, rows)
    )
    for last in range(1, 15):  # files of users, of rows and the result of 4 buckets, the manifest, the pointer
        root = tmp_path / f"killed-{last}"
        shutil.copytree(tmp_path / "before", root)
        killed = FolderStorage(root)
        with pytest.raises(power_cut):
            bring_up(2, storage=store(killed, last, after))
        moved = last == 14 and after
        assert read_pointer(killed, "histories")[0].as_of == (day(2) if moved else day(1))
        finished = sum(key.startswith(f"{clean.prefix}/") and key.endswith("result.json") for key in killed.list(""))
        worked_on.clear()
        read.clear()
        assert bring_up(2, storage=killed)[0] == clean
        assert len(worked_on) == (0 if moved else 4 - finished)
        assert len(read) == (0 if finished == 4 else 2), "files of the new day"
        assert {key: killed.get(key) for key in killed.list("")} == contents
