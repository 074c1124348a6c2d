"""Logged feedback: what was served, and what came of it, by day and by bundle.

    feedback/dt=YYYY-MM-DD/*.parquet    user_id, item_id, probability, label, timestamp, bundle; one row an impression

The scores of each bundle are held against those that its model had on its own test days: the training-serving skew.

I impressions
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.data.parquet import read_parquet
from encode.data.partitions import days_of
from encode.data.vocabulary import Vocabulary
from encode.errors import ArtifactError, ConfigError, DataError
from encode.evaluate.metrics import auc, gauc, logloss
from encode.interests.snapshots import read_space
from encode.lineage import Lineage
from encode.monitoring.sample import Sample, read_sample
from encode.monitoring.stability import Counts, Floats, chance, counts_of, psi
from encode.outputs import read_manifest, read_part
from encode.schema import SECONDS_PER_DAY, bucket_of, day_of
from encode.storage import Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from encode.registry import Version

Ints = npt.NDArray[np.int64]
COLUMNS = {
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "probability": pa.float64(),
    "label": pa.int64(),
    "timestamp": pa.int64(),
    "bundle": pa.string(),
}
_WITHOUT_BUNDLE = "unknown"


@dataclass(frozen=True)
class Reference:
    """The scores of a model on its own test days, as its training report has them: bins of equal size."""

    edges: Floats
    """Half-way between the means of neighboring bins in log-odds, [B - 1]: the report holds the means alone. On the
    very test days this makes a PSI of up to 0.04 where it should be 0."""
    counts: Counts
    """[B]"""
    mean: float


@dataclass(frozen=True)
class Origin:
    """What a bundle is made of, as far as its scores are judged by it."""

    version: str
    reference: Reference
    vocabulary: Vocabulary
    sample: Sample
    """Of its snapshot."""
    num_buckets: int
    """Of its snapshot."""


@dataclass
class Tally:
    """What is counted of impressions, in pieces of any size."""

    impressions: int = 0
    positives: int = 0
    predicted: float = 0.0
    loss: float = 0.0

    def add(self, labels: Ints, probabilities: Floats) -> None:
        """Count some impressions."""
        self.impressions += len(labels)
        self.positives += int(labels.sum())
        self.predicted += float(probabilities.sum())
        self.loss += logloss(labels, probabilities) * len(labels)

    def summary(self) -> dict[str, Any]:
        """Return counts and means; calibration is absent where nothing was clicked."""
        told: dict[str, Any] = {"impressions": self.impressions, "positives": self.positives}
        told |= {"mean_probability": self.predicted / self.impressions, "logloss": self.loss / self.impressions}
        return told | ({"calibration": self.predicted / self.positives} if self.positives else {})


class Skew:
    """How far the impressions of a bundle are from what its model was trained on."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._scores = np.zeros_like(origin.reference.counts)
        self._items, self._known_items = 0, 0
        self._users, self._known_users = 0, 0

    def add(self, user_ids: Ints, item_ids: Ints, probabilities: Floats) -> None:
        """Count some impressions; users count where they are in the buckets of the sample."""
        origin = self._origin
        self._scores = self._scores + counts_of(probabilities, origin.reference.edges)
        self._items += len(item_ids)
        self._known_items += int(origin.vocabulary.is_item(origin.vocabulary.index(item_ids)).sum())
        asked = user_ids[bucket_of(user_ids, origin.num_buckets) < origin.sample.num_buckets]
        self._users += len(asked)
        self._known_users += int(np.isin(asked, origin.sample.user_ids).sum())

    def summary(self) -> dict[str, Any]:
        """Return PSI against training and the shares of impressions of unknown items and users.

        The latter is of the `sampled_impressions`, whose users are in the buckets of the sample.
        """
        expected = self._origin.reference
        told = {"version": self._origin.version, "training_mean": expected.mean}
        told["psi"] = psi(expected.counts, self._scores)
        told["chance"] = chance(len(self._scores), int(expected.counts.sum()), int(self._scores.sum()))
        told["unknown_items"] = 1 - self._known_items / self._items
        told["sampled_impressions"] = self._users
        return told | ({"unknown_users": 1 - self._known_users / self._users} if self._users else {})


