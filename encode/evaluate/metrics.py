"""Metrics of predicted probabilities, by their definitions.

I impressions
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def auc(labels: npt.NDArray[np.integer], scores: Floats) -> float:
    """Return the probability that a positive scores above a negative, ties counting half (Mann-Whitney).

    NaN where one of the classes is absent.
    """
    return float(_grouped_auc(np.zeros(len(labels), np.int64), labels, scores)[0][0]) if len(labels) else float("nan")


def gauc(groups: npt.NDArray[np.integer], labels: npt.NDArray[np.integer], scores: Floats) -> float:
    """Return the mean of per-group AUC weighted by impressions; groups with one class are left out.

    NaN where no group has both classes.
    """
    values, counts = _grouped_auc(np.unique(groups, return_inverse=True)[1], labels, scores)
    both = ~np.isnan(values)
    return float(np.average(values[both], weights=counts[both])) if both.any() else float("nan")


def _grouped_auc(
    groups: npt.NDArray[np.integer], labels: npt.NDArray[np.integer], scores: Floats
) -> tuple[Floats, npt.NDArray[np.integer]]:
    """AUC and number of impressions of groups 0, 1, ...: from mid-ranks within each group."""
    order = np.lexsort((scores, groups))
    group, score, label = groups[order], scores[order], labels[order]
    counts = np.bincount(group)
    start = np.append(0, np.cumsum(counts))[group]
    new = np.append(True, (group[1:] != group[:-1]) | (score[1:] != score[:-1]))
    first = np.flatnonzero(new)
    tie = np.cumsum(new) - 1
    last = np.append(first[1:], len(score)) - 1
    mid_rank = (first[tie] + last[tie]) / 2 - start + 1
    positives = np.bincount(group, weights=label)
    negatives = counts - positives
    rank_sum = np.bincount(group, weights=mid_rank * label)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return np.where((positives > 0) & (negatives > 0), values, np.nan), counts


def logloss(labels: npt.NDArray[np.integer], probabilities: Floats) -> float:
    """Return the mean negative log likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log1p(-p))))


def calibration(labels: npt.NDArray[np.integer], probabilities: Floats) -> float:
    """Return mean predicted over mean observed: 1 is calibrated, above 1 promises too much. NaN without positives."""
    observed = float(labels.mean())
    return float(probabilities.astype(np.float64).mean() / observed) if observed else float("nan")


def summary(
    users: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    probabilities: Floats,
    first_time: npt.NDArray[np.bool_],
) -> dict[str, float]:
    """Return all metrics of a set of impressions.

    `*_first_time` leaves out items that the user had before; `auc_seen_before` is the AUC of that one bit alone, the
    floor that any model must be held against where negatives are never from the user's past.
    """
    return {
        "auc": auc(labels, probabilities),
        "gauc": gauc(users, labels, probabilities),
        "auc_first_time": auc(labels[first_time], probabilities[first_time]),
        "gauc_first_time": gauc(users[first_time], labels[first_time], probabilities[first_time]),
        "auc_seen_before": auc(labels, 1.0 - first_time),
        "logloss": logloss(labels, probabilities),
        "calibration": calibration(labels, probabilities),
        "impressions": float(len(labels)),
        "positives": float(labels.sum()),
    }


def curves(
    labels: npt.NDArray[np.integer], probabilities: Floats, history_lengths: npt.NDArray[np.integer], num_bins: int = 10
) -> dict[str, list[dict[str, float]]]:
    """Return what people plot: reliability in bins of equal size, and AUC by length of the history.

    A bin with one class has no AUC and is left out.
    """
    reliability = [
        {
            "predicted": float(probabilities[rows].mean()),
            "observed": float(labels[rows].mean()),
            "impressions": len(rows),
        }
        for rows in np.array_split(np.argsort(probabilities, kind="stable"), num_bins)
        if len(rows)
    ]
    by_length = []
    for rows in np.array_split(np.argsort(history_lengths, kind="stable"), num_bins):
        if len(rows) and 0 < labels[rows].sum() < len(rows):
            longest = int(history_lengths[rows].max())
            by_length.append(
                {"up_to": longest, "auc": auc(labels[rows], probabilities[rows]), "impressions": len(rows)}
            )
    return {"reliability": reliability, "auc_by_history_length": by_length}
