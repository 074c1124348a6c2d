"""What was rejected is judged anew: nothing is lost, nothing is there twice, and what was published stays."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import closing
from datetime import date, timedelta

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encode import steps
from encode.config import Config, Places, RefreshConfig, SourceConfig, ValidationConfig
from encode.data.grouping import group_histories
from encode.data.histories import read_histories
from encode.data.parquet import parquet_bytes, read_parquet
from encode.data.partitions import published_days, validated_days
from encode.data.validation import replay_window, validate_window
from encode.engines.local import LocalEngine
from encode.errors import ArtifactError, DataError, QualityError
from encode.outputs import read_manifest
from encode.schema import Window, day_start
from encode.storage import FolderStorage

DAY = date(2024, 3, 5)
NOON = day_start(DAY) + 43_200
NAMES = ("user_id", "item_id", "category_id", "behavior", "timestamp")
ONE_DAY = Window(DAY, DAY + timedelta(days=1))


def config(time_unit="s", **validation):
    rules = {"max_rejected_share": 1.0} | validation
    return Config(name="test", source=SourceConfig(time_unit=time_unit), validation=ValidationConfig(**rules))


def put_rows(storage, rows, day=DAY):
    columns = {key: pa.array(column) for key, column in zip(NAMES, zip(*rows, strict=True), strict=True)}
    storage.put(f"raw/dt={day}/export.parquet", parquet_bytes(pa.table(columns)))


def good_rows(count, behavior="pv", day=DAY):
    return [(1 + i % 7, 1 + i, i % 3, behavior, day_start(day) + i) for i in range(count)]


def published(storage, day=DAY):
    """All behaviors of a day, as rows."""
    rows = []
    for prefix in published_days(storage)[day]:
        for part in read_manifest(storage, prefix).parts:
            table = read_parquet(storage.get(f"{prefix}/{part.name}"))
            rows += [tuple(row.values()) for row in table.to_pylist()]
    return rows


def rejected(storage, prefix):
    return read_parquet(storage.get(f"{prefix}/part-00000.parquet")).to_pylist()


def last_quarantine(storage, day=DAY):
    return published_days(storage)[day][-1].replace("behaviors", "quarantine")


def content(storage):
    return {key: hashlib.sha256(storage.get(key)).hexdigest() for key in storage.list("")}


def test_rows_of_a_behavior_that_is_allowed_by_now_become_part_of_the_day(storage):
    carts = [(9, 90 + i, 1, "cart", NOON + i) for i in range(4)]
    put_rows(storage, [*good_rows(20), *carts, (0, 1, 1, "pv", NOON), carts[0]])
    validate_window(storage, ONE_DAY, config(behaviors=("pv",)))
    before = content(storage)
    wider = config(behaviors=("pv", "cart"))
    with pytest.raises(DataError, match=r"validation.behaviors changed since.*encode replay --start 2024-03-05"):
        validate_window(storage, ONE_DAY, wider)
    summary = replay_window(storage, ONE_DAY, wider)
    assert (summary["rows"], summary["accepted"], summary["rejected"], summary["replayed"]) == (26, 24, 2, 4)
    assert summary["reasons"] == {"duplicate": 1, "user_id_not_positive": 1}
    assert Counter(published(storage)) == Counter([*good_rows(20), *carts])
    assert [(row["row"], row["reason"]) for row in rejected(storage, f"quarantine/dt={DAY}/replay-001")] == [
        (25, "user_id_not_positive"),
        (26, "duplicate"),
    ]
    manifest = read_manifest(storage, f"behaviors/dt={DAY}/replay-001")
    assert manifest.counts == {"rows": 4, "raw_rows": 26, "rejected": 2, "without_category": 7, "users": 8}
    after = content(storage)
    assert after.items() > before.items()
    said = []
    again = replay_window(storage, ONE_DAY, wider, said.append)
    assert again == summary | {"validated": 0, "unchanged": 1, "replayed": 0, "added": 0}
    assert said[:2] == [
        "0 days to replay, 1 validated before",
        "nothing was replayed: neither the raw data nor the settings of these days changed since they were validated",
    ]
    assert again.pop("waiting") == [f"behaviors/dt={DAY}", f"behaviors/dt={DAY}/replay-001"]  # for the first refresh
    assert validate_window(storage, ONE_DAY, wider) == again
    assert content(storage) == after


def test_rows_in_another_unit_of_time_are_added_and_those_published_stay(tmp_path):
    storage = FolderStorage(tmp_path)
    late = [(8, 80 + i, 1, "pv", (NOON + i) * 1000) for i in range(3)]
    twice = (1, 1, 0, "pv", day_start(DAY) * 1000)  # the first of the good rows, in milliseconds
    put_rows(storage, [*good_rows(20), *late, twice])
    validate_window(storage, ONE_DAY, config())
    summary = replay_window(storage, ONE_DAY, config("ms"))
    assert (summary["replayed"], summary["reasons"]) == (3, {"duplicate": 1})
    assert Counter(published(storage)) == Counter([*good_rows(20), *((*r[:4], r[4] // 1000) for r in late)])


def test_a_day_that_was_landed_again_gets_what_was_mended(tmp_path):
    storage = FolderStorage(tmp_path)
    bad = [(None, 70, 1, "pv", NOON), (None, 71, 1, "pv", NOON), (0, 72, 1, "pv", NOON)]
    put_rows(storage, [*good_rows(20), *bad])
    validate_window(storage, ONE_DAY, config())
    mended = [(5, 70, 1, "pv", NOON), (6, 71, 1, "pv", NOON), (0, 72, 1, "pv", NOON)]
    more = (6, 99, 2, "pv", NOON)
    put_rows(storage, [more, *reversed(good_rows(20)), *mended, good_rows(20)[3]])
    with pytest.raises(DataError, match="the raw data changed since"):
        validate_window(storage, ONE_DAY, config())
    summary = replay_window(storage, ONE_DAY, config())
    assert (summary["rows"], summary["accepted"], summary["replayed"]) == (25, 23, 3)
    assert summary["reasons"] == {"duplicate": 1, "user_id_not_positive": 1}
    assert Counter(published(storage)) == Counter([*good_rows(20), *mended[:2], more])
    assert replay_window(storage, ONE_DAY, config())["unchanged"] == 1


def test_rows_that_were_published_must_be_in_a_day_that_is_landed_again(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), (0, 1, 1, "pv", NOON)])
    validate_window(storage, ONE_DAY, config())
    before = content(storage)
    put_rows(storage, [*good_rows(18), (4, 1, 1, "pv", NOON)])
    with pytest.raises(DataError, match=r"2 of the 20 rows that were published are not in it.*validate the day anew"):
        replay_window(storage, ONE_DAY, config())
    assert {key: value for key, value in content(storage).items() if not key.startswith("raw/")} == {
        key: value for key, value in before.items() if not key.startswith("raw/")
    }


def test_a_replay_in_which_nothing_is_good_by_now_says_so_and_adds_nothing(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), (1, 1, 1, "cart", NOON)])
    assert validate_window(storage, ONE_DAY, config(behaviors=("pv",)))["added"] == 20
    said = []
    summary = replay_window(storage, ONE_DAY, config(behaviors=("pv", "fav")), said.append)
    assert (summary["validated"], summary["added"]) == (1, 0)
    assert said[0] == "1 day to replay, 0 validated before"
    assert "nothing was replayed: no row in quarantine is good by now" in said


def test_a_refused_day_is_validated_anew_and_a_replay_can_be_refused(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), *[(8, 80, 1, "cart", NOON + i) for i in range(10)]])
    with pytest.raises(QualityError, match="10 of 30 rows rejected"):
        validate_window(storage, ONE_DAY, config(behaviors=("pv",), max_rejected_share=0.1))
    wider = config(behaviors=("pv", "cart"), max_rejected_share=0.1)
    summary = replay_window(storage, ONE_DAY, wider)
    assert (summary["validated"], summary["accepted"], summary["replayed"], summary["added"]) == (1, 30, 0, 30)
    before = content(storage)
    for _ in range(2):
        with pytest.raises(QualityError, match="expected min_value 31"):
            replay_window(storage, ONE_DAY, config(behaviors=("pv", "cart"), min_rows=31))
    assert published_days(storage)[DAY] == [f"behaviors/dt={DAY}"]
    assert {key for key in content(storage).keys() - before.keys() if "/refused-" not in key} == set()


def test_replays_follow_one_another(tmp_path):
    storage = FolderStorage(tmp_path)
    rows = [(1 + i, 10 + i, 1, name, NOON + i) for i, name in enumerate(["cart", "fav", "buy"] * 3)]
    put_rows(storage, [*good_rows(5), *rows])
    allowed = ("pv",)
    validate_window(storage, ONE_DAY, config(behaviors=allowed))
    for count, name in enumerate(["cart", "fav", "buy"], 1):
        allowed = (*allowed, name)
        assert replay_window(storage, ONE_DAY, config(behaviors=allowed))["replayed"] == 3
        assert len(published(storage)) == 5 + 3 * count
        assert len(rejected(storage, last_quarantine(storage))) == 9 - 3 * count
    assert Counter(published(storage)) == Counter([*good_rows(5), *rows])


def test_a_refresh_finds_what_a_replay_added_and_adds_it_on_top(tmp_path):
    storage = FolderStorage(tmp_path / "store")
    days = [DAY + timedelta(days=number) for number in range(2)]
    for day in days:
        put_rows(storage, [*good_rows(20, day=day), *good_rows(5, "cart", day)], day)
    window = Window(days[0], days[-1] + timedelta(days=1))
    validate_window(storage, window, config(behaviors=("pv",)))
    settings_ = RefreshConfig(min_buckets=2, max_delta_share=1.0)
    places = Places(store=str(tmp_path), scratch=str(tmp_path / "scratch"))
    said = []
    with closing(LocalEngine(settings_, places)) as engine:
        first = group_histories(storage, engine, window.end, settings_, said.append)
        replayed = Window(days[0], days[1]), config(behaviors=("pv", "cart"))
        assert replay_window(storage, *replayed)["waiting"] == [f"behaviors/dt={days[0]}/replay-001"]
        assert replay_window(storage, *replayed)["waiting"] == [f"behaviors/dt={days[0]}/replay-001"]  # added by then
        second = group_histories(storage, engine, window.end, settings_, said.append)
    assert (first.manifest.counts["behaviors"], second.manifest.counts["behaviors"]) == (40, 45)
    assert any(f"grouping 5 behaviors of 1 partition on top of {first.snapshot}" in line for line in said)
    histories, inputs = read_histories(storage, window.end)
    assert len(histories.item_ids) == 45
    assert f"behaviors/dt={days[0]}/replay-001" in inputs
    assert replay_window(storage, *replayed)["waiting"] == []


def test_a_replay_that_adds_nothing_changes_nothing_for_those_who_read_behaviors(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), (0, 1, 1, "pv", NOON)])
    validate_window(storage, ONE_DAY, config(behaviors=("pv",)))
    before = validated_days(storage, ONE_DAY.end)
    wider = config(behaviors=("pv", "cart"))
    assert replay_window(storage, ONE_DAY, wider)["replayed"] == 0
    assert validated_days(storage, ONE_DAY.end) == before
    assert validate_window(storage, ONE_DAY, wider)["unchanged"] == 1


def test_a_replay_that_was_killed_anywhere_goes_on(tmp_path, dying):
    die, power_cut = dying
    wider = config(behaviors=("pv", "cart"))

    def fresh(name):
        storage = FolderStorage(tmp_path / name)
        put_rows(storage, [*good_rows(20), *good_rows(4, "cart"), (0, 1, 1, "pv", NOON)])
        validate_window(storage, ONE_DAY, config(behaviors=("pv",)))
        return storage

    whole = fresh("whole")
    replay_window(whole, ONE_DAY, wider)
    for last in range(1, 7):  # three files and the manifest of the quarantine, a file and the manifest of behaviors
        storage = fresh(str(last))
        with pytest.raises(power_cut):
            replay_window(die(storage, last), ONE_DAY, wider)
        assert len(published(storage)) == 20
        assert replay_window(storage, ONE_DAY, wider)["replayed"] == 4
        assert content(storage) == content(whole)


def test_what_a_replay_added_counts_only_beside_the_partition_that_it_added_to(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), *good_rows(4, "cart")])
    validate_window(storage, ONE_DAY, config(behaviors=("pv",)))
    replay_window(storage, ONE_DAY, config(behaviors=("pv", "cart")))
    for kind in ("behaviors", "quarantine"):
        for path in (tmp_path / kind / f"dt={DAY}").glob("*.*"):
            path.unlink()
    with pytest.raises(ArtifactError, match="no validated day"):
        validated_days(storage, ONE_DAY.end)
    validate_window(storage, ONE_DAY, config(behaviors=("pv", "cart")))
    with pytest.raises(ArtifactError, match=r"replay-001: adds to another .* its rows may be in both; remove"):
        validated_days(storage, ONE_DAY.end)


def test_rows_cannot_be_replayed_without_their_quarantine(tmp_path):
    storage = FolderStorage(tmp_path)
    put_rows(storage, [*good_rows(20), (0, 1, 1, "pv", NOON)])
    validate_window(storage, ONE_DAY, config())
    (tmp_path / "quarantine" / f"dt={DAY}" / "manifest.json").unlink()
    with pytest.raises(DataError, match="the quarantine of 2024-03-05 is gone"):
        replay_window(storage, ONE_DAY, config(behaviors=("pv",)))


names = st.sampled_from(["pv", "cart", "fav", "", None])
frames = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 1), names, st.sampled_from([NOON, NOON * 1000])),
    min_size=1,
    max_size=25,
)


@given(frames, st.booleans(), st.sampled_from(["s", "ms"]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_is_in_one_place_whatever_comes(tmp_path_factory, rows, unique, unit):
    storage = FolderStorage(tmp_path_factory.mktemp("store"))
    put_rows(storage, rows)
    none = {"min_rows": 0, "min_users": 0, "reject_duplicates": unique}
    validate_window(storage, ONE_DAY, config(behaviors=("pv",), **none))
    before = published(storage)
    summary = replay_window(storage, ONE_DAY, config(unit, behaviors=("pv", "cart"), **none))
    everything = published(storage)
    assert everything[: len(before)] == before
    assert len(everything) + len(rejected(storage, last_quarantine(storage))) == len(rows) == summary["rows"]
    assert not unique or max(Counter(everything).values(), default=1) == 1
    held = {row["row"] - 1 for row in rejected(storage, last_quarantine(storage))}
    kept = [(*row[:4], NOON) for place, row in enumerate(rows) if place not in held]
    assert Counter(everything) == Counter(kept)


def test_the_step_is_the_same_and_the_docs_show_the_day_as_it_is_now(tmp_path):
    places = Places.in_folder(tmp_path / "work")
    storage = FolderStorage(tmp_path / "work" / "store")
    put_rows(storage, [*good_rows(20), *good_rows(4, "cart"), (0, 1, 1, "pv", NOON)])
    say = [].append
    steps.validate(config(behaviors=("pv",)), places, ONE_DAY, say)
    summary = steps.replay(config(behaviors=("pv", "cart")), places, ONE_DAY, say)
    page = f"quarantine/dt={DAY}/replay-001/index.html"
    assert summary["data_docs"] == {str(DAY): f"{storage.uri}/{page}"}
    said = []
    found = steps.docs(config(), places, tmp_path / "docs", DAY, None, said.append)
    assert (tmp_path / "docs" / f"{DAY}-replay-001.html").read_bytes() == storage.get(page)
    assert found["page"] == str(tmp_path / "docs" / f"{DAY}-replay-001.html")
    assert "  1 row rejected: user_id_not_positive" in said
    assert any("row 25: user_id '0', item_id '1'" in line for line in said)
