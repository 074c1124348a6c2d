"""The gates between a candidate and production: absolute floors, and a comparison with the champion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from encode.config import Config, Places
from encode.data.histories import Histories, read_histories
from encode.errors import QualityError
from encode.interests.snapshots import read_space
from encode.model.files import load_model
from encode.registry import REFUSED, Registry, Version
from encode.schema import Window, day_start
from encode.serving.bundle import Bundle
from encode.storage import open_storage
from encode.train import evaluate


@dataclass(frozen=True)
class Gate:
    """One measured value and the range that it must lie in."""

    name: str
    value: float
    lowest: float = float("-inf")
    highest: float = float("inf")

    @property
    def passed(self) -> bool:
        """Tell whether the value is in range; NaN never is."""
        return self.lowest <= self.value <= self.highest

    def __str__(self) -> str:
        bounds = [f">= {self.lowest:g}"] * (self.lowest > float("-inf"))
        bounds += [f"<= {self.highest:g}"] * (self.highest < float("inf"))
        return f"{self.name} {self.value:.4f} ({' and '.join(bounds)})"


def pass_gates(
    config: Config,
    places: Places,
    registry: Registry,
    candidate: Version,
    champion: Version | None,
    bundle: Bundle,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Judge a candidate; a refusal is noted on its version so that it is not tried again.

    Champion and candidate are both measured anew on the candidate's test days, on the same impressions.

    Returns:
        Each gate's value.

    Raises:
        QualityError: a gate is missed.
    """
    storage = open_storage(places)
    card = bundle.card
    test = Window(card.as_of - timedelta(days=card.test_days), card.as_of)
    histories, _ = read_histories(storage, card.as_of, say=say)
    metrics, limits = card.metrics, config.release
    gates = [
        Gate("auc", metrics["auc"], lowest=limits.min_auc),
        Gate("gauc", metrics["gauc"], lowest=limits.min_gauc),
        Gate("auc_first_time", metrics["auc_first_time"], lowest=limits.min_auc_first_time),
        Gate("logloss", metrics["logloss"], highest=limits.max_logloss),
        Gate("calibration", metrics["calibration"], *limits.calibration),
        Gate("coverage", coverage(histories, test, bundle), lowest=limits.min_coverage),
    ]
    if champion is not None:
        old_card, reader = load_model(registry.files(champion), f"version {champion.number}")
        old = evaluate(read_space(storage, old_card.space), reader, histories, test, config.training)
        new = evaluate(bundle.space, bundle.reader, histories, test, config.training)
        say(f"on the same days: champion version {champion.number} auc {old['auc']:.4f}, candidate {new['auc']:.4f}")
        gates.append(Gate("auc_over_champion", new["auc"] - old["auc"], lowest=-limits.max_auc_loss))
    for gate in gates:
        say(f"gate {'passed' if gate.passed else 'MISSED'}: {gate}")
    missed = [str(gate) for gate in gates if not gate.passed]
    if missed:
        registry.tag(candidate, REFUSED, "; ".join(missed))
        serves = "the champion still serves" if champion is not None else "there is no champion yet, nothing serves"
        raise QualityError(
            f"version {candidate.number} misses its gates: {'; '.join(missed)}; {serves}. "
            "Train another candidate, or change the release section of the preset if the gate is wrong"
        )
    return {gate.name: gate.value for gate in gates}


def coverage(histories: Histories, test: Window, bundle: Bundle) -> float:
    """Return the share of the test days' users that the bundle's snapshot holds."""
    active = (histories.timestamps >= day_start(test.start)) & (histories.timestamps < day_start(test.end))
    users = np.unique(histories.user_ids[histories.user_of[active]])
    held = sum(int(np.isin(users, ids, assume_unique=True).sum()) for ids in bundle.snapshot.user_ids())
    return held / max(len(users), 1)