def measure(storage: Storage, lineage: Lineage, source: Path | None) -> dict[str, Any]:
    """Return calibration, log loss and AUC of each day and bundle, and the skew of each bundle, oldest day first.

    A day is held in memory at a time, of one file all of its days.

    Args:
        storage: where `feedback/` and the models are.
        lineage: finds the model of a bundle.
        source: a Parquet file, or a folder of them; None reads `feedback/dt=D` in the store.

    Raises:
        ConfigError: `source` is not there, or nothing was logged.
        DataError: a file is not as the contract says.
    """
    days: dict[date, dict[str, Any]] = {}
    bundles: dict[str, Tally] = {}
    skews: dict[str, Skew | str] = {}
    total = Tally()
    for day, table in _by_day(storage, source):
        if day in days:
            raise DataError(f"feedback: {day} is in files of several folders; put the files of a day into one")
        users, items, labels, probabilities = (
            table[name].to_numpy() for name in ("user_id", "item_id", "label", "probability")
        )
        tally = Tally()
        for bundle, rows in _by_bundle(table):
            if bundle not in skews:
                origin = _origin(storage, lineage, bundle)
                skews[bundle] = origin if isinstance(origin, str) else Skew(origin)
            for one in (tally, total, bundles.setdefault(bundle, Tally())):
                one.add(labels[rows], probabilities[rows])
            if isinstance(skew := skews[bundle], Skew):
                skew.add(users[rows], items[rows], probabilities[rows])
        ranked = {"auc": auc(labels, probabilities), "gauc": gauc(users, labels, probabilities)}
        days[day] = tally.summary() | {name: value for name, value in ranked.items() if value == value}
    if not days:
        raise ConfigError(
            f"feedback: nothing in {source or f'{storage.uri}/feedback'}; expected Parquet files with "
            f"{', '.join(COLUMNS)}"
        )
    told = {name: skew if isinstance(skew, str) else skew.summary() for name, skew in skews.items()}
    return {
        "whole": total.summary(),
        "days": [{"day": str(day), **days[day]} for day in sorted(days)],
        "bundles": {name: tally.summary() | {"skew": told[name]} for name, tally in bundles.items()},
    }


def _origin(storage: Storage, lineage: Lineage, bundle: str) -> Origin | str:
    """Return what a bundle is made of, or why that is not known."""
    if bundle == _WITHOUT_BUNDLE:
        return "no bundle was logged"
    try:
        version, prefix = lineage.halves(bundle)
        report = training_report(storage, lineage, version)
        manifest = read_manifest(storage, prefix)
        if manifest is None:
            return f"{prefix}: not in the store"
        sample = read_sample(storage, prefix, manifest)
        space = read_space(storage, version.space)
    except ArtifactError as error:
        return str(error)
    reference = reference_of(report["reliability"])
    return Origin(version.number, reference, space.vocabulary, sample, int(manifest.config["num_buckets"]))


def training_report(storage: Storage, lineage: Lineage, version: Version) -> dict[str, Any]:
    """Return what training wrote down of a version's scores; see `evaluate.metrics.curves`.

    Raises:
        ArtifactError: it is not in the store.
    """
    from encode.model.files import read_report

    for prefix in lineage.models_of(version):
        manifest = read_manifest(storage, prefix)
        parts = {part.name: part for part in manifest.parts} if manifest else {}
        if "report.json" in parts:
            return read_report({"report.json": read_part(storage, prefix, parts["report.json"])})
    raise ArtifactError(f"version {version.number}: its training report is not in {storage.uri}/models")


def reference_of(reliability: Sequence[Mapping[str, float]]) -> Reference:
    """Return the scores of a training report."""
    means = np.array([one["predicted"] for one in reliability]).clip(1e-7, 1 - 1e-7)
    counts = np.array([one["impressions"] for one in reliability], np.int64)
    log_odds = np.log(means) - np.log1p(-means)
    edges = np.unique(1 / (1 + np.exp(-(log_odds[1:] + log_odds[:-1]) / 2)))
    place = np.searchsorted(edges, means, side="right")
    found = np.bincount(place, counts, len(edges) + 1).astype(np.int64)
    return Reference(edges, found, float(np.average(means, weights=counts)))


