"""What serves now, held against what it should be: age, drift since the snapshot before, skew against training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from encode.config import TrainingConfig
from encode.data.histories import Histories, read_histories
from encode.data.impressions import draw_impressions, snapshot_times
from encode.data.partitions import days_of, validated_days
from encode.errors import ArtifactError, EncodeError
from encode.evaluate.metrics import summary
from encode.evaluate.reading import predict
from encode.evaluate.replay import Replay, make_replay
from encode.interests.clustered import cluster_histories
from encode.interests.snapshots import folder_of, read_space
from encode.model.ctr import Reader
from encode.model.files import load_model
from encode.model.space import Space
from encode.monitoring.drift import coverage, kept_share, score_shift, shift, shifts
from encode.monitoring.sample import Sample, read_sample
from encode.outputs import MANIFEST, Manifest, read_manifest, read_part
from encode.pointers import read_current, read_pointer
from encode.registry import CHAMPION, Registry, Version
from encode.schema import Window
from encode.serving.engine import Engine
from encode.storage import Storage


@dataclass(frozen=True)
class Watch:
    """One look at a store and a registry, as of the start of a day: the wall clock is never asked."""

    storage: Storage
    registry: Registry
    as_of: date
    say: Callable[[str], None]

    def look(self, score_days: int, config: TrainingConfig) -> dict[str, Any]:
        """Return `freshness`, and of what serves `drift` and, with `score_days`, `skew`.

        What cannot be measured is a line under `problems`.

        Args:
            score_days: score the behaviors of so many newest days as training did; 0 scores none. Reads all
                behaviors into memory, as training does.
            config: how impressions are drawn.
        """
        freshness = self.freshness()
        told: dict[str, Any] = {"as_of": str(self.as_of), "freshness": freshness, "problems": []}
        if ahead := [name for name, one in freshness.items() if "ahead_days" in one]:
            told["problems"].append(
                f"freshness: ahead of {self.as_of}, so without an age as of then: {', '.join(ahead)}"
            )
        if self.champion is None:
            told["problems"].append("no version has the alias champion: nothing serves")
            return told
        measures = {"drift": self.drift} | ({"skew": partial(self.skew, score_days, config)} if score_days else {})
        for name, measure in measures.items():
            try:
                told[name] = measure()
            except EncodeError as error:
                told["problems"].append(f"{name}: {error}")
        return told

    @cached_property
    def champion(self) -> Version | None:
        """The version that serves."""
        return self.registry.by_alias(CHAMPION)

    def freshness(self) -> dict[str, dict[str, Any]]:
        """Return the first day that each stage knows nothing of, and how many days ago that began.

        What ends after the day that is asked about is ahead of it, and has no age.
        """
        ends = {name: self._newest(name) for name in ("raw", "behaviors")}
        pointers = {"histories": "histories"}
        if self.champion is not None:
            pointers["snapshot"] = folder_of(self.champion.space)
            trained = self.champion.tags.get("encode.as_of")
            ends["model"] = date.fromisoformat(trained) if trained else None
        for name, folder in pointers.items():
            found = read_pointer(self.storage, folder)
            ends[name] = found[0].as_of if found else None
        return {
            name: {"ends": str(end), **_age((self.as_of - end).days)} if end else {"ends": None}
            for name, end in ends.items()
        }

    def _newest(self, kind: str) -> date | None:
        """Return the day after the newest partition; behaviors count when they are complete."""
        days = days_of(self.storage.list(f"{kind}/dt="))
        found = [day for day, keys in days.items() if kind == "raw" or f"{kind}/dt={day}/{MANIFEST}" in keys]
        return max(found) + timedelta(1) if found else None

    def drift(self) -> dict[str, Any]:
        """Return how far the current snapshot is from the one before, and how many active users it holds.

        All but `users` is of the `sample`, see `encode.monitoring.sample`.

        Raises:
            ArtifactError: there is no snapshot, none before it, or one is damaged.
        """
        folder = folder_of(self._serving.space)
        current = read_current(self.storage, folder)
        if current is None:
            raise ArtifactError(f"{folder}: no snapshot yet")
        name, manifest = current[0].snapshot, current[1]
        now = read_sample(self.storage, f"{folder}/{name}", manifest)
        buckets = int(manifest.config["num_buckets"])
        told: dict[str, Any] = {
            "snapshot": name,
            "users": int(manifest.counts["users"]),
            "sample": {"users": len(now.user_ids), "buckets": now.num_buckets, "of_buckets": buckets},
        }
        active = self._active_users()
        covered = coverage(active, now, buckets) if active is not None else float("nan")
        told |= {"coverage_of_newest_day": covered} if covered == covered else {}
        before = self._before(folder, name, manifest)
        if before is None:
            return told | {"before": None}
        earlier = before[1]
        space = read_space(self.storage, self._serving.space)
        reader = load_model(self.registry.files(self._serving), f"version {self._serving.number}")[1]
        measured = [*shifts(earlier, now), score_shift(earlier, now, space, Engine(space, reader))]
        told |= {"before": before[0], "sampled_users_kept": kept_share(earlier, now)}
        return told | {"measures": {one.name: one.summary() for one in measured}}

    def _before(self, folder: str, name: str, manifest: Manifest) -> tuple[str, Sample] | None:
        """Return the snapshot that the current one was built on, else the newest of an earlier day."""
        named = [one.rpartition("/")[2] for one in manifest.inputs if one.startswith(f"{folder}/")]
        ending = f"/{MANIFEST}"
        there = [
            key.removesuffix(ending).rpartition("/")[2]
            for key in self.storage.list(f"{folder}/")
            if key.endswith(ending)
        ]
        earlier = sorted(one for one in there if one[:8] < name[:8])
        for one in (*named, *earlier[-1:]):
            found = read_manifest(self.storage, f"{folder}/{one}")
            if found is not None:
                return one, read_sample(self.storage, f"{folder}/{one}", found)
        return None

    def _active_users(self) -> Any:
        """Return the users of the newest validated day, of its first file and that of each replay."""
        end = self._newest("behaviors")
        if end is None:
            return None
        users = []
        for prefix, manifest in validated_days(self.storage, end, end - timedelta(1)).items():
            with pq.ParquetFile(pa.BufferReader(read_part(self.storage, prefix, manifest.parts[0]))) as file:
                users.append(file.read(["user_id"], use_threads=False)["user_id"].to_numpy())
        return np.concatenate(users)

    def skew(self, days: int, config: TrainingConfig) -> dict[str, Any]:
        """Score the behaviors of the newest days, and those of the model's own test days, and compare.

        Raises:
            ArtifactError: behaviors are not there.
            DataError: the days hold no positive.
        """
        version = self._serving
        card, reader = load_model(self.registry.files(version), f"version {version.number}")
        space = read_space(self.storage, version.space)
        end = self._newest("behaviors") or self.as_of
        histories, _ = read_histories(self.storage, max(end, card.as_of), say=self.say)
        own = Window(card.as_of - timedelta(card.test_days), card.as_of)
        newest = Window(end - timedelta(days), end)
        then, now = (_score(space, reader, histories, window, config) for window in (own, newest))
        moved = shift("score", then.probabilities, now.probabilities)
        shown = now.replay.impressions
        measured = summary(shown.user, shown.labels, now.probabilities, shown.first_time)
        names = ("auc", "gauc", "logloss", "calibration", "impressions")
        return {
            "trained": own.in_words(),
            "scored": newest.in_words(),
            **moved.summary(),
            "unknown_items": float(1 - space.vocabulary.is_item(now.replay.target_index).mean()),
            "users_without_history": float(np.mean(now.replay.history_lengths() == 0)),
            **{name: measured[name] for name in names if measured[name] == measured[name]},
        }

    @cached_property
    def _serving(self) -> Version:
        if self.champion is None:
            raise ArtifactError("no version has the alias champion: nothing serves")
        return self.champion


@dataclass(frozen=True)
class _Scored:
    replay: Replay
    probabilities: npt.NDArray[np.float32]
    """[impressions of the replay]"""


def _age(days: int) -> dict[str, int]:
    return {"age_days": days} if days >= 0 else {"ahead_days": -days}


def _score(space: Space, reader: Reader, histories: Histories, days: Window, config: TrainingConfig) -> _Scored:
    """Replay the impressions of some days, as the gates do."""
    impressions = draw_impressions(histories, days, config, config.max_eval_positives)
    times = snapshot_times(impressions, days, config.snapshot_days)
    replay = make_replay(histories, impressions, times, space.vocabulary, space.config.recent_length)
    offline = partial(cluster_histories, clustering=space.config.clustering)
    return _Scored(replay, predict(space.items, reader, replay, offline))
