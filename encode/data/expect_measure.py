"""A measure of a day as an expectation; imported late, for Great Expectations takes seconds to import."""

from __future__ import annotations

from typing import Any, ClassVar

from great_expectations.expectations.expectation import BatchExpectation


class ExpectMeasureToBeBetween(BatchExpectation):  # type: ignore[misc]
    """Expect a number that `encode.data.trends` measured to be from `min_value` to `max_value`, both allowed."""

    measure: str
    observed: float
    min_value: float | None = None
    max_value: float | None = None
    named: list[str] = []

    success_keys: ClassVar[tuple[str, ...]] = ("measure", "observed", "min_value", "max_value", "named")

    def _validate(
        self, metrics: dict[str, Any], runtime_configuration: dict[str, Any] | None = None, execution_engine: Any = None
    ) -> dict[str, Any]:
        low = self.min_value is None or self.observed >= self.min_value
        high = self.max_value is None or self.observed <= self.max_value
        return {"success": low and high, "result": {"observed_value": self.observed}}