def _by_bundle(table: pa.Table) -> Iterator[tuple[str, Ints]]:
    names = table["bundle"].fill_null(_WITHOUT_BUNDLE).combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    for code, name in enumerate(names.dictionary.to_pylist()):
        yield name, np.flatnonzero(codes == code)


# --- files -------------------------------------------------------------------------------------------------


def _by_day(storage: Storage, source: Path | None) -> Iterator[tuple[date, pa.Table]]:
    """Yield the impressions of each day: of one folder of the store, of one folder's files, or of a file."""
    if source is None:
        for day, keys in days_of(storage.list("feedback/dt=")).items():
            tables = [_checked(storage.get(key), f"{storage.uri}/{key}") for key in keys if key.endswith(".parquet")]
            for table in tables:
                _refuse_other_days(table, day, f"{storage.uri}/feedback/dt={day}")
            if tables:
                yield day, pa.concat_tables(tables)
        return
    if not source.exists():
        raise ConfigError(f"feedback: {source}: no such file or folder")
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    for paths in folders.values():
        table = pa.concat_tables([_checked(path.read_bytes(), str(path)) for path in paths])
        number = table["timestamp"].to_numpy() // SECONDS_PER_DAY
        for day in np.unique(number).tolist():
            yield day_of(day * SECONDS_PER_DAY), table.filter(pa.array(number == day))


def _checked(data: bytes, where: str) -> pa.Table:
    """Return a file's rows in the types of the contract.

    Raises:
        DataError: names file, column or row, what was found and what was expected.
    """
    try:
        table = read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: not a Parquet file ({str(error).splitlines()[0]})") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise DataError(
            f"{where}: no column {missing[0]}; found {', '.join(table.column_names)}, expected {', '.join(COLUMNS)}"
        )
    table = table.select(list(COLUMNS))
    try:
        table = table.cast(pa.schema(COLUMNS))
    except pa.ArrowException as error:
        told = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise DataError(f"{where}: {str(error).splitlines()[0]}; found {told}") from None
    probability, label = table["probability"], table["label"]
    in_range = pc.and_(pc.greater_equal(probability, 0), pc.less_equal(probability, 1))  # NaN is in no range
    for name, good, expected in (
        *((name, table[name].is_valid(), "a value") for name in COLUMNS if name != "bundle"),
        ("probability", in_range, "0 to 1"),
        ("label", pc.is_in(label, pa.array([0, 1])), "0 or 1"),
        (
            "timestamp",
            pc.and_(pc.greater_equal(table["timestamp"], 0), pc.less(table["timestamp"], 10**11)),
            "UTC seconds",
        ),
    ):
        wrong = np.flatnonzero(~good.fill_null(False).to_numpy())
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{where}: row {row:,}: {name} is {table[name][row].as_py()}, expected {expected}")
    return table


def _refuse_other_days(table: pa.Table, day: date, where: str) -> None:
    number = table["timestamp"].to_numpy() // SECONDS_PER_DAY
    for other in np.unique(number).tolist():
        if (found := day_of(other * SECONDS_PER_DAY)) != day:
            raise DataError(f"{where}: holds impressions of {found}; expected those of its day alone")


# --- for people --------------------------------------------------------------------------------------------


def plot(measured: Mapping[str, Any]) -> Figure:
    """Draw calibration, log loss and AUC by day, one above the other."""
    from matplotlib.figure import Figure

    days = measured["days"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    places = [np.datetime64(one["day"]) for one in days]
    for axis, name, title in zip(
        axes, ("calibration", "logloss", "auc"), ("mean predicted / observed", "log loss, nats", "AUC"), strict=True
    ):
        axis.plot(places, [one.get(name, np.nan) for one in days], "o-", markersize=4)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].axhline(1, color="0.5", linewidth=1)
    axes[0].set_title(f"impressions: {measured['whole']['impressions']:,}, bundles: {len(measured['bundles'])}")
    figure.autofmt_xdate()
    return figure
