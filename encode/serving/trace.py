"""W3C trace context: the header `traceparent`, https://www.w3.org/TR/trace-context/."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


@dataclass(frozen=True)
class Trace:
    """The place of one request in a trace."""

    trace_id: str
    span_id: str
    sampled: bool

    def header(self) -> str:
        """Return it as `traceparent` of version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def continue_trace(headers: Sequence[str]) -> Trace:
    """Return a new span in the trace of a request's `traceparent`, or in a new trace if it has none that is valid.

    Of a later version than 00 the known fields are read, and more may follow, as the standard asks.
    """
    found = _FORM.fullmatch(headers[0]) if len(headers) == 1 else None
    if found:
        version, trace_id, parent_id, flags, more = found.groups()
        known = version != "ff" and not (version == "00" and more is not None)
        if known and int(trace_id, 16) and int(parent_id, 16):
            return Trace(trace_id, _new_id(8), bool(int(flags, 16) & 1))
    return Trace(_new_id(16), _new_id(8), False)


def _new_id(num_bytes: int) -> str:
    """Return a random id that is not zero, which would mean none."""
    return f"{secrets.randbelow(256**num_bytes - 1) + 1:0{2 * num_bytes}x}"
