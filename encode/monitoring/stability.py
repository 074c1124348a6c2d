"""How far two distributions are apart, by their definitions.

B bins   N values
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from encode.data import trends

SOME, MUCH = 0.1, 0.25
"""PSI from which a change counts by custom, and from which it is a large one."""
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def edges_of(values: npt.NDArray[np.generic], num_bins: int = 10) -> Floats:
    """Return what cuts values into bins of about equal size, ascending, each once, [B - 1] or fewer.

    Equal values are never cut apart: of discrete values there are fewer bins.
    """
    if not len(values):
        return np.zeros(0)
    inner = np.linspace(0, 1, num_bins + 1)[1:-1]
    edges: Floats = np.unique(np.quantile(values.astype(np.float64), inner, method="higher"))
    above: Floats = edges[edges > values.min()]
    return above


def counts_of(values: npt.NDArray[np.generic], edges: Floats) -> Counts:
    """Return how many values are below the first edge, from each edge to below the next, and from the last on, [B]."""
    place = np.searchsorted(edges, values, side="right")
    return np.bincount(place, minlength=len(edges) + 1).astype(np.int64)


def psi(expected: Counts, found: Counts) -> float:
    """Return the population stability index of two histograms over the same bins.

    PSI = sum_b (q_b - p_b) ln(q_b / p_b),   p_b = (n_b + 1/2) / (N + B/2),   q_b likewise of what was found.

    It is 0 for equal shares, never negative, and the same both ways. The half keeps an empty bin finite. By custom
    below 0.1 is no change, above 0.25 a large one; compare it with `chance`. NaN where one side is empty.

    Args:
        expected: values in each bin, [B].
        found: values in each bin, [B].

    Raises:
        ValueError: the numbers of bins differ.
    """
    if len(expected) != len(found):
        raise ValueError(f"psi: {len(expected)} bins and {len(found)}")
    if not expected.sum() or not found.sum():
        return float("nan")
    return float(trends.psi(found, expected))


def chance(num_bins: int, expected: int, found: int) -> float:
    """Return the PSI to expect of two samples of one distribution, (B - 1) (1/N + 1/M); NaN where one is empty."""
    return (num_bins - 1) * (1 / expected + 1 / found) if expected and found else float("nan")


def verdict(found: float, by_chance: float) -> str:
    """Say whether a PSI is a change: `none`, `some` or `much`, and none up to twice what chance makes."""
    moved = found > 2 * by_chance
    return "much" if moved and found > MUCH else "some" if moved and found > SOME else "none"
